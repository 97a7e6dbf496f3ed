"""The parts of tools.bench.device_check that train: models of real shapes, and a small one with long prompts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tools.bench import figures, machine
from tools.bench.device_scale import DoesNotFit, Record, Scale, kernels, memory
from tools.bench.parts import Bench
from tools.bench.step import BETA, Step, make_setup
from tools.bench.workload import Workload, response_lengths
from tools.build.random_model import write
from tools.planner import estimate
from tools.planner.hardware import Device, by_kind
from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.algorithm.update import summarise
from xpo_jax.models import attention_kernels
from xpo_jax.models.registry import read_model_config
from xpo_jax.runtime import sharding

MEMORY_BEYOND_PLAN = 1.15  # times the plan, which leaves out code and fragmentation
# micro_batch_rows and remat, the fastest first; the first one that fits is used
LAYOUTS = ((8, False), (4, False), (4, True), (1, True))
FITS = 0.92  # of the memory that the runtime offers, by the plan


def train(name: str, scale: Scale, record: Record) -> None:
    """Train a model with random weights, then time the parts of a step."""
    config = scale.models[name]
    with tempfile.TemporaryDirectory() as scratch:
        workload, setup = _fitting(scale, config)
        planned = estimate.peak(estimate.memory(setup))
        record.add(layout={"micro_batch_rows": workload.micro_batch_rows, "remat": workload.remat})
        record.add(planned_bytes=planned[1], planned_peak=planned[0])
        begun = time.perf_counter()
        folder = write(Path(scratch), dict(config))
        record.add(write_seconds=time.perf_counter() - begun)
        step = Step(folder, workload, longest=True)
    record.add(start_seconds=time.perf_counter() - begun)
    record.add(compile_seconds={label: seconds for label, (_, _, seconds) in step.compiled.items()})
    run_steps(step, scale.steps, record)
    check_memory(planned[1], record)
    if jax.process_count() == 1:
        _time_parts(step, scale.rounds, record)


def _fitting(scale: Scale, config: Mapping[str, Any]) -> tuple[Workload, estimate.Setup]:
    """Return the fastest layout that fits by the plan.

    Raises:
      DoesNotFit: none does.
    """
    mesh, limit = sharding.make_mesh(data=-1, fsdp=1, tensor=1), memory("bytes_limit")
    for rows, remat in LAYOUTS:
        lengths = response_lengths("fixed", scale.prompts, scale.new_tokens)
        workload = Workload(
            scale.prompts, scale.prompt_tokens, lengths, scale.new_tokens, rows, 1024, remat=remat
        )
        setup = make_setup(read_model_config(config), workload, mesh)
        needed = estimate.peak(estimate.memory(setup))[1]
        if limit is None or needed <= FITS * limit:
            return workload, setup
    assert limit is not None
    raise DoesNotFit(f"the plan is {needed / 2**30:.1f} GiB, and the device offers {limit / 2**30:.1f}")


def run_steps(step: Step, count: int, record: Record) -> None:
    """Run training steps; check that policy and reference start equal, that all is finite and nothing recompiles."""
    compilations, seconds, losses, finite = step.counter.count, [], [], True
    for number in range(count):
        begun = time.perf_counter()
        _, sums, applied = step.run()
        seconds.append(time.perf_counter() - begun)
        metrics = summarise(jax.device_get(sums), BETA)
        if number == 0:
            apart = max(abs(metrics[key]) for key in ("objective/kl", "rewards/chosen", "rewards/rejected"))
            record.check("log ratios of equal weights", apart, 0.0)
        losses.append(metrics["loss/total"])
        finite &= bool(applied["finite"])
        record.add(steps=len(seconds), step_seconds=float(np.median(seconds)), losses=losses)
    record.check("steps that were not finite", float(not (finite and np.isfinite(losses).all())), 0.0)
    record.check("compilations during the steps", step.counter.count - compilations, 0)


def check_memory(planned: int, record: Record) -> None:
    """Check the peak of memory, where the devices count it, against the plan."""
    peak = memory("peak_bytes_in_use")
    record.add(peak_bytes=peak)
    if peak is not None:
        record.add(peak_of_plan=peak / planned)
        record.check("peak memory / plan", peak / planned, MEMORY_BEYOND_PLAN)


def _time_parts(step: Step, rounds: int, record: Record) -> None:
    """Record seconds, tokens/s and the fractions of peak and bandwidth of each part of a step."""
    bench = Bench(step)
    figures.measure(bench, None, rounds)
    peak = machine.peak_flops(step.dtype)
    moved = {
        name: part.bytes // part.passes for name, part in bench.parts.items() if name not in figures.SUMS
    }
    bandwidths = {name: machine.bandwidth(size) for name, size in moved.items()}
    results = figures.figures(bench, peak, bandwidths)
    sheet, devices = by_kind(jax.devices()[0].device_kind) or Device(0, 0, 0), step.mesh.size
    for name, part in results.items():
        row = {key: part[key] for key in ("seconds", "tokens_per_second", "fraction_of_floor")}
        rate = part["flops"] / part["seconds"] / devices
        row["of_matmul_peak"] = rate / peak
        if sheet.peak_flops:
            row["mfu"] = rate / sheet.peak_flops
        if name == "decode":
            speed = part["bytes"] / part["seconds"]
            row["bytes_per_second"], row["of_copy_bandwidth"] = speed, speed / bandwidths[name]
            if sheet.bandwidth:
                row["of_data_sheet_bandwidth"] = speed / sheet.bandwidth
        record.add(**{name: row})


def train_long(scale: Scale, record: Record) -> None:
    """Take two steps with long prompts through each kernel, with a model of few layers."""
    config = scale.models["0.5B"]
    config = {**config, "num_hidden_layers": min(4, config["num_hidden_layers"])}
    prompts, new = 8, scale.new_tokens // 4
    lengths = response_lengths("fixed", prompts, max(2, new))
    workload = Workload(prompts, scale.long_tokens, lengths, max(2, new), 1, 1024, remat=True)
    names, refused = kernels(config["head_dim"])
    record.add(refused=refused)
    device, head_dim = jax.devices()[0], config["head_dim"]
    dtype = compute_dtype("auto", sharding.device_platform(device))
    chosen = attention_kernels.choose_for(attention_kernels.AUTO, device, dtype=dtype, head_dim=head_dim)
    record.add(auto=chosen.at(scale.long_tokens))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write(Path(scratch), config)
        for name in names:
            inner = Record(Path(scratch) / "record.json")
            step = Step(folder, workload, attention=name, longest=True)
            run_steps(step, 2, inner)
            temporaries = {
                label: built.memory_analysis().temp_size_in_bytes
                for label, (built, *_) in step.compiled.items()
            }
            record.add(**{name: {**inner.figures, "temporary_bytes": temporaries}})
            for check in inner.checks:
                record.check(f"{name}: {check['check']}", check["measured"], check["limit"])
            del step  # before the next one's weights
