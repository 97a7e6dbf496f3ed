"""What a run prints at its start and end, and the evaluations' part of its result."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from xpo_jax.algorithm.programs import Programs
from xpo_jax.evaluation.result import Evaluation
from xpo_jax.models.attention_kernels import Kernels
from xpo_jax.reporting import console
from xpo_jax.runtime import distributed

T = TypeVar("T")

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


def start_table(programs: Programs, fields: Mapping[str, Any], *, compilations: int) -> str:
    """Return what a run prints first: `fields`, then devices, sizes and compilations."""
    model = programs.model
    mesh = ", ".join(f"{axis} {size}" for axis, size in model.mesh.shape.items())
    prompts, rows = programs.shapes.prompt_buckets, programs.packer.widths
    return console.field_table(
        {
            **fields,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}; mesh {mesh}",
            "parameters": f"{model.parameters:,}, computing in {model.dtype.name}"
            + (f"; {model.trained_parameters:,} are trained beside them" if model.frozen else ""),
            "sequence lengths": f"prompts {prompts} tokens; rows of the update {rows}",
            "attention": attention_used(model.kernels, (*prompts, *rows)),
            "compilations": f"{compilations}, all before the first step",
        }
    )


def attention_used(kernels: Kernels, lengths: Iterable[int]) -> str:
    """Return which implementation computes the attention of a run's sequence lengths: "einsum", or one for each."""
    used: dict[str, list[int]] = {}
    for tokens in sorted(set(lengths)):
        used.setdefault(kernels.at(tokens), []).append(tokens)
    if len(used) == 1:
        return next(iter(used))
    return "; ".join(f"{name} at {', '.join(map(str, tokens))} tokens" for name, tokens in used.items())


def progress(items: Iterable[T], label: str) -> Iterable[T]:
    """Iterate with a progress bar, see `console.progress`; of many processes, only process 0 shows it."""
    return console.progress(items, label) if distributed.is_lead_process() else items


def warn(problem: str, when: str) -> None:
    """Print a problem as one line on standard error, on process 0; nothing if it is empty."""
    if problem and distributed.is_lead_process():
        print(f"xpo_jax: warning: {when} {problem}", file=sys.stderr, flush=True)


def evaluation_line(when: str, evaluation: Evaluation) -> str:
    """Return one line about an evaluation."""
    valid = f", valid {evaluation.policy['valid']:.1%}" if "valid" in evaluation.policy else ""
    interval = f"[{evaluation.low:.1%}, {evaluation.high:.1%}]"
    controlled = f", at equal lengths {evaluation.controlled.mean:.1%}"
    rate = f"held-out win rate {evaluation.win_rate:.1%} {interval}{controlled}"
    return f"{when}: {rate}{valid}, KL {evaluation.kl:.2f}"


def example_samples(evaluation: Evaluation, seed: int) -> list[Mapping[str, Any]]:
    """Return at most ten of an evaluation's samples, those of the same prompts each time."""
    return random.Random(seed).sample(list(evaluation.samples), min(10, len(evaluation.samples)))


def end_tables(before: Evaluation, after: Evaluation, examples: Sequence[Mapping[str, Any]]) -> str:
    """Return what a run prints at its end: example prompts with both answers, and the metrics before and after."""
    answers = [[row["prompt"], row["reference"], row["policy"], row["win_share"]] for row in examples]
    metrics: list[tuple[str, float | None, float, float]] = [
        ("win rate", 0.5, before.win_rate, after.win_rate),
        ("at equal lengths", 0.5, before.controlled.mean, after.controlled.mean),
    ]
    if before.against_answers is not None and after.against_answers is not None:
        metrics.append(("against the answers", None, before.against_answers.mean, after.against_answers.mean))
    metrics += [("KL", 0.0, before.kl, after.kl), ("entropy", None, before.entropy, after.entropy)]
    for name in ("valid", "copy", "score", "distance", "tokens", "unfinished", "distinct_2"):
        if name in after.policy:
            metrics.append((name, after.reference[name], before.policy[name], after.policy[name]))
    return "\n\n".join(
        [
            console.text_table(["prompt", "before (reference)", "after (policy)", "won"], answers),
            console.text_table(["held out", "reference", "policy before", "policy after"], metrics),
        ]
    )


def result_fields(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return the evaluations' part of result.json; None for what the judge does not report."""
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
