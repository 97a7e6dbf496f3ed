"""A run that takes seconds, for fault injection: a random model, the embedded prompts, a judge of lengths.

tools.faults, tools.torture and the tests share it: a folder of runs, the real command in its own process, and the
comparison of two finished runs. inject.py injects the faults; a command that it did not strike as planned is an error.

Left out on purpose: any meaningful training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.paraphrase import get_config
from tools.build import random_model
from tools.faults.plans import Plan
from xpo_jax.config import loader as configs
from xpo_jax.values import Answer, Comparison, Verdict

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "xpo_jax" / "embedded" / "model"
STEPS, EVERY = 6, 2  # of a run; between checkpoints
HANG_SECONDS = 400  # after which a run counts as hanging; the machine may be busy
MODEL = {
    **random_model.CONFIG_05B,
    "vocab_size": 2048,  # the embedded tokenizer's
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}


class Judge:
    """A judge by which the longer text wins and equal lengths tie."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        """Judge as `contract.Judge` does."""
        return [Verdict((len(c.a) > len(c.b)) * 0.5 + (len(c.a) >= len(c.b)) * 0.5) for c in comparisons]


def write_config(folder: Path) -> Path:
    """Write model and config into `folder`; return the config's path."""
    model = random_model.write(folder / "model", MODEL)
    for path in EMBEDDED.iterdir():
        if not (model / path.name).exists():
            shutil.copyfile(path, model / path.name)
    # a quarter of all tokens end a response, so that random weights produce finished ones
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2043, *range(512)]}))
    config = get_config()
    config.model.path, config.model.dtype = str(model), "float32"
    config.steps, config.batch_size, config.layout.micro_batch_rows = STEPS, 8, 2
    config.data.take, config.data.buckets = 21, (40,)  # 21: every third batch is partial
    config.sampling.max_new_tokens = 8
    config.sampling.temperature = 1.0
    config.judge = type(config)({"name": "tools.faults.tiny_run:Judge"})
    config.judging.max_failed_batches = 1  # a failing judge ends the run at once; it can be resumed
    config.loss.unfinished_loses = False
    config.optimizer.schedule, config.optimizer.learning_rate = "constant", 1e-2
    config.optimizer.warmup_steps = 0
    config.evaluation.update(prompts=8, reference_samples=1, every_steps=3)
    config.checkpoint.update(every_steps=EVERY, keep_last=2)
    config.logging.tensorboard = False
    path = folder / "config.json"
    path.write_text(configs.serialize(config))
    return path


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit status (negative: the signal that killed it) and its output."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line of the package on standard error."""
        lines = [line for line in self.err.splitlines() if line.startswith("xpo_jax: ")]
        return lines[-1].removeprefix("xpo_jax: ") if lines else ""


