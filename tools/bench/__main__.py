"""How fast is a training step here, part by part, how far from what this machine can do, and from TRL?

    python -m tools.bench S|M|FOLDER [--batch=8] [--prompt=64] [--new=64] [--lengths=fixed|lognormal]

One row for each part of a step: seconds (the median of rounds that take all parts in turn), tokens per second, model
FLOPs and the bytes that must move, the share of the floor (the larger of FLOPs over the peak and bytes over the
bandwidth, both measured at the start: by a matmul, and by copies of as many bytes as the part reads and writes in one
pass), bytes that the compiled program needs for a moment, compilations and their time. "prefill", "sample" and "score"
are one call each; "decode" is sample less prefill. A step has both candidates' samples, their score by the reference,
and the update; judge, text and logs are left out. With --ahead=K the reference's samples are drawn for K steps in one
call: "ahead" is a Kth of such a call, "step" the mean of K steps that share one, "sample" the policy's alone. Weights
are random, unless a Hugging Face folder is given; its tokenizer is not needed.

S: 256 wide, 6 layers, vocabulary 8,192. M: 512 wide, 8 layers, vocabulary 32,000.

Examples:
  python -m tools.bench S --cores=1
  python -m tools.bench M --batch=32 --new=128 --lengths=lognormal --json=m.json
  python -m tools.bench S --cores=1 --peer=trl --peer_python=trl/bin/python
  python -m tools.bench S --judge=1
  python -m tools.bench path/to/Qwen2.5-0.5B --batch=64 --prompt=256 --new=256 --remat --profile=traces

--peer=trl steps TRL's XPOTrainer on the same weights, prompts, lengths and cores, a round of ours and one of theirs in
turn, and shows the ratios of the medians. It runs in its own environment, with the extra `peer`. With
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in front of the command both get large pages, see docs/performance.md.

Exit status: 0 done, 2 invalid input (one line says what), 130 interrupted.
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

from tools.cli import Parser, exit_status

if TYPE_CHECKING:
    from tools.bench.parts import Bench
    from tools.bench.trl_client import Peer

COLUMNS = ("part", "s", "tokens/s", "GFLOP", "MB", "of floor", "temp. MiB", "compilations", "compile s")


def shape(width: int, layers: int, inner: int, vocabulary: int) -> dict[str, Any]:
    """A Qwen2 config.json with 8 heads, 2 of them for keys and values."""
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: an argument that is not understood or impossible.
    """
    parser = Parser(
        prog="python -m tools.bench", description=__doc__, usage="python -m tools.bench S|M|FOLDER"
    )
    parser.add_argument("model", help="S, M, or a Hugging Face folder of a Qwen2 model")
    parser.add_argument("--batch", type=int, default=8, help="prompts (8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--new", type=int, default=64, help="tokens of the longest response (64)")
    parser.add_argument(
        "--lengths",
        choices=("fixed", "lognormal"),
        default="fixed",
        help="all responses of --new tokens, or of a mean of 40 with a long tail, cut at --new (fixed)",
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds (5)")
    parser.add_argument("--cores", type=int, help="run on so many cores, TRL too (all)")
    parser.add_argument(
        "--rows", type=int, default=2, help="of a micro-batch of the update, on each device (2)"
    )
    parser.add_argument(
        "--judge", type=float, help="also a step whose judge takes so many seconds, elsewhere"
    )
    parser.add_argument("--ahead", type=int, default=1, help="as layout.reference_steps (1)")
    parser.add_argument("--chunk_tokens", type=int, default=1024, help="as layout.chunk_tokens (1024)")
    parser.add_argument("--remat", action="store_true", help="as layout.remat")
    parser.add_argument("--peer", choices=("trl",), help="compare with this")
    parser.add_argument("--peer_python", help="the interpreter of the peer's environment")
    parser.add_argument("--profile", type=Path, help="write a trace of one more step into this folder")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    options = parser.parse_args(argv)
    for name in ("batch", "prompt", "new", "repeat", "cores", "rows", "ahead", "chunk_tokens", "judge"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "judge" else 1):
            raise ValueError(f"--{name}={value}: a positive number is expected")
    if options.new < 2:
        raise ValueError("--new=1: without a second token nothing is decoded")
    if options.cores is not None and options.cores > os.cpu_count():
        raise ValueError(f"--cores={options.cores}: this machine has {os.cpu_count()}")
    if bool(options.peer) != bool(options.peer_python):
        raise ValueError("--peer=trl and --peer_python=PYTHON belong together; see --help")
    return options


def bench(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    if options.cores is not None:  # before JAX counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    begun, load = time.perf_counter(), os.getloadavg()
    from tools.bench import machine, parts, workload
    from tools.bench.trl_client import Peer
    from tools.build import random_model
    from xpo_jax.reporting.console import field_table

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.model)
        if options.model in SIZES:
            folder = random_model.write(Path(scratch) / options.model, shape(*SIZES[options.model]))
        lengths = workload.response_lengths(options.lengths, options.batch, options.new)
        print("compiling ...", file=sys.stderr, flush=True)
        parts = parts.Bench(
            folder,
            B=options.batch,
            P=options.prompt,
            T=options.new,
            lengths=lengths,
            rows=options.rows,
            chunk_tokens=options.chunk_tokens,
            remat=options.remat,
            judge=options.judge,
            ahead=options.ahead,
        )
        ready = time.perf_counter()
        peak = machine.peak_flops(parts.dtype)
        bandwidths = {
            name: machine.bandwidth(part.bytes // part.passes)
            for name, part in parts.parts.items()
            if name not in ("sample", "ahead", "step", "judged")  # sums of others
        }
        peer = None
        if options.peer:
            peer = Peer(options.peer_python, folder, parts.prompts.tokens, lengths, options)
        try:
            rounds(parts, peer, options.repeat)
        finally:
            if peer:
                peer.close()
        if options.profile:
            import jax

            with jax.profiler.trace(str(options.profile)):
                parts.step()
    found = figures(parts, peak, bandwidths)
    about = {
        "model": f"{options.model}, computing in {parts.programs.dtype.name},"
        f" {parts.programs.parameters:,} parameters",
        "step": f"{options.batch} prompts of {options.prompt} tokens, responses of {options.new} ({options.lengths})",
        "machine": f"{len(os.sched_getaffinity(0))} core(s), load {load[0]:.1f} when it began;"
        f" {peak / 1e9:,.1f} GFLOP/s, {min(bandwidths.values()) / 1e9:,.1f} to"
        f" {max(bandwidths.values()) / 1e9:,.1f} GB/s by size",
        "start": f"{imported - begun:.1f} s imports, {ready - imported:.1f} s for {parts.counter.count} compilations"
        " and the weights",
        "padding": f"{parts.padding:.1%} of the slots of score and accumulate are empty",
        "rounds": options.repeat,
    }
    print(field_table(about), table(found), sep="\n\n")
    if options.judge is not None:
        print("", judged(parts), sep="\n")
    ratios = {}
    if peer:
        ratios = peer.ratios(parts)
        print("", peer.table(parts), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"about": about, "parts": found, "peer": ratios}, indent=1) + "\n")
    return 0


