"""Try a judge on comparisons of your own, before a run depends on it.

    python -m tools.judge --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [--once] [--rows=N] comparisons.jsonl

The judge is the config's (`judge`), asked as in a run, except that every row is asked in both orders: A and B as in the
file, and swapped. --once asks in the file's order only, at half the cost.

Each line of the file is one comparison, an object with
  "a", "b"    the two answers, texts
  "messages"  the conversation, or
  "prompt"    its only turn, a text; without both, the config's data.template is filled from the row's columns
  "gold"      the correct verdict, if known: "A", "B", "tie", or a float, the probability that A is better
All columns together are the row that the judge sees.

The tool prints the first N rows (20) with their verdicts; how many were won by A, by B, tied and failed; how often the
order changed the verdict; how often the verdict is the gold one, with and without ties; and comparisons per second. The
last line is one JSON object.

Examples:
  python -m tools.judge --config=paraphrase comparisons.jsonl
  python -m tools.judge --config=my_config.py --config.judge.temperature=0.5 --rows=100 comparisons.jsonl
  python -m tools.judge --config=my_config.py --once comparisons.jsonl

Exit status: 0 done, 2 invalid input (one line says what to fix), 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.data import conversations, templates, validate
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.io.streams import print_json
from xpo_jax.io.text import one_line, shorten, visible
from xpo_jax.judges import answers, contract
from xpo_jax.judges.contract import DeviceJudge, HasProbe, HasStats, Judge
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.reporting.console import text_table
from xpo_jax.runtime import sharding
from xpo_jax.values import Comparison, Message

from .cli import Parser, as_called, exit_status

NAMES = {1.0: "A", 0.5: "tie", 0.0: "B"}


def load_judge(config: ConfigDict, where: str = "judge") -> Judge:
    """Build a judge as a run does; compile and load one that runs on the devices.

    Args:
      config: of the run.
      where: the group that names the judge, "judge" or "evaluation.judge".
    """
    judge: Judge = make_judge(config.judge if where == "judge" else config.evaluation.judge, where)
    if isinstance(judge, HasProbe):
        judge.probe()
    if isinstance(judge, DeviceJudge):
        model = configs.build(settings.Model, config.model, "model")
        folder = hub.find(model.path).folder
        model_config = model_folder.read_config(folder)
        mesh = configs.build(sharding.make_mesh, config.mesh, "mesh")
        judge.attach(
            mesh=mesh,
            folder=folder,
            model_config=model_config,
            tokenizer=model_folder.load_tokenizer(folder, model_config),
            dtype=compute_dtype(model.dtype, sharding.platform(mesh)),
        )
        for label, compile_program in judge.declared_programs():
            print(f"compiling {label} ...", file=sys.stderr, flush=True)
            compile_program()
        judge.load(None)
    return judge


def conversation(row: Row, template: Any) -> Sequence[Message]:
    """Return the conversation of a row.

    Raises:
      DataError: it has none.
    """
    if "messages" in row.values:
        filled, what = row.values["messages"], "column 'messages'"
    elif "prompt" in row.values:
        filled, what = row.values["prompt"], "column 'prompt'"
    elif template is None:
        raise DataError(f"{row.at}: no column 'messages' or 'prompt', and the config has no data.template")
    else:
        filled, what = templates.fill(template, row), "the filled template"
    return conversations.as_messages(conversations.parse(filled, row.at, what))


def comparison(row: Row, template: Any) -> Comparison:
    """Return the comparison of a row.

    Raises:
      DataError: it is not one; the message names file and row.
    """
    texts = [
        conversations.answer(validate.column(row, name), row.at, f"column {name!r}") for name in ("a", "b")
    ]
    return Comparison(conversation(row, template), row.values, *texts)


def gold(row: Row) -> float | None:
    """Return the gold preference of a row, 1 for A; None if it has none."""
    value = row.values.get("gold")
    if value is None:
        return None
    try:
        p = answers.parse(value).p
    except contract.JudgeError:
        p = None
    if p is None:
        raise DataError(
            f"{row.at}: gold is {value!r}; write 'A', 'B', 'tie', or the probability that A is better, with a decimal"
            " point (1.0)"
        )
    return preference(p)


def preference(p: float) -> float:
    """Return 1 if A is preferred, 0 if B is, 0.5 for a tie."""
    return float(0.5 + 0.5 * np.sign(p - 0.5))


def summary(judged: Sequence[answers.Judged], golds: Sequence[float | None]) -> dict[str, Any]:
    """Return counts, and rates, which are None where there is nothing to count."""
    preferences = [None if v.p is None else preference(v.p) for v, _ in judged]
    flips = [flip for _, flip in judged if flip is not None]
    compared = [pair for pair in zip(preferences, golds, strict=True) if None not in pair]
    without_ties = [pair for pair in compared if 0.5 not in pair]

    def rate(outcomes: Sequence[bool]) -> float | None:
        return sum(outcomes) / len(outcomes) if outcomes else None

    return {
        "comparisons": len(judged),
        "a": preferences.count(1.0),
        "b": preferences.count(0.0),
        "ties": preferences.count(0.5),
        "failed": preferences.count(None),
        "position_flip_rate": rate(flips),
        "gold": len(compared),
        "agreement": rate([verdict == gold for verdict, gold in compared]),
        "agreement_without_ties": rate([verdict == gold for verdict, gold in without_ties]),
    }


def row_cells(number: int, judged: answers.Judged, gold: float | None) -> list[Any]:
    """Return a row of the table."""
    p, reason, _ = judged.verdict
    return [
        number,
        "failed" if p is None else NAMES[preference(p)],
        "" if p is None else f"{p:.3f}",
        {None: "", True: "flipped", False: ""}[judged.flipped],
        "" if gold is None else NAMES[gold],
        shorten(visible(one_line(reason)), 90),
    ]


def run(argv: Sequence[str]) -> int:
    """Ask the judge, print the results, and return the exit status."""
    parser = Parser(prog="python -m tools.judge", description=None)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("file")
    tool_argv, config_argv = split_arguments(argv)
    options = parser.parse_args(tool_argv)
    arguments = configs.split_argv(config_argv)
    config = configs.load(str(arguments.spec), arguments.overrides)
    configs.check(settings.Experiment, config, "config")
    # read first what takes no time, so that errors in it come before a model is loaded
    rows = list(read_rows(options.file))
    template = config.data.get("template")
    comparisons = [comparison(row, template) for row in rows]
    golds = [gold(row) for row in rows]
    judge = load_judge(config)
    for row, pair in zip(rows, comparisons, strict=True):
        try:
            contract.check(judge, pair.messages, pair.row)
        except ValueError as error:
            raise ValueError(f"{row.at}: {error}") from error
    started = time.monotonic()
    judged = answers.compare(judge, comparisons, both_orders=not options.once)
    seconds = time.monotonic() - started
    table = list(map(row_cells, range(1, options.rows + 1), judged, golds))
    print(text_table(["row", "verdict", "p", "order", "gold", "reason"], table))
    orders = 1 if options.once else 2
    queries = sum(answers.query_count(one.verdict.scores, otherwise=orders) for one in judged)
    results = summary(judged, golds) | {
        "queries": queries,
        "seconds": round(seconds, 3),
        "queries_per_second": round(queries / max(seconds, 1e-9), 2),
    }
    stats = judge.stats() if isinstance(judge, HasStats) else {}
    results |= {f"judge/{name}": number for name, number in stats.items()}
    print()
    print(
        text_table(
            ["result", "value"], [[name, "" if value is None else value] for name, value in results.items()]
        )
    )
    print_json(results)
    return 0


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the tool's arguments and those of the config."""
    tool: list[str] = []
    config: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config"):
            tool.append(argument)
            continue
        config.append(argument)
        if "=" not in argument and rest:
            config.append(rest.pop(0))
    return tool, config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0
    return exit_status("judge", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
