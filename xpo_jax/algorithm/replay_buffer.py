"""Past pairs, from which later updates learn again: the D_t of Algorithm 1 (arXiv 2405.21046).

By report, the paper minimises the loss over all pairs so far, preference and bonus alike, in every iteration. Here an
iteration makes `updates` updates: the first on its fresh pairs, so that what is measured there (KL, entropy) is of the
policy that sampled them, each further one on pairs drawn uniformly from the buffer, the fresh ones included. With one
update per iteration nothing is replayed and every update is on-policy; further updates are not.

A pair keeps its verdict and its log-probabilities under the reference. A resumed run refills its buffer from its pairs
logs, and draws what it would have drawn: the draw is a function of seed, step and update.

Left out on purpose: pairs without a verdict, priorities, and off-policy corrections, which a loss that fits verdicts on
fixed responses does not need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs

_NEEDED = ("prompt_tokens", "ref_logps")  # of a record; logs of older versions lack them


class _Pair(NamedTuple):
    """One row of `Pairs`, without padding."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, np.ndarray]
    ref_logps: np.ndarray
    p_first: float
    weight: float


class ReplayBuffer:
    """The newest judged pairs of a run, from which minibatches are drawn.

    Args:
      updates, capacity: see settings.Replay.
      batch_size: pairs of an update, B. seed: of the run.
      pad_token: right-pads prompts and responses.
    """

    def __init__(
        self,
        *,
        updates: int,
        capacity: int,
        batch_size: int,
        seed: int,
        pad_token: int,
    ):
        self._updates = updates
        self._pairs: deque[_Pair] = deque(maxlen=capacity)
        self._batch_size, self._seed, self._pad = batch_size, seed, pad_token

    def __len__(self) -> int:
        return len(self._pairs)

    def minibatches(self, step: int, fresh: Pairs) -> Iterator[Pairs]:
        """Add the fresh pairs, and draw the pairs of each further update of the iteration.

        Args:
          step: number of iterations before this one.
          fresh: NumPy arrays, B rows; padding rows and pairs without a verdict are not added.
        """
        if self._updates == 1:
            return
        for i in map(int, np.flatnonzero(fresh.valid & (fresh.weight > 0))):
            self._pairs.append(_row(fresh, i))
        for update in range(1, self._updates if self._pairs else 1):
            generator = np.random.default_rng((self._seed, Stream.REPLAY, step, update))
            count = min(self._batch_size, len(self._pairs))
            chosen = generator.choice(len(self._pairs), count, replace=False, shuffle=False)
            yield self._batch([self._pairs[i] for i in chosen])

    def refill(self, past: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Add the pairs of a run that is resumed.

        Args:
          past: reads the records of its pairs logs (`pairs_log.pair_records`) in any order; not called if nothing is
            replayed. They carry their prompts' tokens: the run's data may have changed since.

        Raises:
          ValueError: a record of an older version, without tokens of the prompt or log-probabilities.
        """
        if self._updates == 1:
            return
        judged = [record for record in past() if record["weight"] > 0]
        judged.sort(key=lambda record: (record["step"], record["position"]))
        for record in judged[-(self._pairs.maxlen or 0) :]:
            if missing := [name for name in _NEEDED if name not in record]:
                raise ValueError(
                    f"step {record['step']} of the pairs log has no {missing[0]}, which replay needs; resume with"
                    " replay.updates=1, or start again with another --config.run_dir"
                )
            self._pairs.append(_pair_from_record(record))

    def metrics(self, replayed: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return means over an iteration's further updates; nothing if there were none.

        Args:
          replayed: `update.summarise` of each. Their objective/... would be of responses of older policies.
        """
        if not replayed:
            return {}
        names = ("loss/total", "rewards/accuracies", "rewards/margins")
        means = {
            name.replace("/", "_"): float(np.mean([metrics[name] for metrics in replayed])) for name in names
        }
        return {"replay/pairs": len(self), **{f"replay/{name}": mean for name, mean in means.items()}}

    def _batch(self, rows: Sequence[_Pair]) -> Pairs:
        """Return B rows, the last of them padding if there are fewer."""
        B, width = self._batch_size, max(len(row.prompt) for row in rows)
        longest = max(len(response) for row in rows for response in row.responses)
        prompts, prompt_lengths = np.full((B, width), self._pad, np.int32), np.ones(B, np.int32)
        tokens = np.full((2, B, longest), self._pad, np.int32)
        lengths, ref_logps = np.ones((2, B), np.int32), np.zeros((2, B), np.float32)
        p_first, weight = np.full(B, 0.5, np.float32), np.zeros(B, np.float32)
        for i, row in enumerate(rows):
            prompt_lengths[i], prompts[i, : len(row.prompt)] = len(row.prompt), row.prompt
            ref_logps[:, i], p_first[i], weight[i] = row.ref_logps, row.p_first, row.weight
            for candidate, response in enumerate(row.responses):
                lengths[candidate, i], tokens[candidate, i, : len(response)] = len(response), response
        return Pairs(
            prompts,
            prompt_lengths,
            tokens,
            lengths,
            ref_logps,
            p_first,
            weight,
            valid=np.arange(B) < len(rows),
        )


def _row(pairs: Pairs, i: int) -> _Pair:
    prompt = pairs.prompt_tokens[i, : pairs.prompt_lengths[i]]
    first, second = (pairs.tokens[s, i, : pairs.lengths[s, i]] for s in (0, 1))
    # copies: a view would keep the whole batch
    return _Pair(
        prompt.copy(),
        (first.copy(), second.copy()),
        pairs.ref_logps[:, i].copy(),
        float(pairs.p_first[i]),
        float(pairs.weight[i]),
    )


def _pair_from_record(record: Mapping[str, Any]) -> _Pair:
    """Return what `_row` returned when the pair was fresh."""
    first, second = (np.array(response["tokens"], np.int32) for response in record["responses"])
    return _Pair(
        np.array(record["prompt_tokens"], np.int32),
        (first, second),
        np.array(record["ref_logps"], np.float32),
        float(record["p_first"]),
        float(record["weight"]),
    )
