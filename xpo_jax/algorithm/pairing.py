"""Which pairs of a prompt's candidates are judged and learned from, where it has more than two.

Candidates are numbered: 0 is the policy's, 1 the second one (the reference's or the policy's, see `loss.py` in
config/), 2 and so on are further ones of the policy. A pair is an index into `all_pairs`, which lists the pair of a run
with two candidates first; ties between pairs go to the earlier one.

    rule            needs       pairs a prompt
    best_worst      scores      the best and the worst
    best_quantile   scores      the best and the lower quartile
    all             scores      every pair
    uncertain       rewards     the pair of which the implicit rewards are closest
    optimistic      rewards     the policy's candidate with the highest implicit reward, and the second one

A score is a judge's, of one answer by itself. An implicit reward is beta * log(pi / ref), by which the policy itself
predicts a verdict (arXiv 2305.18290). arXiv 2502.16825 found best and worst to be worse the more samples there are, and
takes the sample at two standard deviations below the mean for the worst; with few samples none lies below that, so that
the lower quartile stands in for it here.

Nothing here is drawn, and nothing runs on a device: these are functions of what the candidates are.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from xpo_jax.values import Prompts, Samples

SECOND = 1  # the number of the second candidate

SCORED, REWARDED = ("best_worst", "best_quantile", "all"), ("uncertain", "optimistic")
QUARTILE = 0.25


class Candidates(NamedTuple):
    """The samples of B prompts' candidates.

    tokens: i32[C B T]. lengths: i32[C B]. finished: bool[C B].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray


def stack(samples: list[Samples]) -> Candidates:
    """Return the candidates of which these are the samples, in the order of their numbers."""
    return Candidates(*(np.stack([getattr(s, name) for s in samples]) for name in Candidates._fields))


def split(samples: Samples, count: int) -> list[Samples]:
    """Return the samples of each candidate, from one call of the sampler for `count` candidates a prompt."""
    rows = [x.reshape(-1, count, *x.shape[1:]) for x in samples]
    return [Samples(*(x[:, number] for x in rows)) for number in range(count)]


def policy_numbers(count: int) -> tuple[int, ...]:
    """Return the numbers of the `count` candidates that the policy draws first: all but `SECOND`."""
    return tuple(number for number in range(count + 1) if number != SECOND)


def all_pairs(candidates: int) -> list[tuple[int, int]]:
    """Return the pairs of some candidates: those with candidate 1, as the second, before the others, in their order."""
    return sorted(
        ((j, i) if i == 1 else (i, j) for i, j in itertools.combinations(range(candidates), 2)),
        key=lambda pair: (pair[1] != 1, pair),
    )


def pairs_per_prompt(rule: str | None, candidates: int) -> int:
    """Return how many pairs of a prompt are judged."""
    return candidates * (candidates - 1) // 2 if rule == "all" else 1  # the length of `all_pairs`


def informative(candidates: Candidates, *, unfinished_loses: bool) -> Bool[np.ndarray, "N B"]:
    """Return, for each pair of `all_pairs`, whether a judge would be asked about it.

    It is not where both have the same tokens, or, with `unfinished_loses`, where one is unfinished.
    """
    tokens, lengths, finished = candidates
    inside = np.arange(tokens.shape[-1]) < lengths[..., None]
    masked = np.where(inside, tokens, -1)
    return np.stack(
        [
            (masked[i] != masked[j]).any(-1) & ((finished[i] & finished[j]) | (not unfinished_loses))
            for i, j in all_pairs(len(tokens))
        ]
    )


def choose_by_rewards(
    rule: str, rewards: Float[np.ndarray, "C B"], informative: Bool[np.ndarray, "N B"]
) -> Int[np.ndarray, " B"]:
    """Return the pair of each prompt by a rule of `REWARDED`, before anything is judged.

    Pairs that are not informative are left out; where all are, the first pair is chosen.

    Args:
      rewards: the policy's implicit rewards, nats.
      informative: by pair.
    """
    pairs = np.array(all_pairs(len(rewards)))
    first, second = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
    with_second = (pairs[:, 1] == 1)[:, None]
    rank = np.abs(first - second) if rule == "uncertain" else np.where(with_second, -first, np.inf)
    return np.argmin(np.where(informative, rank, np.inf), axis=0)


def choose_by_scores(rule: str, scores: Float[np.ndarray, "C B"]) -> Int[np.ndarray, " B"]:
    """Return the pair of each prompt by a rule of `SCORED` that takes one pair.

    Args:
      scores: -inf for a candidate that loses without being judged, nan for one without a score, which is chosen only
        where fewer than two have one.
    """
    pairs = all_pairs(len(scores))
    index = {frozenset(pair): number for number, pair in enumerate(pairs)}
    position = {"best_worst": 0.0, "best_quantile": QUARTILE}[rule]

    def one(column: np.ndarray) -> int:
        scored = np.flatnonzero(~np.isnan(column))
        if len(scored) < 2:
            return 0
        best = scored[np.argmax(column[scored])]
        rest = [number for number in scored if number != best]
        rest.sort(key=lambda number: column[number])  # stable
        return index[frozenset((int(best), int(rest[int(position * (len(scored) - 1))])))]

    return np.array([one(column) for column in scores.T], np.int64)


class Chosen(NamedTuple):
    """Pairs in the place of prompts: M for each prompt, next to each other.

    prompts: B M rows; the position of a pair is that of its prompt, times M, plus its number.
    samples: the first and the second one of each pair. numbers: i[B M 2], of these two. rows: i[B M], of the prompt.
    """

    prompts: Prompts
    samples: tuple[Samples, Samples]
    numbers: np.ndarray
    rows: np.ndarray


def take_pairs(prompts: Prompts, candidates: Candidates, chosen: Int[np.ndarray, "B M"]) -> Chosen:
    """Return the pairs that were chosen.

    Args:
      chosen: indices into `all_pairs`.
    """
    B, M = chosen.shape
    pairs = np.array(all_pairs(len(candidates.tokens)))[chosen.ravel()]  # [B M, 2]
    rows = np.repeat(np.arange(B), M)

    def one(side: int) -> Samples:
        return Samples(*(x[pairs[:, side], rows] for x in candidates))

    repeated = Prompts(
        rows=tuple(prompts.rows[row] for row in rows),
        messages=tuple(prompts.messages[row] for row in rows),
        tokens=prompts.tokens[rows],
        lengths=prompts.lengths[rows],
        position=np.asarray(prompts.position)[rows] * M + np.tile(np.arange(M, dtype=np.int32), B),
        valid=prompts.valid[rows],
    )
    return Chosen(repeated, (one(0), one(1)), pairs, rows)
