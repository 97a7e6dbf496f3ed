"""Compare two models, or two files of answers, with a judge, as a run's evaluation does.

    python -m tools.evaluate --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] POLICY [REFERENCE] [--out=FILE.jsonl]
    python -m tools.evaluate --config=FILE[:ARGUMENT] [...] --answers FIRST.jsonl SECOND.jsonl [--out=FILE.jsonl]

Judge, held-out prompts, sampling and number of samples are those of the config (`judge`, `judging`, `data`,
`sampling`, `evaluation`). POLICY and REFERENCE are folders, hub names or "embedded", with the same architecture and
tokenizer; REFERENCE defaults to the config's model.path. To compare models of different kinds, write their answers to
files with `python -m tools.chat`. Each row of such a file holds the prompt and a text "answer"; several rows with the
same prompt are several answers, and each is compared with each answer in the other file. Prompts that only one file
answers are left out and counted.

It prints the win rate of the first against the second with its interval over prompts, the length-controlled win rate,
lengths, variety, the parts that the judge reports of answers (such as valid and copy), and for models KL and entropy;
docs/evaluation.md explains each. The last line is one JSON object. --out gets one pair of answers per prompt with the
judge's verdict, reason and scores.

Examples:
  python -m tools.evaluate --config=paraphrase runs/paraphrase/export
  python -m tools.evaluate --config=paraphrase --config.evaluation.prompts=200 runs/a/export runs/b/export
  python -m tools.evaluate --config=paraphrase --answers mine.jsonl theirs.jsonl --out=judged.jsonl

Exit status: 0 done, 2 invalid input (one line explains), 130 interrupted.

Left out on purpose: more than one process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial

from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.evaluation.statistics import Rate
from xpo_jax.experiment.setup import make_evaluator, prepare
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.io.streams import print_json
from xpo_jax.judges import contract
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.reporting.console import text_table
from xpo_jax.reporting.summary import progress

from ..cli import Parser, as_called, exit_status, path_argument
from ..judge import split_arguments
from .answers import Findings, Rows, compare_answers, flat

# ---- two models -------------------------------------------------------------------------------------


def compare_models(config: ConfigDict, policy: str) -> tuple[Findings, Rows]:
    """Compare a model with the config's model.path.

    Raises:
      ValueError: the models differ in architecture or tokenizer.
    """
    p = prepare(config)
    base = p.models.policy
    model = hub.find(policy)
    if model_folder.read_config(model.folder) != p.models.config:
        raise ValueError(
            f"{policy}: its architecture differs from that of {base.given}; write both models' answers to files with"
            " tools.chat, and compare the files with --answers"
        )
    tokenizers = [model_folder.load_tokenizer(m.folder, p.models.config) for m in (model, base)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise ValueError(
            f"{policy}: its tokenizer differs from that of {base.given}; compare their answers with --answers"
        )
    judge = p.judging.evaluation_judge
    device_judge = judge if isinstance(judge, contract.DeviceJudge) else None
    programs = [compile_program for _, compile_program in p.programs.evaluation_programs()]
    if device_judge:
        programs += [call for _, call in device_judge.declared_programs()]
    for compile_program in progress(programs, "compiling"):
        compile_program()
    weights, reference = (
        model_folder.load_weights(
            m.folder,
            p.models.config,
            dtype=p.programs.model.dtype,
            shardings=p.programs.model.weights_sharding,
        )
        for m in (model, base)
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
        **flat(rates),
        "kl": e.kl,
        "kl_per_token": e.kl_per_token,
        "entropy": e.entropy,
        "first": dict(e.policy),
        "second": dict(e.reference),
    }, e.samples


# ---- the command ------------------------------------------------------------------------------------


def tables(findings: Findings, names: Sequence[str]) -> str:
    """Return the findings as tables; `names` are those of the two sides."""
    rates = [name for name in findings if f"{name}_low" in findings]
    rows = [[name, *(findings[f"{name}{end}"] for end in ("", "_low", "_high"))] for name in rates]
    sides = [[name, value, findings["second"].get(name)] for name, value in findings["first"].items()]
    rest = [
        [name, value]
        for name, value in findings.items()
        if not isinstance(value, Mapping) and not any(name.startswith(rate) for rate in rates)
    ]
    return "\n\n".join(
        [
            text_table(["of the first against the second", "value", "low", "high"], rows),
            text_table(["answers", *names], sides),
            text_table(["", "value"], rest),
        ]
    )


def run(argv: Sequence[str]) -> Findings:
    """Evaluate, print the tables and write --out; return the findings."""
    parser = Parser(prog="python -m tools.evaluate", description=None)
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--out", type=path_argument)
    parser.add_argument("first")
    parser.add_argument("second", nargs="?")
    tool_argv, config_argv = split_arguments(argv)
    options = parser.parse_args(tool_argv)
    arguments = configs.split_argv(config_argv)
    if options.answers:
        if options.second is None:
            raise ValueError("--answers compares two files; name the second one as well")
        config = configs.load(str(arguments.spec), arguments.overrides)
        findings, rows = compare_answers(config, options.first, options.second)
    else:
        # exports are merged: an adapter of the config is not theirs
        overrides = ["model.reference=None", "judging.max_queries=None", "lora.rank=0", "lora.start=None"]
        if options.second is not None:
            overrides.append(f"model.path={options.second}")
        config = configs.load(str(arguments.spec), [*arguments.overrides, *overrides])
        findings, rows = compare_models(config, options.first)
    print(tables(findings, [options.first, options.second or config.model.path]))
    print()
    if options.out:
        atomic_write(options.out, "".join(to_json(row) + "\n" for row in rows))
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0

    def run_and_print() -> int:
        print_json(run(argv))
        return 0

    return exit_status("evaluate", run_and_print)


if __name__ == "__main__":
    sys.exit(main())
