"""Two files of answers, compared by a judge."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.data.answer_files import Answered, read_answers
from xpo_jax.data.turns import Rules
from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.statistics import Rate
from xpo_jax.judges import ask, contract, limits
from xpo_jax.judges.thinking import without_thinking
from xpo_jax.reporting.summary import progress
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Prompts

from ..judge import load_judge

BATCH = 64  # comparisons per call of the judge
Findings = dict[str, Any]  # what is printed, by name
Rows = Sequence[Mapping[str, Any]]  # what --out gets


class Pair(NamedTuple):
    """Two answers to one prompt.

    Attributes:
      prompt: its number among the prompts that both files answer.
      answered: the conversation.
      first, second: the answers.
    """

    prompt: int
    answered: Answered
    first: str
    second: str


class Judged(NamedTuple):
    """The verdict on a pair.

    Attributes:
      win: 1 if the first answer wins, 0.5 for a tie, 0 if it loses; nan without a verdict.
      p_first: the probability that the first is better, None without a verdict.
      shown: which answers were shown as A and B; None if the judge was not called.
      reason, scores: of the judge.
    """

    win: float
    p_first: float | None
    shown: Any
    reason: Any
    scores: Any


def compare_answers(config: ConfigDict, first: str, second: str) -> tuple[Findings, Rows]:
    """Compare two files of answers.

    Raises:
      ValueError: no prompt is answered in both files, a prompt that the judge cannot take, or a judge that fails.
    """
    configs.check(settings.Experiment, config, "config")
    judging = configs.build(settings.Judging, config.judging, "judging")
    columns = {name: config.data[name] for name in ("template", "column", "rename")}
    rules = Rules(config.data.on_extra_keys, config.data.on_assistant_last)
    files = [read_answers(path, **columns, rules=rules) for path in (first, second)]
    names = [name for name in files[0] if name in files[1]]
    left_out = len(files[0]) + len(files[1]) - 2 * len(names)
    if not names:
        raise ValueError(
            f"{first} and {second}: no prompt is answered in both; each row must hold its prompt in the same form"
        )
    if left_out:
        print(f"{left_out} prompts are answered in only one of the files and are left out", file=sys.stderr)
    judge = load_judge(config, "judge" if config.evaluation.judge is None else "evaluation.judge")
    _check(judge, [files[0][name] for name in names])
    pairs = [
        Pair(number, files[0][name], a, b)
        for number, name in enumerate(names)
        for a in files[0][name].answers
        for b in files[1][name].answers
    ]
    verdicts, queries = _judge(judge, pairs, judging, config.seed)
    wins, lengths = [], []
    for number in range(len(names)):
        indices = [i for i, pair in enumerate(pairs) if pair.prompt == number]
        wins.append(np.array([verdicts[i].win for i in indices]))
        lengths.append(np.array([float(len(pairs[i].first) - len(pairs[i].second)) for i in indices]))
    rates = {
        "win_rate": statistics.win_rate(wins),
        "win_rate_controlled": statistics.length_controlled(wins, lengths),
    }
    findings = {
        "prompts": len(names),
        "left_out": left_out,
        "queries": queries,
        **flat(rates),
        "first": _side(judge, [files[0][name] for name in names], judging.hide_thinking),
        "second": _side(judge, [files[1][name] for name in names], judging.hide_thinking),
    }
    return findings, _rows(pairs, verdicts, wins)


def _check(judge: Any, prompts: Sequence[Answered]) -> None:
    """Check the prompts with the judge's own check, if it has one."""
    for prompt in prompts:
        try:
            contract.check(judge, prompt.messages, prompt.row.values)
        except ValueError as error:
            raise ValueError(f"{prompt.row.at}: {error}") from error


def _judge(
    judge: Any, pairs: Sequence[Pair], judging: settings.Judging, seed: int
) -> tuple[list[Judged], int]:
    """Return the verdict on every pair, and the number of queries."""
    failure_tolerance = limits.FailureTolerance(**judging.failure_tolerance)
    verdicts: list[Judged] = []
    queries = 0
    for start in progress(range(0, len(pairs), BATCH), "judging"):
        batch = pairs[start : start + BATCH]
        result = ask.ask(
            judge,
            _prompts([pair.answered for pair in batch]),
            ask.ResponsePairs(
                policy=[pair.first for pair in batch],
                reference=[pair.second for pair in batch],
                identical=np.array([pair.first == pair.second for pair in batch]),
                policy_finished=np.ones(len(batch), bool),
                reference_finished=np.ones(len(batch), bool),
            ),
            unfinished_loses=False,
            both_orders=judging.both_orders,
            hide_thinking=judging.hide_thinking,
            shown_seed=(seed, Stream.EVALUATION, start),
        )
        failure_tolerance.check([ask.summarize_call(result)])
        queries += result.queries
        valid = result.weight > 0
        wins = np.where(valid, ask.wins(result.p_first), np.nan)
        p_first = [float(p) if v else None for p, v in zip(result.p_first, valid, strict=True)]
        columns = zip(wins, p_first, result.shown, result.reasons, result.scores, strict=True)
        verdicts += [Judged(float(win), *rest) for win, *rest in columns]
    return verdicts, queries


def _rows(pairs: Sequence[Pair], verdicts: Sequence[Judged], wins: Sequence[np.ndarray]) -> Rows:
    """Return the first pair of each prompt with its verdict."""
    rows = []
    for number, prompt_wins in enumerate(wins):
        at = next(i for i, pair in enumerate(pairs) if pair.prompt == number)
        pair, verdict = pairs[at], verdicts[at]
        rows.append(
            {
                "prompt": pair.answered.messages[-1]["content"],
                "reference": pair.second,
                "policy": pair.first,
                "win_share": statistics.win_share(prompt_wins),
                "p_policy": verdict.p_first,
                "shown": None if verdict.shown is None else "AB"[verdict.shown.index(0)],
                "reason": verdict.reason,
                "scores": verdict.scores,
            }
        )
    return rows


def _side(judge: Any, answered: Sequence[Answered], hide_thinking: bool) -> dict[str, float]:
    """Return the measures of one file's answers: means over prompts of the means over a prompt's answers."""
    means: dict[str, list[float]] = {}
    for prompt in answered:
        measures: dict[str, list[float]] = {"characters": [float(len(text)) for text in prompt.answers]}
        for text in prompt.answers:
            read = without_thinking(text) if hide_thinking else text
            for name, value in contract.measure(judge, prompt.messages, read).items():
                if isinstance(value, int | float):
                    measures.setdefault(name, []).append(float(value))
        for name, values in measures.items():
            means.setdefault(name, []).append(float(np.mean(values)))
    firsts = [prompt.answers[0] for prompt in answered]
    variety = {f"distinct_{n}": statistics.distinct(firsts, n) for n in (1, 2)}
    return {name: float(np.mean(values)) for name, values in means.items()} | variety


def _prompts(answered: Sequence[Answered]) -> Prompts:
    """Return the prompts as `ask.ask` takes them; nothing is sampled, so there are no tokens."""
    size = len(answered)
    return Prompts(
        tuple(prompt.row.values for prompt in answered),
        tuple(prompt.messages for prompt in answered),
        np.zeros((size, 0), np.int32),
        np.zeros(size, np.int32),
        np.arange(size, dtype=np.int32),
        np.ones(size, bool),
    )


def flat(rates: Mapping[str, Rate]) -> dict[str, float]:
    """Return {NAME, NAME_low, NAME_high} of all rates."""
    ends = ("", "_low", "_high")
    return {
        f"{name}{end}": value for name, rate in rates.items() for end, value in zip(ends, rate, strict=True)
    }
