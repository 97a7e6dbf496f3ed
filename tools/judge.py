"""Try a judge on comparisons of yours, before a run depends on it.

    python -m tools.judge --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [--once] [--rows=N] comparisons.jsonl

The judge is the config's (`judge`), asked as a run would ask it, but of every row in both orders: A and B as they
stand, and exchanged. --once asks in the order that stands there only, for half the price.

Each line of the file is one comparison, an object with
  "a", "b"    the two answers, texts
  "messages"  the conversation, or
  "prompt"    its only turn, a text; without both, the config's data.template is filled from the row's columns
  "gold"      what is right, if you know it: "A", "B", "tie", or a float, the probability that A is better
Whatever else stands there is the row that the judge sees.

Printed are the first N rows (20) with their verdicts, then how many were won by A, by B, tied and failed; how often the
order shown changed the verdict; how often it is the gold one, ties among them and without them; and comparisons
per second. The last line is one JSON object.

Examples:
  python -m tools.judge --config=configs/paraphrase.py comparisons.jsonl
  python -m tools.judge --config=my_config.py --config.judge.temperature=0.5 --rows=100 comparisons.jsonl
  python -m tools.judge --config=my_config.py --once comparisons.jsonl

Exit status: 0 done, 2 something to mend (one line says what), 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tools.cli import Parser, exit_status
from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.data import templates, validate
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.experiment.setup import make_judge
from xpo_jax.io.files import to_json
from xpo_jax.io.text import one_line, shorten, visible
from xpo_jax.judges import answers, contract
from xpo_jax.judges.contract import DeviceJudge, HasCheck, HasProbe, HasStats, Judge
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.reporting.console import text_table
from xpo_jax.runtime import sharding
from xpo_jax.values import Comparison, Message

NAMES = {1.0: "A", 0.5: "tie", 0.0: "B"}


def ready(config: ConfigDict) -> Judge:
    """The config's judge, as a run makes it; one that needs devices is compiled and loaded."""
    judge: Judge = make_judge(config.judge, "judge")
    if isinstance(judge, HasProbe):
        judge.probe()
    if isinstance(judge, DeviceJudge):
        model = configs.build(settings.Model, config.model, "model")
        folder = hub.find(model.path).folder
        model_config = model_folder.read_config(folder)
        judge.attach(
            mesh=configs.build(sharding.make_mesh, config.mesh, "mesh"),
            folder=folder,
            model_config=model_config,
            tokenizer=model_folder.load_tokenizer(folder, model_config),
            dtype=compute_dtype(model.dtype),
        )
        for what, compile_program in judge.declared_programs():
            print(f"compiling {what} ...", file=sys.stderr, flush=True)
            compile_program()
        judge.load(None)
    return judge


def conversation(row: Row, template: Any) -> Sequence[Message]:
    """What was asked in a row."""
    if "messages" in row.values:
        return validate.conversation(row.values["messages"], row.at, "column 'messages'")
    if "prompt" in row.values:
        filled: Any = validate.text(row.values["prompt"], row.at, "column 'prompt'")
    elif template is None:
        raise DataError(f"{row.at}: no column 'messages' or 'prompt', and the config has no data.template")
    else:
        filled = templates.fill(template, row)
    return (Message(role="user", content=filled),) if isinstance(filled, str) else filled