def rounds(parts: Bench, peer: Peer | None, repeat: int) -> None:
    """Time every part once per round, in turn, so that what else the machine does meets all alike."""
    import jax

    from xpo_jax.reporting.summary import progress

    order = [part for part in parts.parts.values() if part.run]
    if peer:
        peer.step()
    for part in order:  # the first call of each is slower
        jax.block_until_ready(part.run())
    for _ in progress(range(repeat), "measuring"):
        for part in order:
            begun = time.perf_counter()
            jax.block_until_ready(part.run())
            part.seconds.append((time.perf_counter() - begun) / part.per)
        whole, first = parts.parts["sample"].seconds[-1], parts.parts["prefill"].seconds[-1]
        parts.parts["decode"].seconds.append(max(whole - first, 1e-9))
        if peer:
            peer.step(measured=True)


def figures(parts: Bench, peak: float, bandwidths: dict[str, float]) -> dict[str, dict[str, Any]]:
    """{part: its figures}; peak and bandwidth are of one device, and so are bytes.

    The floors of a sample and of a step are the sums of their parts'.
    """
    peak *= parts.mesh.size
    floor = {
        name: max(parts.parts[name].flops / peak, parts.parts[name].bytes / speed)
        for name, speed in bandwidths.items()
    }
    floor["sample"] = floor["prefill"] + floor["decode"]
    second, per = "sample", 1
    if "ahead" in parts.parts:
        ahead, first = parts.parts["ahead"], parts.parts["prefill"]
        second, per = "ahead", ahead.per
        decode = ((ahead.flops - first.flops) / peak, (ahead.bytes - first.bytes) / bandwidths["decode"])
        floor["ahead"] = floor["prefill"] + max(decode)
    floor["step"] = floor["sample"] + sum(
        floor[name] for name in (second, "score", "accumulate", "apply", "for_sampling")
    )
    if parts.judge is not None:
        floor["judged"] = beside_judge(floor["step"], parts.judge, floor["score"], floor[second], per)
    return {
        name: {
            "seconds": part.median,
            "fastest": min(part.seconds),
            "slowest": max(part.seconds),
            "tokens_per_second": part.tokens / part.median if part.tokens else None,
            "flops": part.flops,
            "bytes": part.bytes,
            "bandwidth": bandwidths.get(name),
            "floor_seconds": floor[name],
            "share_of_floor": floor[name] / part.median,
            "temporaries": part.temporaries,
            "compilations": part.compilations,
            "compile_seconds": part.compile_seconds,
        }
        for name, part in parts.parts.items()
    }


