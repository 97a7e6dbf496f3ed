"""Run tools.bench at many shapes, one after the other, and print one table with the worst shape first.

    python -m tools.bench.matrix --out=FOLDER [--models=S,M] [--batches=1,8,32] [--prompts=64,512] \\
        [--answers=64,256,lognormal] [--repeat=5] [--cores=1] [--peer=trl --peer_python=PYTHON]

Every combination is one `python -m tools.bench` in a process of its own, whose figures and output are kept in FOLDER;
"lognormal" are responses of 40 tokens on average and 128 at most. It can be stopped at any time: the same command reads
what FOLDER holds and measures the rest, while other rounds, cores or peers are measured as well. --list prints the
commands and measures nothing.

The table has one row for each shape: seconds of a step and of the generation of both candidates, TRL's as a multiple of
these where a peer was named, and how near their floors decoding, scoring and accumulating gradients are. Lines below it
name the rows that should not be trusted, because the machine was too busy. Rows are sorted by the step's multiple, or
without a peer by the step's fraction of the floor. FOLDER/matrix.json holds all figures of the rows.

Examples:
  python -m tools.bench.matrix --out=build/matrix --models=S --batches=8 --cores=1
  python -m tools.bench.matrix --out=build/matrix --cores=1 --peer=trl --peer_python=trl/bin/python
  python -m tools.bench.matrix --out=build/matrix --models=path/to/SmolLM2-135M --prompts=48 --answers=32

Exit status: 0 done, 1 some shapes failed, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.__main__ import SIZES
from tools.cli import Parser, exit_status, path_argument
from xpo_jax.io.user_paths import expand
from xpo_jax.reporting.console import progress, text_table

LOGNORMAL, LONGEST = "lognormal", 128  # the answers' distribution, and the most tokens of one
PARTS = ("decode", "score", "accumulate")
WIDTH = 120  # of the table where there is no terminal


class Shape(NamedTuple):
    """One combination: model, prompts, tokens of each, and tokens of a response or LOGNORMAL."""

    model: str
    batch: int
    prompt: int
    answer: str

    @property
    def name(self) -> str:
        """The shape in a few characters."""
        return f"{Path(self.model).name}_{self.batch}x{self.prompt}_{self.answer}"

    def arguments(self, options: argparse.Namespace) -> list[str]:
        """Return the arguments of tools.bench, all but where its figures go."""
        model = self.model if self.model in SIZES else str(Path(self.model).resolve())
        flags = [f"--batch={self.batch}", f"--prompt={self.prompt}", f"--repeat={options.repeat}"]
        if self.answer == LOGNORMAL:
            flags += [f"--new={LONGEST}", "--lengths=lognormal"]
        else:
            flags += [f"--new={self.answer}"]
        if options.cores:
            flags += [f"--cores={options.cores}"]
        if options.peer:
            flags += [f"--peer={options.peer}", f"--peer_python={options.peer_python}"]
        return [model, *flags]

    def file(self, options: argparse.Namespace) -> Path:
        """Return the file of its figures, another one for other arguments."""
        folder: Path = options.out
        digest = hashlib.sha256("\n".join(self.arguments(options)).encode()).hexdigest()
        return folder / f"{self.name}_{digest[:8]}.json"

    def command(self, options: argparse.Namespace) -> list[str]:
        """Return the command that measures it."""
        arguments = [*self.arguments(options), f"--json={self.file(options)}"]
        return [sys.executable, "-m", str(__package__), *arguments]

    def figures(self, options: argparse.Namespace) -> dict[str, Any] | None:
        """Return what was measured; None if that is missing, or the file holds something else."""
        try:
            read = json.loads(self.file(options).read_text())
        except (OSError, ValueError):
            return None
        return read if isinstance(read, dict) and {"parts", "peer", "doubts"} <= read.keys() else None


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
    for name in ("repeat", "cores"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value}: a positive number is expected")
    models = [expand(model) for model in options.models.split(",")]
    for model in models:
        if model not in SIZES and not (Path(model) / "config.json").is_file():
            raise ValueError(f"--models: {model!r} is not S, M or a folder with config.json")
    batches, prompts = (_numbers(name, getattr(options, name), least=1) for name in ("batches", "prompts"))
    answers = [
        text if text == LOGNORMAL else str(_numbers("answers", text, least=2)[0])
        for text in options.answers.split(",")
    ]
    shapes = [Shape(*values) for values in itertools.product(models, batches, prompts, answers)]
    if len({shape.file(options) for shape in shapes}) < len(shapes):
        raise ValueError("--models, --batches, --prompts, --answers: one of them names the same twice")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out={options.out}: is not a folder")
    return shapes, options


def _numbers(name: str, text: str, *, least: int) -> list[int]:
    for number in text.split(","):
        if not (number.isascii() and number.isdigit()) or int(number) < least:
            raise ValueError(f"--{name}: {number!r} is not a number of at least {least}")
    return [int(number) for number in text.split(",")]


def measure(shapes: Sequence[Shape], options: argparse.Namespace) -> list[Shape]:
    """Measure what was not measured yet; return the shapes that failed."""
    missing = [shape for shape in shapes if shape.figures(options) is None]
    if not missing:
        return []
    failed = []
    for shape in progress(missing, "measuring"):
        log = shape.file(options).with_suffix(".log")
        with log.open("w") as output:
            status = subprocess.run(
                shape.command(options), stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if status or shape.figures(options) is None:
            last = log.read_text().strip().rsplit("\n", 1)[-1]
            print(f"{shape.name}: ended with status {status}: {last} ({log})", file=sys.stderr)
            failed.append(shape)
    return failed


def row(shape: Shape, figures: Mapping[str, Any], *, peer: bool) -> tuple[float, list[Any]]:
    """Return what a shape is sorted by, and its row, with TRL's columns if there is a peer."""
    parts, ratios = figures["parts"], figures["peer"]
    generation = ratios["generation"][0] if peer else 2 * parts["sample"]["seconds"]
    cells = [*shape, f"{parts['step']['seconds']:.3g}", f"{generation:.3g}"]
    if peer:
        cells += [f"{ratios[name][2]:.1f}" for name in ("step", "generation")]
    cells += [f"{parts[name]['fraction_of_floor']:.0%}" for name in PARTS]
    return (ratios["step"][2] if peer else parts["step"]["fraction_of_floor"]), cells