def comparison(row: Row, template: Any) -> Comparison:
    """One comparison; ValueError, with file and row, where it is none."""
    texts = [validate.column(row, name) for name in ("a", "b")]
    for name, text in zip(("a", "b"), texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{row.at}: column {name!r} must be a text, found {text!r}")
    return Comparison(conversation(row, template), row.values, *texts)


def gold(row: Row) -> float | None:
    """The hard preference that is right, 1 for A; None where nobody says it."""
    given = row.values.get("gold")
    if given is None:
        return None
    try:
        found = answers.parse(given)
    except contract.JudgeError:
        found = None
    if found is None or found.p is None:
        raise DataError(
            f"{row.at}: gold is {given!r}; write 'A', 'B', 'tie', or a probability with its point (1.0) that A is"
            " better"
        )
    return preference(found.p)


def preference(p: float) -> float:
    """1 where A is preferred, 0 where B is, 0.5 for a tie."""
    return float(0.5 + 0.5 * np.sign(p - 0.5))


def summary(judged: Sequence[answers.Judged], right: Sequence[float | None]) -> dict[str, Any]:
    """What is counted; shares of nothing are None."""
    found = [None if v.p is None else preference(v.p) for v, _ in judged]
    flips = [flip for _, flip in judged if flip is not None]
    both = [(mine, gold) for mine, gold in zip(found, right, strict=True) if None not in (mine, gold)]
    decided = [(mine, gold) for mine, gold in both if 0.5 not in (mine, gold)]

    def share(of: Sequence[bool]) -> float | None:
        return sum(of) / len(of) if of else None

    return {
        "comparisons": len(judged),
        "a": found.count(1.0),
        "b": found.count(0.0),
        "ties": found.count(0.5),
        "failed": found.count(None),
        "position_flip_rate": share(flips),
        "gold": len(both),
        "agreement": share([mine == gold for mine, gold in both]),
        "agreement_without_ties": share([mine == gold for mine, gold in decided]),
    }


def row_cells(number: int, judged: answers.Judged, right: float | None) -> list[Any]:
    """A line of the table."""
    p, reason, _ = judged.verdict
    return [
        number,
        "failed" if p is None else NAMES[preference(p)],
        "" if p is None else f"{p:.3f}",
        {None: "", True: "flipped", False: ""}[judged.flipped],
        "" if right is None else NAMES[right],
        shorten(visible(one_line(reason)), 90),
    ]


def run(argv: Sequence[str]) -> int:
    """Ask the judge and print; returns the exit status."""
    parser = Parser(prog="python -m tools.judge", description=None)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("file")
    own, config_argv = apart(argv)
    options = parser.parse_args(own)
    arguments = configs.split_argv(config_argv)
    config = configs.load(str(arguments.spec), arguments.overrides)
    configs.check(settings.Experiment, config, "config")
    # rows first: they are read at once, a model is not
    rows = list(read_rows(options.file))
    template = config.data.get("template")
    comparisons = [comparison(row, template) for row in rows]
    right = [gold(row) for row in rows]
    judge = ready(config)
    for row, asked in zip(rows, comparisons, strict=True):
        if isinstance(judge, HasCheck):
            try:
                judge.check(asked.messages, asked.row)
            except ValueError as error:
                raise ValueError(f"{row.at}: {error}") from error
    begun = time.monotonic()
    judged = answers.compare(judge, comparisons, both_orders=not options.once)
    seconds = time.monotonic() - begun
    table = [row_cells(n, *each) for n, each in enumerate(zip(judged, right, strict=True), 1)][: options.rows]
    print(text_table(["row", "verdict", "p", "order", "gold", "reason"], table))
    found: dict[str, Any] = summary(judged, right)
    queries = len(judged) * (1 if options.once else 2)
    found |= {"queries": queries, "seconds": round(seconds, 3)}
    found["queries_per_second"] = round(queries / max(seconds, 1e-9), 2)
    stats = judge.stats() if isinstance(judge, HasStats) else {}
    found |= {f"judge/{name}": number for name, number in stats.items()}
    print()
    print(
        text_table(["", "found"], [[name, "" if value is None else value] for name, value in found.items()])
    )
    print(to_json(found))
    return 0


def apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This tool's arguments, and those that are the config's."""
    own: list[str] = []
    of_config: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config"):
            own.append(argument)
            continue
        of_config.append(argument)
        if "=" not in argument and rest:
            of_config.append(rest.pop(0))
    return own, of_config


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    return exit_status("judge", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
