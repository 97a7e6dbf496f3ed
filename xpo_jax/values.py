"""The values that flow through the project.

Dimension legend, used in every annotation:

    B prompts          P prompt tokens     T response tokens   S candidates (0 policy's, 1 reference's)
    V vocabulary       D width             L layers            F feed-forward
    N query heads      K key-value heads   H head size         C candidates that share a prompt's keys and values
    R packed rows      W slots of a row    G shards of rows    U scored slots of a shard   Q results of a shard

Nothing here computes. Imports point one way, main -> train -> parts -> values, so this module imports none of the
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

Array = Any  # jax.Array on the devices, np.ndarray on the host; the docstrings say which dtype and shape
Params = Any  # a nested dict of arrays, the pure-dict form of an nnx State


class Message(TypedDict):
    """One turn of a conversation.

    role: "system", "user", "assistant", or another that the model's chat template renders.
    content: text; empty only beside tool_calls, or where a tool returned nothing.
    tool_calls: of an assistant's turn. tool_call_id, name: of a tool's turn.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Prompts(NamedTuple):
    """One batch of prompts.

    rows: the raw rows, as the source gave them.
    messages: the conversation of each row, ending with the user's turn.
    tokens: i32[B P], right-padded.
    lengths: i32[B], tokens.
    position: i32[B], position in the global batch; the random keys are derived from it.
    valid: bool[B]; False marks a padding row of a partial batch.
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
    """What a judge sees of one pair.

    messages: the conversation, ending with the user's turn (or a tool's).
    row: the row of the data file.
    a, b: the two answers in the order shown, which is drawn; neither is known to be the policy's.
    """

    messages: Sequence[Message]
    row: Mapping[str, Any]
    a: str
    b: str


class Candidate(NamedTuple):
    """One answer, as a judge that scores answers by themselves sees it; `messages` and `row` as in `Comparison`."""

    messages: Sequence[Message]
    row: Mapping[str, Any]
    text: str


class Verdict(NamedTuple):
    """A judge's answer with its reasons.

    p: probability that A is better, in [0, 1]; None for no verdict.
    reason: free text for the log.
    scores: named values for the log, for example {"a": 0.7, "b": 0.2}. Two names have a meaning: "queries", an integer,
      is how many queries this verdict took, if not one; "disagreement", a number, is 0 where all who were asked agreed.
    """

    p: float | None
    reason: str = ""
    scores: Mapping[str, Any] = {}


Answer = str | float | Verdict | None  # of a judge to one comparison, see judges/contract.py


class Verdicts(NamedTuple):
    """A judge's verdicts on a batch of B pairs, translated from A and B to policy and reference.

    p_first: f32[B] in [0, 1]; 1 where the policy's response won, 0.5 for a tie.
    weight: f32[B]; 0 where there is no verdict, else 1.
    reasons, scores: one per row, for the log; scores name "policy" and "reference".
    shown: per row the candidates shown as A and B, (0, 1) or (1, 0), in the first order if both were asked; None
      where the judge was not asked.
    flipped: f32[B]; 1 where the hard preferences of the two orders differ, 0 where not, nan where there are no two.
    queries: put to the judge: one for a comparison, unless its scores state their number; both orders counted apart.
    orders: 2 where both orders of each pair were asked, else 1.
    fatal_error: why the run must end, or "".
    counts: by how much the judge's `stats` increased, by name.
    """

    # long: a record, built by name in one place
    p_first: np.ndarray
    weight: np.ndarray
    reasons: tuple[str, ...]
    scores: tuple[Mapping[str, Any], ...]
    shown: tuple[tuple[int, int] | None, ...]
    flipped: np.ndarray
    queries: int
    orders: int
    fatal_error: str = ""
    counts: Mapping[str, float] = {}


class RecordedVerdict(NamedTuple):
    """A verdict that a run was given before it was interrupted, as its pairs log holds it.

    verdict: p is the probability that the policy's response is better; scores name policy and reference.
    shown: see `Verdicts`.
    flipped: None where it was not asked in both orders.
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