def report(shapes: Sequence[Shape], options: argparse.Namespace) -> str:
    """Return the table of the shapes that were measured, with the doubts below, and write matrix.json."""
    measured = {shape: figures for shape in shapes if (figures := shape.figures(options)) is not None}
    everything = [{**shape._asdict(), **figures} for shape, figures in measured.items()]
    (options.out / "matrix.json").write_text(json.dumps(everything, indent=1) + "\n")
    peer = bool(options.peer)
    rows = sorted((row(*item, peer=peer) for item in measured.items()), key=lambda pair: pair[0])
    heads = ["model", "batch", "prompt", "answer", "step, s", "generation, s"]
    heads += ["step, TRL / ours", "generation, TRL / ours"] if peer else []
    heads += [f"{part}, of floor" for part in PARTS]
    width = None if sys.stdout.isatty() else WIDTH
    doubts = [
        f"do not believe {shape.name}: {', '.join(figures['doubts'])}"
        for shape, figures in measured.items()
        if figures["doubts"]
    ]
    return "\n".join([text_table(heads, [cells for _, cells in rows], width), *doubts])


def run(argv: Sequence[str]) -> int:
    """Measure, and print the table; return the exit status."""
    shapes, options = parse(argv)
    if options.list:
        print("\n".join(" ".join(shape.command(options)) for shape in shapes))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed = measure(shapes, options)
    if len(failed) < len(shapes):
        print(report(shapes, options))
    return int(bool(failed))


def main(argv: Sequence[str]) -> int:
    """Run the measurement; return the exit status."""
    return exit_status("matrix", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
