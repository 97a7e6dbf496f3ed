"""Packed rows, read back slot by slot: every pair once and whole, no row too full, few slots empty."""

import jax
import numpy as np
import pytest

from xpo_jax.algorithm.packing import (
    MIN_MEAN_SLOTS,
    Packer,
    fill,
    needed_slots,
    padding,
    sequence_lengths,
)


def batch(B, P, T, seed=0):
    rng = np.random.default_rng(seed)
    prompt_lengths, lengths = rng.integers(1, P + 1, B), rng.integers(1, T + 1, (2, B))
    return rng.integers(3, 99, (B, P)), prompt_lengths, rng.integers(3, 99, (2, B, T)), lengths


def read_back(packer, packed, pairs):
    """Return {pair: (prompt, [(targets of a response, its tokens that are fed)])}, by the rules of `Packed` alone."""
    recovered, width = {}, packed.tokens.shape[1]
    rows_per_shard = packer.rows // packer.shards
    for shard, indices in enumerate(pairs):
        for place, index in enumerate(indices):
            if index < 0:
                continue
            responses, prompts = [], []
            for candidate in (0, 1):
                is_target = packed.response[shard] == 2 * place + candidate
                row, at = np.divmod(packed.source[shard][is_target], width)
                assert len(set(row)) == 1
                slots = lambda name, at=shard * rows_per_shard + row[0]: getattr(packed, name)[at]
                parts, prompt_part = slots("part"), slots("prompt")[at[0]]
                assert parts[at[0]] == prompt_part  # the first token is predicted from the prompt's last
                response_slots = np.flatnonzero(np.isin(np.arange(width), at[1:]))
                assert len(set(parts[response_slots])) <= 1 and (parts[response_slots] > prompt_part).all()
                assert (slots("prompt")[response_slots] == prompt_part).all()
                prompt = np.flatnonzero(parts == prompt_part)
                assert (slots("positions")[prompt] == np.arange(len(prompt))).all() and at[0] == prompt[-1]
                assert (slots("positions")[at[1:]] == len(prompt) + np.arange(len(response_slots))).all()
                assert (np.sort(at[1:]) == at[1:]).all() and (response_slots > prompt[-1]).all()
                prompts.append(slots("tokens")[prompt].tolist())
                responses.append((packed.target[shard][is_target].tolist(), slots("tokens")[at[1:]].tolist()))
            assert prompts[0] == prompts[1] and int(index) not in recovered
            recovered[int(index)] = prompts[0], responses
    return recovered


@pytest.mark.parametrize(("rows", "shards"), [(1, 1), (4, 1), (4, 2), (8, 8)])
def test_every_pair_is_there_once_and_whole(rows, shards):
    (prompts, prompt_lengths, tokens, lengths) = given = batch(23, 9, 7)
    keep = np.arange(23) != 5
    packer, recovered = Packer(rows, sequence_lengths(9, 7), shards), {}
    micro_batches = packer(*given, keep)
    for packed, pairs in micro_batches:
        assert all(
            x.shape == s.shape for x, s in zip(packed, packer.shapes(packed.tokens.shape[1]), strict=True)
        )
        assert packed.tokens.shape[1] in packer.widths
        part = read_back(packer, packed, pairs)
        assert not set(part) & set(recovered)
        recovered |= part
        targets = sum(int(lengths[:, pair].sum()) for pair in part)
        assert (packed.response >= 0).sum() == targets
        # every slot that is not empty belongs to these pairs
        assert (packed.part >= 0).sum() == sum(
            int(prompt_lengths[pair] + (lengths[:, pair] - 1).sum()) for pair in part
        )
    assert set(recovered) == set(np.flatnonzero(keep))
    for pair, (prompt, responses) in recovered.items():
        assert prompt == prompts[pair, : prompt_lengths[pair]].tolist()
        for candidate, (targets, fed) in enumerate(responses):
            whole = tokens[candidate, pair, : lengths[candidate, pair]].tolist()
            assert (targets, fed) == (whole, whole[:-1])


def test_packer_invalid_rows_are_left_out_regardless_of_their_content():
    packer, valid = Packer(4, sequence_lengths(9, 7), 1), np.arange(23) > 5
    arrays = batch(23, 9, 7)
    packed = packer(*arrays, valid)
    assert sum((pairs >= 0).sum() for _, pairs in packed) == 17
    noise = [x.copy() for x in arrays]
    for x, axis in zip(noise, (0, 0, 1, 1), strict=True):
        x.swapaxes(0, axis)[~valid] = 0  # a length of 0, too
    jax.tree.map(np.testing.assert_array_equal, packer(*noise, valid), packed)


def test_slots_of_a_pair_and_widths_by_hand():
    assert needed_slots(np.array([5, 1]), np.array([[4, 1], [2, 1]])).tolist() == [5 + 3 + 1, 2]
    assert sequence_lengths(64, 64) == (96, 144, 192)  # 64 + 2 * 63 = 190
    assert sequence_lengths(1, 1) == (8,)


def test_a_row_takes_the_largest_that_still_fit_and_the_width_that_they_fill_best():
    assert fill(np.array([10, 18, 6]), 1, (16, 24)) == [(24, [[1, 2]]), (16, [[0]])]
    assert fill(np.array([10, 16, 6]), 1, (16, 24)) == [(16, [[1]]), (16, [[0, 2]])]
    assert fill(np.array([24, 12, 12]), 2, (16, 24)) == [(24, [[0], [2, 1]])]
    assert fill(np.array([], int), 2, (16,)) == []
    many = fill(
        np.full(64, 2), 1, (16,)
    )  # short sequences: a row holds at most its length / MIN_MEAN_SLOTS of them
    assert {len(row) for _, held in many for row in held} == {16 // MIN_MEAN_SLOTS}


def test_under_a_tenth_is_empty_at_realistic_lengths():
    """A batch of 32 prompts of 64 tokens, responses lognormal with mean 40 and at most 128 tokens."""
    packer, empty = Packer(2, sequence_lengths(64, 128), 1), []
    for seed in range(10):
        drawn = np.random.default_rng(seed).lognormal(np.log(40) - 0.18, 0.6, (2, 32))
        lengths = np.clip(np.rint(drawn), 2, 128).astype(int)
        prompts, tokens = np.ones((32, 64), int), np.ones((2, 32, 128), int)
        empty.append(padding(packer(prompts, np.full(32, 64), tokens, lengths, np.ones(32, bool))))
    assert np.mean(empty) < 0.08 and max(empty) < 0.12