def beside_judge(step: float, judge: float, score: float, second: float, per: int = 1) -> float:
    """Seconds of a step whose judge takes `judge` of them, some of them hidden behind other work.

    Args:
      score, second: a step's work that needs no verdict; but all of the second candidates' samples of `per` steps
        are drawn in one of them.
    """
    meanwhile = [score + per * second] + (per - 1) * [score]
    return step + sum(max(0.0, judge - each) for each in meanwhile) / per


def judged(parts: Bench) -> str:
    """A step with a judge, measured, against the same without one and what is done meanwhile."""
    assert parts.judge is not None
    median = {name: part.median for name, part in parts.parts.items()}
    second = parts.parts.get("ahead", parts.parts["sample"])
    meanwhile = median["score"] + second.median
    least = beside_judge(median["step"], parts.judge, median["score"], second.median, second.per)
    return (
        f"a judge of {parts.judge:g} s: {median['judged']:.3f} s a step, {median['judged'] / least - 1:+.1%} of the"
        f" {least:.3f} s that are left when scoring and the reference's samples ({meanwhile:.3f} s) are done meanwhile"
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures for people."""
    from xpo_jax.reporting.console import text_table

    rows = []
    for name, f in found.items():
        speed = round(f["tokens_per_second"]) if f["tokens_per_second"] else None
        compiled = [
            round(f["temporaries"] / 2**20, 1),
            f["compilations"],
            round(f["compile_seconds"], 1),
        ]
        rows.append(
            [
                name,
                round(f["seconds"], 4),
                speed,
                f["flops"] / 1e9 or None,
                f["bytes"] / 1e6,
                f"{f['share_of_floor']:.0%}",
            ]
            + (compiled if f["compilations"] else [None] * 3)
        )
    return text_table(COLUMNS, rows)


def main(argv: Sequence[str]) -> int:
    """Measure; returns the exit status."""
    return exit_status("bench", lambda: bench(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
