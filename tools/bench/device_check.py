"""Check an accelerator in ten minutes: right numbers, speed against its limits, and memory against the plan.

    python -m tools.bench.device_check [--minutes=10] [--only=PART,...] [--json=FILE] [--tiny]

Meant for one H100, H200 or v5e chip; it uses all devices of this machine, and runs anywhere. Parts, in this order:

  machine       what the device is; the rate of a large matmul and of a copy, beside the data sheet
  attention     each implementation, forward and backward, against the einsum in float32, and its time
  0.5B, 1.5B    20 training steps of that Qwen2.5 shape with random weights: 64 prompts of 256 tokens, responses of
                128; then each part of a step: decoded tokens/s and the fraction of the bandwidth, model FLOPs of the
                update and the fraction of the peak (mfu), peak memory beside the plan of tools.plan
  long prompts  two steps with prompts of 2,048 tokens through each implementation of attention, with four layers

Each part runs in its own process. A part that fails, or that takes longer than its portion of --minutes, is reported
with one line, and the others follow. Two tables and one JSON object are printed at the end. Checked are errors of
attention, log ratios of equal weights (zero, bit for bit), finite steps, recompilations, and memory of at most 1.15
times the plan; nothing is checked about speed. A model that does not fit by its plan is skipped. tools/device_check.sh
installs what this needs first.

Examples:
  python -m tools.bench.device_check --json=device.json
  python -m tools.bench.device_check --only=machine,attention --minutes=3
  JAX_PLATFORMS=cpu python -m tools.bench.device_check --tiny

Exit status: 0 every check passed; 1 a check failed, or a part did not end; 2 invalid input (one line explains); 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.cli import Parser, exit_status, path_argument
from xpo_jax.io.text import error_line

# Portions of the time that is left, which a part may take; what it leaves over is for those after it.
PORTIONS = {"machine": 1, "attention": 2, "0.5B": 8, "1.5B": 8, "long prompts": 2}
_LINES = 15  # of a failed part's output that are shown
GIB = 2**30


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `only` becomes a list of parts.

    Raises:
      ValueError: an unknown or impossible argument.
    """
    parser = Parser(
        prog="python -m tools.bench.device_check",
        description=__doc__,
        usage="python -m tools.bench.device_check [options]",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (10)")
    parser.add_argument("--only", default=",".join(PORTIONS), help="parts, separated by commas (all)")
    parser.add_argument("--json", type=path_argument, help="write the JSON into this file as well")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries this command, not the device")
    parser.add_argument(
        "--record", type=path_argument, help="measure one part in this process, and write it into this file"
    )
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in PORTIONS]:
        raise ValueError(f"--only={','.join(unknown)}: no such part; the parts are {', '.join(PORTIONS)}")
    if not 0 < options.minutes < float("inf"):
        raise ValueError(f"--minutes={options.minutes}: must be positive and finite")
    if options.record and len(options.only) != 1:
        raise ValueError("--record: it measures one part; add --only=PART")
    return options


# ---- one part, in its own process -------------------------------------------------------------------


def measure(name: str, tiny: bool, path: Path) -> int:
    """Measure a part in this process and write it into `path`; return 1 if it fails, which one line explains."""
    from tools.bench import device_parts, device_scale
    from xpo_jax.runtime import compilation

    try:
        compilation.enable_cache(os.environ)
        record = device_scale.Record(path)
        record.add()
        device_parts.PARTS[name](device_scale.TINY if tiny else device_scale.FULL, record)
    except device_scale.DoesNotFit as error:
        record.add(skipped=str(error))
    except Exception as error:  # of a driver, compiler or kernel, in any class, it is a result
        traceback.print_exc()
        print(error_line(error, with_class=True), file=sys.stderr)
        return 1
    return 0


