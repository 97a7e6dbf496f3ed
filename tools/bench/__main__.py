"""Measure how fast a training step is, part by part, against the limits of this machine and against TRL.

    python -m tools.bench S|M|FOLDER [--batch=8] [--prompt=64] [--new=64] [--lengths=fixed|lognormal]

The table has one row for each part of a step: seconds (the median over rounds that run all parts in turn), tokens per
second, model FLOPs, bytes that must move, the fraction of the floor (the larger of FLOPs over the peak and bytes over
the bandwidth, both measured at the start: with a matmul, and with copies of as many bytes as the part reads and
writes in one pass), temporary bytes of the compiled program, compilations and their time. "prefill", "sample" and
"score" are one call each; "decode" is sample minus prefill. A step samples both candidates, scores them with the
reference and updates the policy; it leaves out judge, text and logs. With --reference_steps=K one call draws the
reference's samples for K steps: "prefetch" is a Kth of such a call, "step" the mean of K steps that share one, and
"sample" the policy's call alone. Weights are random unless a Hugging Face folder is given; its tokenizer is not needed.

S: 256 wide, 6 layers, vocabulary 8,192. M: 512 wide, 8 layers, vocabulary 32,000.

Examples:
  python -m tools.bench S --cores=1
  python -m tools.bench M --batch=32 --new=128 --lengths=lognormal --json=m.json
  python -m tools.bench S --cores=1 --peer=trl --peer_python=trl/bin/python
  python -m tools.bench S --judge=1
  python -m tools.bench path/to/Qwen2.5-0.5B --batch=64 --prompt=256 --new=256 --no-remat --profile=traces

--peer=trl also steps TRL's XPOTrainer with the same weights, prompts, lengths and cores, alternating one round of ours
with one of TRL's, and prints the ratios of the medians. TRL runs in its own environment, with the extra `peer`. With
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command both use huge pages, see docs/performance.md.

A warning at the end says when the machine was too busy for the figures to be trusted. tools.bench.matrix measures many
shapes, one after the other.

Exit status: 0 done, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.cli import Parser, exit_status, path_argument

if TYPE_CHECKING:
    from tools.bench.workload import Workload


def shape(width: int, layers: int, inner: int, vocabulary: int) -> dict[str, Any]:
    """Return a Qwen2 config.json with 8 query heads and 2 key-value heads."""
    from tools.build.random_model import CONFIG_05B

    return CONFIG_05B | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }


SIZES = {"S": (256, 6, 704, 8192), "M": (512, 8, 1408, 32000)}


def auto_or_integer(text: str) -> int | str:
    """Return "auto" or a number, as a flag states it."""
    return text if text == "auto" else int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      ValueError: an unknown or impossible argument.
    """
    parser = Parser(
        prog="python -m tools.bench", description=__doc__, usage="python -m tools.bench S|M|FOLDER"
    )
    parser.add_argument("model", help="S, M, or a Hugging Face model folder")
    parser.add_argument("--batch", type=int, default=8, help="prompts (8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--new", type=int, default=64, help="tokens of the longest response (64)")
    parser.add_argument(
        "--lengths",
        choices=("fixed", "lognormal"),
        default="fixed",
        help="all responses have --new tokens, or a mean of 40 with a long tail, cut at --new (fixed)",
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds (5)")
    parser.add_argument("--cores", type=int, help="run on N cores, TRL as well (all)")
    parser.add_argument(
        "--rows",
        type=auto_or_integer,
        default="auto",
        help="see layout.micro_batch_rows (auto, as a config has it)",
    )
    parser.add_argument("--judge", type=float, help="also time a step whose judge takes N seconds elsewhere")
    parser.add_argument(
        "--reference_steps", type=auto_or_integer, default="auto", help="see layout.reference_steps (auto)"
    )
    parser.add_argument(
        "--chunk_tokens", type=auto_or_integer, default="auto", help="see layout.chunk_tokens (auto)"
    )
    parser.add_argument(
        "--remat", action=argparse.BooleanOptionalAction, default=True, help="see layout.remat (--remat)"
    )
    parser.add_argument("--peer", choices=("trl",), help="the library to compare with")
    parser.add_argument("--peer_python", help="the interpreter of its environment")
    parser.add_argument(
        "--profile", type=path_argument, help="write a trace of one more step into this folder"
    )
    parser.add_argument("--json", type=path_argument, help="write all figures into this file")
    options = parser.parse_args(argv)
    for name in (
        "batch",
        "prompt",
        "new",
        "repeat",
        "cores",
        "rows",
        "reference_steps",
        "chunk_tokens",
        "judge",
    ):
        value = getattr(options, name)
        if value not in (None, "auto") and value < (0 if name == "judge" else 1):
            raise ValueError(f"--{name}={value}: a positive number is expected")
    if options.new < 2:
        raise ValueError("--new=1: at least 2 is required, because the first token needs no decoding")
    if options.cores is not None and options.cores > os.cpu_count():
        raise ValueError(f"--cores={options.cores}: this machine has {os.cpu_count()}")
    if bool(options.peer) != bool(options.peer_python):
        raise ValueError("--peer=trl and --peer_python=PYTHON must be given together; see --help")
    return options


def model(name: str, scratch: Path) -> Path:
    """Return the folder of a model; random weights of the sizes S and M are written into `scratch`."""
    from tools.build import random_model

    return random_model.write(scratch / name, shape(*SIZES[name])) if name in SIZES else Path(name)


def make_workload(options: argparse.Namespace) -> Workload:
    """Return the size of a step."""
    import jax

    from tools.bench import workload
    from xpo_jax.algorithm.batch_shapes import steps_per_call

    return workload.Workload(
        prompts=options.batch,
        prompt_tokens=options.prompt,
        lengths=workload.response_lengths(options.lengths, options.batch, options.new),
        new_tokens=options.new,
        micro_batch_rows=options.rows,
        chunk_tokens=options.chunk_tokens,
        remat=options.remat,
        reference_steps=steps_per_call(options.reference_steps, options.batch, jax.device_count(), None),
    )


def bench(options: argparse.Namespace) -> int:
    """Measure and print; return the exit status."""
    if options.cores is not None:  # before JAX counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    begun, load = time.perf_counter(), os.getloadavg()
    from tools.bench import figures, machine
    from tools.bench.parts import Bench
    from tools.bench.step import Step
    from tools.bench.trl_client import Peer

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model(options.model, Path(scratch))
        workload = make_workload(options)
        print("compiling ...", file=sys.stderr, flush=True)
        parts = Bench(Step(folder, workload), judge=options.judge)
        ready = time.perf_counter()
        other = machine.others()
        peak = machine.peak_flops(parts.step.dtype)
        bandwidths = {
            name: machine.bandwidth(part.bytes // part.passes)
            for name, part in parts.parts.items()
            if name not in figures.SUMS
        }
        peer = None
        if options.peer:
            prompts = parts.step.prompts.tokens
            peer = Peer(options.peer_python, folder, prompts, workload.lengths, options)
        try:
            figures.measure(parts, peer, options.repeat)
        finally:
            if peer:
                peer.close()
        if options.profile:
            import jax

            with jax.profiler.trace(str(options.profile)):
                parts.step.run()
    step = parts.parts["step"].seconds
    peaks = peak, machine.peak_flops(parts.step.dtype)
    doubts = machine.doubts(other, peaks, max(step) / min(step))
    results = figures.figures(parts, peak, bandwidths)
    programs, counter, setup = parts.step.programs, parts.step.counter, parts.step.setup
    about = {
        "model": f"{options.model}, computing in {programs.model.dtype.name},"
        f" {programs.model.parameters:,} parameters",
        "step": f"{options.batch} prompts of {options.prompt} tokens, responses of {options.new} ({options.lengths})",
        "layout": f"micro-batches of {setup.micro_batch_rows} rows, logits of {setup.chunk_tokens} tokens at a time,"
        f" remat {'on' if setup.remat else 'off'}, reference samples for {workload.reference_steps} step(s) at a time",
        "machine": f"{len(os.sched_getaffinity(0))} core(s), load {load[0]:.1f} at the start;"
        f" {peak / 1e9:,.1f} GFLOP/s, {min(bandwidths.values()) / 1e9:,.1f} to"
        f" {max(bandwidths.values()) / 1e9:,.1f} GB/s by size",
        "start": f"{imported - begun:.1f} s imports, {ready - imported:.1f} s for {counter.count} compilations"
        " and the weights",
        "padding": f"{parts.padding:.1%} of the slots of score and accumulate are empty",
        "rounds": options.repeat,
    }
    print(figures.report(parts, about, results, peer))
    if doubts:
        print(f"bench: warning: do not trust these figures: {', '.join(doubts)}", file=sys.stderr)
    if options.json:
        ratios = peer.ratios(parts) if peer else {}
        options.json.write_text(
            json.dumps({"about": about, "parts": results, "peer": ratios, "doubts": doubts}, indent=1) + "\n"
        )
    return 0


def main(argv: Sequence[str]) -> int:
    """Measure; return the exit status."""
    return exit_status("bench", lambda: bench(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
