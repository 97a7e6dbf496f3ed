"""Random streams: their numbers are part of what a run draws."""

import numpy as np

from xpo_jax.algorithm.sampler import row_keys
from xpo_jax.runtime.rng import Stream


def test_stream_values_are_fixed_and_unique():
    assert Stream.__members__ == {"TRAINING": 1, "EVALUATION": 2, "REPLAY": 3, "CHAT": 4}  # no aliases
    assert len({int(stream) for stream in Stream}) == len(Stream)


def test_stream_keys_equal_those_of_its_number():
    position = np.arange(3, dtype=np.int32)
    for stream in Stream:
        by_name, by_number = (row_keys(7, s, 5, position, 1) for s in (stream, int(stream)))
        assert (by_name == by_number).all()
    draws = [np.random.default_rng((0, s, 2)).random() for s in (Stream.REPLAY, 3)]
    assert draws[0] == draws[1]
