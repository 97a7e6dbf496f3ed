"""Two models, or two files of answers, compared by a judge as a run's evaluation does it.

    python -m tools.evaluate --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] POLICY [REFERENCE] [--out=FILE.jsonl]
    python -m tools.evaluate --config=FILE[:ARGUMENT] [...] --answers FIRST.jsonl SECOND.jsonl [--out=FILE.jsonl]

Judge, held-out prompts, sampling and number of samples are the config's (`judge`, `judging`, `data`, `sampling`,
`evaluation`). POLICY and REFERENCE are folders, hub names or "embedded", of one architecture with one tokenizer;
REFERENCE is the config's model.path where it is left out. Models of different kinds are compared by their answers:
let tools.chat write them to files. In such a file each row says what was asked and holds a text "answer"; several rows
that asked the same are several answers, each of which meets each of the other file's. Prompts that only one of the
files answers are left out and counted.

Printed are the win rate of the first against the second with its interval over prompts, the same at equal lengths,
lengths, variety, what the judge's parts tell of the answers (such as valid and copy), and for models KL and entropy;
docs/evaluation.md says what each is. The last line is one JSON object. --out gets per prompt one pair of answers with
the judge's verdict, reason and scores.

Examples:
  python -m tools.evaluate --config=configs/paraphrase.py runs/paraphrase/export
  python -m tools.evaluate --config=configs/paraphrase.py --config.evaluation.prompts=200 runs/a/export runs/b/export
  python -m tools.evaluate --config=configs/paraphrase.py --answers mine.jsonl theirs.jsonl --out=judged.jsonl

Exit status: 0 done, 2 invalid input (one line says what), 130 interrupted.

Left out on purpose: more than one process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tools.cli import Parser, exit_status
from tools.judge import apart, ready
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.data.answer_files import Answered, read_answers
from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.statistics import Rate
from xpo_jax.experiment.setup import make_evaluator, prepare
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.judges import ask, contract, limits
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.reporting.console import text_table
from xpo_jax.reporting.summary import progress
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Prompts

BATCH = 64  # comparisons that a judge gets at a time


def models(config: ConfigDict, policy: str) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
    """The findings on a model against the config's model.path, and the texts."""
    p = prepare(config)
    found = hub.find(policy)
    if model_folder.read_config(found.folder) != p.model_config:
        raise ValueError(
            f"{policy}: is of another architecture than {p.model.given}; let tools.chat answer the prompts with both,"
            " and compare the files with --answers"
        )
    tokenizers = [model_folder.load_tokenizer(each.folder, p.model_config) for each in (found, p.model)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise ValueError(
            f"{policy}: has another tokenizer than {p.model.given}; compare their answers with --answers"
        )
    device_judge = p.judge if isinstance(p.judge, contract.DeviceJudge) else None
    for _, compile_program in progress(
        [*p.programs.evaluation_programs(), *(device_judge.declared_programs() if device_judge else ())],
        "compiling",
    ):
        compile_program()
    weights, reference = (
        model_folder.load_weights(
            each.folder,
            p.model_config,
            dtype=p.programs.model.dtype,
            shardings=p.programs.model.weights_sharding,
        )
        for each in (found, p.model)
    )
    if device_judge:
        device_judge.load(reference)
    e = make_evaluator(p, reference)(weights, 0, partial(progress, label="evaluating"))
    rates = {"win_rate": Rate(e.win_rate, e.low, e.high), "win_rate_controlled": e.controlled}
    if e.against_answers is not None:
        rates["win_rate_answers"] = e.against_answers
    return {
        "prompts": len(e.samples),
        "queries": e.queries,
        **_flat(rates),
        "kl": e.kl,
        "kl_per_token": e.kl_per_token,
        "entropy": e.entropy,
        "first": dict(e.policy),
        "second": dict(e.reference),
    }, e.samples


def answers(
    config: ConfigDict, first: str, second: str
) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
    """The findings on one file of answers against another, and the texts."""
    configs.check(settings.Experiment, config, "config")
    judging = configs.build(settings.Judging, config.judging, "judging")
    columns = {name: config.data[name] for name in ("template", "column", "rename")}
    files = [read_answers(path, **columns) for path in (first, second)]
    both = [name for name in files[0] if name in files[1]]
    left_out = len(files[0]) + len(files[1]) - 2 * len(both)
    if not both:
        raise ValueError(
            f"{first} and {second}: no prompt is answered in both; they must say alike what was asked"
        )
    if left_out:
        print(f"{left_out} prompts are answered in one of the files only, and left out", file=sys.stderr)
    judge, failure_tolerance = ready(config), limits.FailureTolerance(**judging.failure_tolerance)
    asked: list[tuple[int, Answered, str, str]] = []  # prompt, what was asked, the two answers
    for number, name in enumerate(both):
        mine, theirs = (file[name] for file in files)
        if isinstance(judge, contract.HasCheck):
            try:
                judge.check(mine.messages, mine.row.values)
            except ValueError as error:
                raise ValueError(f"{mine.row.at}: {error}") from error
        asked += [(number, mine, a, b) for a in mine.answers for b in theirs.answers]

    queries, won, said = 0, np.full(len(asked), np.nan), []
    starts = range(0, len(asked), BATCH)
    for start in progress(starts, "judging"):
        part = asked[start : start + BATCH]
        result = ask.ask(
            judge,
            _prompts([each for _, each, _, _ in part]),
            ask.ResponsePairs(
                policy=[a for _, _, a, _ in part],
                reference=[b for _, _, _, b in part],
                identical=np.array([a == b for _, _, a, b in part]),
                policy_finished=np.ones(len(part), bool),
                reference_finished=np.ones(len(part), bool),
            ),
            unfinished_loses=False,
            both_orders=judging.both_orders,
            shown_seed=(config.seed, Stream.EVALUATION, start),
        )
        failure_tolerance.check([ask.summarize_call(result)])
        queries += result.queries
        won[start : start + BATCH] = np.where(result.weight > 0, ask.wins(result.p_first), np.nan)
        said += list(
            zip(result.p_first, result.weight, result.shown, result.reasons, result.scores, strict=True)
        )

    prompt = np.array([number for number, *_ in asked])
    longer = np.array([float(len(a) - len(b)) for _, _, a, b in asked])
    wins = [won[prompt == number] for number in range(len(both))]
    table = []
    for number in range(len(both)):
        at = int(np.argmax(prompt == number))
        _, each, a, b = asked[at]
        p, weight, shown, reason, scores = said[at]
        table.append(
            {
                "prompt": each.messages[-1]["content"],
                "reference": b,
                "policy": a,
                "win_share": statistics.share(wins[number]),
                "p_policy": float(p) if weight > 0 else None,
                "shown": None if shown is None else "AB"[shown.index(0)],
                "reason": reason,
                "scores": scores,
            }
        )
    lengths = [longer[prompt == number] for number in range(len(both))]
    sides = [[file[name] for name in both] for file in files]
    return {
        "prompts": len(both),
        "left_out": left_out,
        "queries": queries,
        **_flat(
            {
                "win_rate": statistics.win_rate(wins),
                "win_rate_controlled": statistics.length_controlled(wins, lengths),
            }
        ),
        "first": _side(judge, sides[0]),
        "second": _side(judge, sides[1]),
    }, table


def _side(judge: Any, answered: Sequence[Answered]) -> dict[str, float]:
    """What is said of one file's answers: means over prompts of the means over a prompt's answers."""
    found: dict[str, list[float]] = {}
    for each in answered:
        mine: dict[str, list[float]] = {"characters": [float(len(text)) for text in each.answers]}
        for text in each.answers:
            for name, value in contract.measure(judge, each.messages, text).items():
                if isinstance(value, int | float):
                    mine.setdefault(name, []).append(float(value))
        for name, values in mine.items():
            found.setdefault(name, []).append(float(np.mean(values)))
    firsts = [each.answers[0] for each in answered]
    variety = {f"distinct_{n}": statistics.distinct(firsts, n) for n in (1, 2)}
    return {name: float(np.mean(values)) for name, values in found.items()} | variety


def _prompts(asked: Sequence[Answered]) -> Prompts:
    """As `ask.ask` wants them; nothing is sampled, so there are no tokens."""
    size = len(asked)
    empty = np.zeros((size, 0), np.int32)
    return Prompts(
        tuple(each.row.values for each in asked),
        tuple(each.messages for each in asked),
        empty,
        np.zeros(size, np.int32),
        np.arange(size, dtype=np.int32),
        np.ones(size, bool),
    )


def _flat(rates: Mapping[str, Rate]) -> dict[str, float]:
    ends = ("", "_low", "_high")
    return {
        f"{name}{end}": value for name, rate in rates.items() for end, value in zip(ends, rate, strict=True)
    }


def shown(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """The findings as tables."""
    rates = [name for name in found if f"{name}_low" in found]
    rows = [[name, *(found[f"{name}{end}"] for end in ("", "_low", "_high"))] for name in rates]
    sides = [[name, found["first"][name], found["second"].get(name)] for name in found["first"]]
    rest = [
        [name, value]
        for name, value in found.items()
        if not isinstance(value, Mapping) and not any(name.startswith(rate) for rate in rates)
    ]
    return "\n\n".join(
        [
            text_table(["of the first against the second", "found", "low", "high"], rows),
            text_table(["answers", *names], sides),
            text_table(["", "found"], rest),
        ]
    )


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Evaluate and print; returns the last line."""
    parser = Parser(prog="python -m tools.evaluate", description=None)
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("first")
    parser.add_argument("second", nargs="?")
    own, config_argv = apart(argv)
    options = parser.parse_args(own)
    arguments = configs.split_argv(config_argv)
    if options.answers:
        if options.second is None:
            raise ValueError("--answers compares two files; name the second, too")
        config = configs.load(str(arguments.spec), arguments.overrides)
        found, texts = answers(config, options.first, options.second)
    else:
        more = ["model.reference=None", "judging.max_queries=None"]
        if options.second is not None:
            more.append(f"model.path={options.second}")
        config = configs.load(str(arguments.spec), [*arguments.overrides, *more])
        found, texts = models(config, options.first)
    print(shown(found, [options.first, options.second or config.model.path]))
    print()
    if options.out:
        atomic_write(Path(options.out), "".join(to_json(row) + "\n" for row in texts))
    return found


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0

    def shown() -> int:
        print(to_json(run(argv)))
        return 0

    return exit_status("evaluate", shown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