def run(command: Sequence[str], limit: float, path: Path) -> dict[str, Any]:
    """Run the process of a part, for at most `limit` seconds; return its status, time, figures and checks.

    Args:
      command: its arguments; it writes its record into `path`, and an error as the last line on stderr.
    """
    begun, error = time.monotonic(), None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            done = subprocess.run(command, timeout=limit, stdout=output, stderr=subprocess.STDOUT)
            status = "failed" if done.returncode else "passed"
        except subprocess.TimeoutExpired:
            status, error = (
                "ended",
                f"took longer than its {limit:.0f} s; give more --minutes, or --only this part",
            )
        output.seek(0)
        lines = [line.rstrip() for line in output if line.strip()]
    if status == "failed":
        error = (lines or ["no output"])[-1][:400]
        if done.returncode < 0:
            error = f"ended by signal {-done.returncode} ({error})"
        print(*lines[-_LINES:], sep="\n", file=sys.stderr)
    record = json.loads(path.read_text()) if path.exists() else {"figures": {}, "checks": []}
    if status == "passed" and not all(check["passed"] for check in record["checks"]):
        status = "failed"
        error = "; ".join(describe(check) for check in record["checks"] if not check["passed"])
    if skipped := record["figures"].pop("skipped", None):
        status, error = "skipped", skipped
    return {"status": status, "error": error, "seconds": time.monotonic() - begun, **record}


def describe(check: Mapping[str, Any]) -> str:
    """Return a check on one line."""
    return f"{check['check']} is {check['measured']:.4g}, at most {check['limit']:.4g} is right"


# ---- all parts --------------------------------------------------------------------------------------


def run_parts(options: argparse.Namespace) -> dict[str, Any]:
    """Run all chosen parts within the time; return what is printed as JSON."""
    begun, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(options.only):
            left = 60 * options.minutes - (time.monotonic() - begun)
            limit = left * PORTIONS[name] / sum(PORTIONS[other] for other in options.only[number:])
            print(f"{name}: at most {limit:.0f} s ...", file=sys.stderr, flush=True)
            path = Path(scratch, f"{number}.json")
            command = [sys.executable, "-m", "tools.bench.device_check", f"--only={name}", f"--record={path}"]
            results[name] = run([*command, *(["--tiny"] if options.tiny else [])], max(limit, 1.0), path)
            print(f"{name}: {results[name]['status']} in {results[name]['seconds']:.0f} s", file=sys.stderr)
    return {
        "passed": all(part["status"] in ("passed", "skipped") for part in results.values()),
        "seconds": time.monotonic() - begun,
        "tiny": options.tiny,
        "parts": results,
    }


def tables(results: Mapping[str, Any]) -> str:
    """Return the table of parts, and that of the models' main figures."""
    from xpo_jax.reporting.console import text_table

    rows, models = [], []
    for name, part in results["parts"].items():
        passed = f"{sum(check['passed'] for check in part['checks'])} of {len(part['checks'])}"
        rows.append([name, part["status"], round(part["seconds"]), passed, part["error"]])
        figures = part["figures"]
        if "planned_bytes" not in figures:
            continue
        decode, update = figures.get("decode", {}), figures.get("accumulate", {})
        of_bandwidth = decode.get("of_data_sheet_bandwidth", decode.get("of_copy_bandwidth"))
        used = figures.get("peak_bytes")
        row = [name, figures.get("step_seconds"), decode.get("tokens_per_second"), of_bandwidth]
        row += [
            update.get("mfu", update.get("of_matmul_peak")),
            used and used / GIB,
            figures["planned_bytes"] / GIB,
        ]
        models.append(row)
    shown = text_table(["part", "status", "s", "checks", "why"], rows)
    head = [
        "model",
        "s per step",
        "decoded tokens/s",
        "of bandwidth",
        "update, of peak",
        "peak GiB",
        "planned GiB",
    ]
    return f"{shown}\n\n{text_table(head, models)}" if models else shown


def strict(value: Any) -> Any:
    """Return a value for JSON, in which a number that is not finite is null, as other readers require."""
    if isinstance(value, Mapping):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(options: argparse.Namespace) -> int:
    """Run the parts and print; return the exit status."""
    if options.record:
        return measure(options.only[0], options.tiny, options.record)
    results = run_parts(options)
    text = json.dumps(strict(results), indent=1)
    print(tables(results), "", text, sep="\n")
    if options.json:
        options.json.write_text(text + "\n")
    return int(not results["passed"])


def main(argv: Sequence[str]) -> int:
    """Check; return the exit status."""
    return exit_status("device_check", lambda: check(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
