"""The values that flow through the project, and the protocols of the parts that users bring.

Dimension legend, used in every annotation:

    B prompts          P prompt tokens     T response tokens   S candidates (0 policy's, 1 reference's)
    V vocabulary       D width             L layers            N query heads
    K key-value heads  H head size         F feed-forward

Nothing here computes. Imports point one way, main -> train -> parts -> values, so this module
imports none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np

Array = Any  # jax.Array on the devices, np.ndarray on the host; the docstrings say which dtype and shape
Params = Any  # a nested dict of arrays, the pure-dict form of an nnx State


class Message(TypedDict):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


class Prompts(NamedTuple):
    """One batch of prompts.

    rows: the raw rows, as the source gave them.
    messages: the conversation of each row, ending with the user's turn.
    tokens: i32[B P], right-padded.
    lengths: i32[B], tokens.
    position: i32[B], position in the global batch; the random keys are derived from it.
    real: bool[B]; False marks a row that only fills up a part batch.
    """

    rows: tuple[Mapping[str, Any], ...]
    messages: tuple[Sequence[Message], ...]
    tokens: Array
    lengths: Array
    position: Array
    valid: Array


class Samples(NamedTuple):
    """One response per prompt.

    tokens: i32[B T], right-padded with the pad token.
    lengths: i32[B], tokens, counting the first end token.
    finished: bool[B]; True where an end token was drawn.
    """

    tokens: Array
    lengths: Array
    finished: Array


class Comparison(NamedTuple):
    """What a judge sees of one pair. `a` and `b` are in the order shown, not policy and reference."""

    messages: Sequence[Message]
    row: Mapping[str, Any]
    a: str
    b: str


class Verdict(NamedTuple):
    """A judge's answer with its reasons.

    p: probability that A is better, in [0, 1]; None for no verdict.
    reason: free text for the log.
    scores: named numbers for the log, for example {"a": 0.7, "b": 0.2}.
    """

    p: float | None
    reason: str = ""
    scores: Mapping[str, Any] = {}


Answer = str | float | Verdict | None
Judge = Callable[[Sequence[Comparison]], Sequence[Answer]]


@runtime_checkable
class DeviceJudge(Protocol):
    """A judge that runs a model on the devices; one that has all of this is taken for such.

    collective: True; where there are several processes, all ask it the same comparisons in the same order.
    """

    collective: bool

    def __call__(self, comparisons: Sequence[Comparison]) -> Sequence[Answer]:
        """As any judge."""
        ...

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Called first: the mesh, the policy's starting model, and what to compute in. Nothing is loaded yet."""
        ...

    def declared_programs(self) -> Sequence[tuple[str, Callable[[], object]]]:
        """Its compilations, as `programs.Programs.declared_programs` gives the run's."""
        ...

    def load(self, starting: Params | None) -> None:
        """Called last: take the policy's starting weights, as the sampler holds them, or read what it needs.

        `starting` is None where the run does not hold them any longer than it must.
        """
        ...


class Verdicts(NamedTuple):
    """The judge's answers for a batch, translated back to policy and reference.

    p_first: f32[B] in [0, 1]; 1 where the policy's sample won, 0.5 a tie.
    weight: f32[B]; 0 where there is no verdict.
    queries: how many comparisons the judge was asked; both orders of a pair are two.
    reasons, scores: one entry per row, for the log; scores name "policy" and "reference".
    shown: per row the candidates shown as A and B, (0, 1) or (1, 0), of both orders the first; None where the
      judge was not asked.
    flipped: f32[B]; 1 where the two orders' hard preferences differ, 0 where not, nan where there are no two.
    refused: why the run must end, or "": an answer that is a mistake in a program.
    counts: what the judge's `stats`, if it has any, counted meanwhile; by name.
    """

    p_first: np.ndarray
    weight: np.ndarray
    queries: int
    reasons: tuple[str, ...]
    scores: tuple[Mapping[str, Any], ...]
    shown: tuple[tuple[int, int] | None, ...]
    flipped: np.ndarray
    refused: str
    counts: Mapping[str, float] = {}


class RecordedVerdict(NamedTuple):
    """A verdict that a run was given before it was interrupted, as its pairs log holds it.

    verdict: p is that the policy's sample wins; scores name policy and reference.
    shown: see `Verdicts`. flipped: None where it was not asked in both orders.
    """

    verdict: Verdict
    shown: tuple[int, int]
    flipped: float | None


class Pairs(NamedTuple):
    """What the update learns from.

    prompt_tokens: i32[B P], prompt_lengths: i32[B].
    tokens: i32[S B T], lengths: i32[S B]: both responses.
    ref_logps: f32[S B], the reference's log-probability of each response, nats, summed over tokens.
    p_first, weight: f32[B], see Verdicts.
    real: bool[B].
    """

    prompt_tokens: Array
    prompt_lengths: Array
    tokens: Array
    lengths: Array
    ref_logps: Array
    p_first: Array
    weight: Array
    valid: Array


class TrainState(NamedTuple):
    """What training changes.

    step: i32[], updates applied or skipped so far; with replay there are several in a round of samples.
    skipped: i32[], updates skipped because a loss or gradient was not finite.
    params: float32 master weights.
    opt_state: the optax state.
    """

    step: Array
    skipped: Array
    params: Params
    opt_state: Any