class Runs:
    """A folder of runs of one config, with their compilation cache.

    Args:
      folder: empty, or that of an earlier Runs, whose compilation cache shortens the start.
      config, overrides: the path of a config and overrides of its fields; None writes the tiny config.
      devices: simulated devices of each process.
    """

    def __init__(
        self, folder: Path, *, config: str | None = None, overrides: Sequence[str] = (), devices: int = 1
    ):
        self.folder, self.overrides, self.devices = folder, tuple(overrides), devices
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self._tiny = config or str(write_config(folder)), config is None

    def path(self, name: str) -> Path:
        """Return the run directory of that name."""
        return self.folder / "runs" / name

    def command(self, name: str, overrides: Sequence[str], plan: Plan | None) -> list[str]:
        """Return the real command; with a plan, the command that injects the fault."""
        injected = [] if plan is None else [plan.to_json()]
        module = "xpo_jax.main" if plan is None else "tools.faults.inject"
        return [
            sys.executable, "-m", module, *injected, f"--config={self.config}", f"--config.run_dir={self.path(name)}",
            *(o if o.startswith("--") else f"--config.{o}" for o in (*self.overrides, *overrides)),
        ]  # fmt: skip

    def environ(self, devices: int) -> dict[str, str]:
        """Return the environment of a process."""
        # compiling takes longer than running
        fast_compile = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if self._tiny else {}
        return {
            **os.environ,
            **fast_compile,
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    @contextlib.contextmanager
    def started(
        self,
        name: str,
        overrides: Sequence[str] = (),
        plan: Plan | None = None,
        *,
        devices: int | None = None,
        environ: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a command, within another one such as nohup, and kill it at the end of the block if it still runs."""
        with _hangup_not_ignored():
            process = subprocess.Popen(
                [*within, *self.command(name, overrides, plan)],
                cwd=ROOT,
                env={**self.environ(devices or self.devices), **(environ or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(
        self, name: str, overrides: Sequence[str] = (), plan: Plan | None = None, **options: Any
    ) -> Ended:
        """Run the command until it ends in any way.

        Raises:
          TimeoutError: it hangs.
          NotStruck: the planned fault was not struck.
        """
        with self.started(name, overrides, plan, **options) as process:
            return _end(process, plan)

    def run_many(self, name: str, plans: Sequence[Plan | None], overrides: Sequence[str] = ()) -> list[Ended]:
        """Run one process for each plan (None: no fault), which together form one run; errors as those of `run`."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        with contextlib.ExitStack() as stack:
            processes = []
            for number, plan in enumerate(plans):
                joined = {"mode": "on", "coordinator": f"localhost:{port}", "num_processes": len(plans)}
                process_fields = [f"distributed.{k}={v}" for k, v in {**joined, "process_id": number}.items()]
                processes.append(stack.enter_context(self.started(name, [*overrides, *process_fields], plan)))
            return [_end(process, plan) for process, plan in zip(processes, plans, strict=True)]

    def copy(self, name: str, new: str) -> Path:
        """Copy a run directory to another name; return the copy."""
        shutil.rmtree(self.path(new), ignore_errors=True)
        shutil.copytree(self.path(name), self.path(new))
        return self.path(new)

    @functools.cached_property
    def uninterrupted(self) -> Path:
        """The run directory of a run without a fault."""
        ended = self.run("uninterrupted")
        if ended.status != 0:
            raise RuntimeError(f"the run without a fault fails: {ended.err[-2000:]}")
        return self.path("uninterrupted")


@contextlib.contextmanager
def _hangup_not_ignored() -> Iterator[None]:
    """Start processes as from a terminal even under nohup: they inherit a signal that is ignored, but no handler."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGHUP, before)


def _end(process: subprocess.Popen[str], plan: Plan | None) -> Ended:
    try:
        out, err = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it hangs: no end after {HANG_SECONDS} s") from None
    if plan is not None:
        plan.require_struck(err)
    return Ended(process.returncode, out, err)


# ---- comparing finished runs -----------------------------------------------------------------------


def result(run: Path) -> dict[str, str]:
    """Return {file or metric: digest} of all results of a run; none may depend on when the run was interrupted."""
    digests = {}
    for path in sorted([*run.glob("export/*"), *run.glob("samples/*"), *run.glob("pairs*.jsonl")]):
        digests[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for row in metrics(run):
        for name, value in row.items():
            digests[f"metrics.jsonl, step {row['step']}, {name}"] = json.dumps(value)
    for name, value in json.loads((run / "result.json").read_bytes()).items():
        if name not in ("seconds", "run_dir", "export"):
            digests[f"result.json, {name}"] = json.dumps(value)
    return digests


def is_timing(name: str) -> bool:
    """Return whether a metric measures time, and so differs between runs that compute the same."""
    return name.startswith("time/") or name == "tokens_per_second"


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without timings."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


def differences(run: Path, expected: Path) -> list[str]:
    """Return the names of the results that differ between two finished runs, and of temporary files left over."""
    ours, other = result(run), result(expected)
    different = [name for name in {**other, **ours} if ours.get(name) != other.get(name)]
    rest = [path for path in run.rglob("*") if path.name.endswith((".tmp", ".partial", ".old"))]
    return different + [f"{path.relative_to(run)} is left over" for path in rest]


def main() -> None:
    """Time the run: python -m tools.faults.tiny_run FOLDER."""
    runs = Runs(Path(sys.argv[1]))
    for name in ("first", "second"):
        begun = time.monotonic()
        ended = runs.run(name)
        print(name, ended.status, round(time.monotonic() - begun, 1), "s", ended.message or ended.out[-300:])
    print(differences(runs.path("second"), runs.path("first")) or "equal")


if __name__ == "__main__":
    main()
