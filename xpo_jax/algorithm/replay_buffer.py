"""Past pairs, from which later updates learn again: the D_t of Algorithm 1 (arXiv 2405.21046).

The paper minimises the loss over all pairs so far, preference and bonus alike, after every round of samples. Here a
round makes `updates` updates: the first on its own fresh pairs, so that what is measured there (KL, entropy) is of the
policy that drew them, each further one on pairs drawn uniformly from the memory, the fresh ones among them. With one
update a round nothing is replayed, and every update is on-policy; a further one is not.

A pair keeps the verdict and the reference's log-probabilities that it was given. A run that goes on fills its memory
from its pairs logs, and draws what it would have drawn: the draw is a function of seed, step and update.

Left out on purpose: pairs without a verdict, priorities, and corrections for being off-policy, which a loss that fits
verdicts on given answers does not need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs, Prompts

Batches = Any  # batches[step] gives values.Prompts, see data/pipeline.py


class _Pair(NamedTuple):
    """One row of `Pairs`, without padding."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, np.ndarray]
    ref_logps: np.ndarray
    p_first: float
    weight: float


class ReplayBuffer:
    """The newest judged pairs of a run, and what each round learns from.

    Args:
      updates, capacity: see settings.Replay.
      batch_size: pairs of an update, B. seed: of the run.
      pad_token: stands right of every prompt and response.
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

    def round(self, step: int, fresh: Pairs) -> Iterator[Pairs]:
        """The pairs of each update of a round: the fresh ones, which are remembered, then what is drawn.

        Args:
          step: rounds before this one.
          fresh: NumPy arrays, B rows; those that are not real or have no verdict are not remembered.
        """
        yield fresh
        if self._updates == 1:
            return
        for i in map(int, np.flatnonzero(fresh.valid & (fresh.weight > 0))):
            self._pairs.append(_row(fresh, i))
        for update in range(1, self._updates if self._pairs else 1):
            generator = np.random.default_rng((self._seed, Stream.REPLAY, step, update))
            count = min(self._batch_size, len(self._pairs))
            chosen = generator.choice(len(self._pairs), count, replace=False, shuffle=False)
            yield self._batch([self._pairs[i] for i in chosen])

    def refill(self, past: Callable[[], Iterable[Mapping[str, Any]]], batches: Batches) -> None:
        """Remember the pairs of a run that goes on.

        Args:
          past: reads the records of its pairs logs (`pairs_log.pair_records`) in any order; not called where nothing is
            replayed.
          batches: the run's prompts by step, from which the prompts' tokens come.

        Raises:
          ValueError: a record that has no ref_logps, as logs of older versions.
        """
        if self._updates == 1:
            return
        judged = [record for record in past() if record["weight"] > 0]
        judged.sort(key=lambda record: (record["step"], record["position"]))
        step, prompts = -1, None
        for record in judged[-(self._pairs.maxlen or 0) :]:
            if "ref_logps" not in record:
                raise ValueError(
                    f"step {record['step']} of the pairs log has no ref_logps, which replay needs; go on with"
                    " replay.updates=1, or give another --config.run_dir"
                )
            if record["step"] != step:
                step, prompts = record["step"], batches[record["step"]]
            assert prompts is not None
            self._pairs.append(_recalled(record, prompts))

    def metrics(self, replayed: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """What a round's further updates came to, means over them; nothing where there were none.

        Args:
          replayed: `update.summarise` of each. What they call objective/... is of answers of older policies.
        """
        if not replayed:
            return {}
        names = ("loss/total", "rewards/accuracies", "rewards/margins")
        means = {name.replace("/", "_"): float(np.mean([each[name] for each in replayed])) for name in names}
        return {"replay/pairs": len(self), **{f"replay/{name}": mean for name, mean in means.items()}}

    def _batch(self, rows: Sequence[_Pair]) -> Pairs:
        """B rows, the last of them not real where there are fewer."""
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


def _recalled(record: Mapping[str, Any], prompts: Prompts) -> _Pair:
    """What `_row` gave when the pair was fresh."""
    i = int(np.flatnonzero(prompts.position == record["position"])[0])
    first, second = (np.array(response["tokens"], np.int32) for response in record["responses"])
    return _Pair(
        prompts.tokens[i, : prompts.lengths[i]].copy(),
        (first, second),
        np.array(record["ref_logps"], np.float32),
        float(record["p_first"]),
        float(record["weight"]),
    )
