"""What a run prints for people, and its result in one object."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from xpo_jax.algorithm.programs import Programs
from xpo_jax.evaluation.evaluator import Evaluation
from xpo_jax.reporting.metrics import summary_table, text_table
from xpo_jax.runtime import distributed

# The columns of the console's table, the most important first; a narrow terminal shows fewer.
CONSOLE = (
    "judge/win_rate",
    "judge/tie_rate",
    "judge/queries",
    "rewards/margins",
    "objective/kl",
    "loss/dpo",
    "loss/xpo",
    "objective/entropy",
    "tokens_per_second",
)


def opening(programs: Programs, rows: Mapping[str, Any], *, compilations: int) -> str:
    """What is about to happen: the caller's `rows`, with devices, sizes and compilations."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in programs.mesh.shape.items())
    return summary_table(
        {
            **rows,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}; mesh {mesh}",
            "parameters": f"{programs.parameters:,}, computing in {programs.dtype.name}",
            "widths": f"prompts {programs.prompt_buckets} tokens; rows of the update {programs.pack.widths}",
            "compilations": f"{compilations}, all before the first step",
        }
    )


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A bar with the time left on standard error; one line where that is no terminal. Process 0 shows it."""
    if not distributed.is_lead_process():
        return items
    if not sys.stderr.isatty():
        print(f"{label} ...", file=sys.stderr, flush=True)
    return tqdm(items, desc=label, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


def sentence(when: str, found: Evaluation) -> str:
    """One line about an evaluation."""
    valid = f", valid {found.policy['valid']:.1%}" if "valid" in found.policy else ""
    interval = f"[{found.low:.1%}, {found.high:.1%}]"
    even = f", at equal lengths {found.controlled.mean:.1%}"
    return f"{when}: held-out win rate {found.win_rate:.1%} {interval}{even}{valid}, KL {found.kl:.2f}"


def some(found: Evaluation, seed: int) -> list[Mapping[str, Any]]:
    """Ten of an evaluation's samples at most, the same prompts each time."""
    return random.Random(seed).sample(list(found.samples), min(10, len(found.samples)))


def closing(before: Evaluation, after: Evaluation, shown: Sequence[Mapping[str, Any]]) -> str:
    """The final tables: some prompts with the answers of reference and policy, and the figures."""
    samples = [[row["prompt"], row["reference"], row["policy"], row["win_share"]] for row in shown]
    figures: list[tuple[str, float | None, float, float]] = [
        ("win rate", 0.5, before.win_rate, after.win_rate),
        ("at equal lengths", 0.5, before.controlled.mean, after.controlled.mean),
    ]
    if before.against_answers is not None and after.against_answers is not None:
        figures.append(("against the answers", None, before.against_answers.mean, after.against_answers.mean))
    figures += [("KL", 0.0, before.kl, after.kl), ("entropy", None, before.entropy, after.entropy)]
    for name in ("valid", "copy", "score", "distance", "tokens", "unfinished", "distinct_2"):
        if name in after.policy:
            figures.append((name, after.reference[name], before.policy[name], after.policy[name]))
    return "\n\n".join(
        [
            text_table(["prompt", "before (reference)", "after (policy)", "won"], samples),
            text_table(["held out", "reference", "policy before", "policy after"], figures),
        ]
    )


def result(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """The part of the last line that the evaluations give; None for what the judge does not tell."""
    return {
        "win_rate": after.win_rate,
        "win_rate_low": after.low,
        "win_rate_high": after.high,
        "win_rate_controlled": after.controlled.mean,
        "win_rate_controlled_low": after.controlled.low,
        "win_rate_controlled_high": after.controlled.high,
        **({} if after.against_answers is None else {"win_rate_answers": after.against_answers.mean}),
        "win_rate_before": before.win_rate,
        "win_rate_before_low": before.low,
        "win_rate_before_high": before.high,
        "valid": after.policy.get("valid"),
        "valid_reference": after.reference.get("valid"),
        "copy_rate": after.policy.get("copy"),
        "copy_rate_reference": after.reference.get("copy"),
        "copy_rate_half_interval": after.intervals.get("copy"),
        "kl": after.kl,
        "kl_per_token": after.kl_per_token,
        "entropy": after.entropy,
    }
