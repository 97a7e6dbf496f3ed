"""Run tools.bench at many shapes, one after the other, and print one table with the worst shape first.

    python -m tools.bench.matrix --out=FOLDER [--models=S,M] [--batches=1,8,32] [--prompts=64,512] \\
        [--answers=64,256,lognormal] [--repeat=5] [--cores=1] [--peer=trl --peer_python=PYTHON]

Every combination is one `python -m tools.bench` in a process of its own, whose figures and output are kept in FOLDER;
"lognormal" are responses of 40 tokens on average and 128 at most. It can be stopped at any time: the same command reads
what FOLDER holds and measures the rest. --list prints the commands and measures nothing.

The table has one row for each shape: seconds of a step and of the generation of both candidates, TRL's as a multiple of
these where a peer was named, what fraction of the floor decoding, scoring and the sum of gradients are at, and why the
machine may have been too busy for the row to be believed. Rows are sorted by the step's multiple, or without a peer by
the step's fraction of the floor. FOLDER/matrix.json holds all figures of all shapes.

Examples:
  python -m tools.bench.matrix --out=build/matrix --models=S --batches=8 --cores=1
  python -m tools.bench.matrix --out=build/matrix --cores=1 --peer=trl --peer_python=trl/bin/python
  python -m tools.bench.matrix --out=build/matrix --models=path/to/SmolLM2-135M --prompts=48 --answers=32

Exit status: 0 done, 1 some shapes failed, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.__main__ import SIZES
from tools.cli import Parser, exit_status, path_argument
from xpo_jax.reporting.console import progress, text_table

LOGNORMAL, LONGEST = "lognormal", 128  # the answers' distribution, and the most tokens of one
HEADS = ("model", "batch", "prompt", "answer", "step, s", "generation, s", "TRL / step", "TRL / generation")
PARTS = ("decode", "score", "accumulate")


class Shape(NamedTuple):
    """One combination: model, prompts, tokens of each, and tokens of a response or LOGNORMAL."""

    model: str
    batch: int
    prompt: int
    answer: str

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{Path(self.model).name}_{self.batch}x{self.prompt}_{self.answer}"

    def command(self, options: argparse.Namespace) -> list[str]:
        """Return the command that measures it."""
        lengths = [f"--new={LONGEST}", "--lengths=lognormal"]
        flags = [f"--batch={self.batch}", f"--prompt={self.prompt}", f"--repeat={options.repeat}"]
        flags += lengths if self.answer == LOGNORMAL else [f"--new={self.answer}"]
        flags += [f"--cores={options.cores}"] if options.cores else []
        flags += (
            [f"--peer={options.peer}", f"--peer_python={options.peer_python}"] if options.peer_python else []
        )
        return [sys.executable, "-m", __package__, self.model, *flags, f"--json={self.figures(options)}"]

    def figures(self, options: argparse.Namespace) -> Path:
        """Return the file of its figures."""
        folder: Path = options.out
        return folder / f"{self.name}.json"


def parse(argv: Sequence[str]) -> tuple[list[Shape], argparse.Namespace]:
    """Return the shapes and the options.

    Raises:
      ValueError: an unknown or impossible argument.
    """
    parser = Parser(prog="python -m tools.bench.matrix", description=__doc__)
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the figures")
    parser.add_argument("--models", default="S,M", help="S, M or model folders (S,M)")
    parser.add_argument("--batches", default="1,8,32", help="prompts (1,8,32)")
    parser.add_argument("--prompts", default="64,512", help="tokens of each prompt (64,512)")
    parser.add_argument("--answers", default="64,256,lognormal", help="tokens, or lognormal (all three)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (5)")
    parser.add_argument("--cores", type=int, help="run on N cores, TRL as well (all)")
    parser.add_argument("--peer", choices=("trl",), help="the library to compare with")
    parser.add_argument("--peer_python", help="the interpreter of its environment")
    parser.add_argument("--list", action="store_true", help="print the commands and measure nothing")
    options = parser.parse_args(argv)
    if bool(options.peer) != bool(options.peer_python):
        raise ValueError("--peer=trl and --peer_python=PYTHON must be given together; see --help")
    models = options.models.split(",")
    for model in models:
        if model not in SIZES and not (Path(model) / "config.json").is_file():
            raise ValueError(f"--models: {model!r} is not S, M or a folder with config.json")
    batches, prompts = (_numbers(options, name, least=1) for name in ("batches", "prompts"))
    answers = options.answers.split(",")
    _numbers(argparse.Namespace(answers=[a for a in answers if a != LOGNORMAL]), "answers", least=2)
    shapes = [Shape(*values) for values in itertools.product(models, batches, prompts, answers)]
    if twice := {shape.name for shape in shapes if [s.name for s in shapes].count(shape.name) > 1}:
        raise ValueError(f"two shapes would have the same file: {', '.join(sorted(twice))}")
    return shapes, options


def _numbers(options: argparse.Namespace, name: str, *, least: int) -> list[int]:
    texts = getattr(options, name)
    texts = texts.split(",") if isinstance(texts, str) else texts
    for text in texts:
        if not text.isdigit() or int(text) < least:
            raise ValueError(f"--{name}: {text!r} is not a number of at least {least}")
    return [int(text) for text in texts]


def measure(shapes: Sequence[Shape], options: argparse.Namespace) -> list[Shape]:
    """Measure what was not measured yet; return the shapes that failed."""
    failed = []
    for shape in progress([s for s in shapes if not s.figures(options).exists()], "measuring"):
        log = options.out / f"{shape.name}.log"
        with log.open("w") as output:
            status = subprocess.run(
                shape.command(options), stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if status or not shape.figures(options).exists():
            last = log.read_text().strip().rsplit("\n", 1)[-1]
            print(f"{shape.name}: ended with status {status}: {last} ({log})", file=sys.stderr)
            failed.append(shape)
    return failed


def row(shape: Shape, figures: Mapping[str, Any]) -> tuple[float, list[Any]]:
    """Return what a shape is sorted by, and its row."""
    parts, peer = figures["parts"], figures["peer"]
    ratios = [peer[name][2] for name in ("step", "generation")] if peer else [None, None]
    generation = peer["generation"][0] if peer else 2 * parts["sample"]["seconds"]
    of_floor = [parts[name]["fraction_of_floor"] for name in PARTS]
    cells = [
        *shape,
        f"{parts['step']['seconds']:.3g}",
        f"{generation:.3g}",
        *(None if ratio is None else f"{ratio:.1f}" for ratio in ratios),
        *(f"{fraction:.0%}" for fraction in of_floor),
        "; ".join(figures["doubts"]),
    ]
    return (ratios[0] or parts["step"]["fraction_of_floor"]), cells


def table(shapes: Sequence[Shape], options: argparse.Namespace) -> str:
    """Return the table of all shapes that were measured, and write matrix.json."""
    figures = {
        shape: json.loads(shape.figures(options).read_text())
        for shape in shapes
        if shape.figures(options).exists()
    }
    everything = [{**shape._asdict(), **measured} for shape, measured in figures.items()]
    (options.out / "matrix.json").write_text(json.dumps(everything, indent=1) + "\n")
    rows = sorted((row(shape, measured) for shape, measured in figures.items()), key=lambda pair: pair[0])
    heads = [*HEADS, *(f"{part}, of floor" for part in PARTS), "doubts"]
    return text_table(heads, [cells for _, cells in rows])


def run(argv: Sequence[str]) -> int:
    """Measure, and print the table; return the exit status."""
    shapes, options = parse(argv)
    if options.list:
        print("\n".join(" ".join(shape.command(options)) for shape in shapes))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed = measure(shapes, options)
    if len(failed) < len(shapes):
        print(table(shapes, options))
    return int(bool(failed))


def main(argv: Sequence[str]) -> int:
    """Run the measurement; return the exit status."""
    return exit_status("matrix", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
