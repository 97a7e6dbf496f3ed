"""Several processes: their shards, how a cluster is detected, and that their runs equal those of one process.

The runs are the command line in processes of their own, with one sequence length (`python -m tiny_run`): two with two
CPU devices each, and one with four.
"""

import dataclasses
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from tiny_run import HELD_OUT_ROWS, run_main, tiny_config, write_config

from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.update import init_state
from xpo_jax.checkpointing import checkpoint
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import cluster_detection, collectives, distributed
from xpo_jax.runtime.collectives import Failed, all_or_none, run_on_all, run_on_lead
from xpo_jax.values import Prompts

ROOT = Path(__file__).parents[1]
STEPS = 3
PATIENCE_SECONDS = 600  # for a machine that is busy


# ---- one process ----------------------------------------------------------------------------------


def test_a_single_process_does_and_sees_everything(monkeypatch):
    assert distributed.is_lead_process() and distributed.local_slice(7) == slice(0, 7)
    assert distributed.file_name("pairs.jsonl") == "pairs.jsonl"
    value = {"nan": float("nan")}
    assert run_on_all("a step", lambda: value) == [value]
    assert run_on_lead("a step", lambda: value) is value
    fault = RuntimeError("a fault")
    with pytest.raises(RuntimeError) as caught, all_or_none("a step"):
        raise fault
    assert caught.value is fault
    with pytest.raises(ZeroDivisionError):
        run_on_all("a step", lambda: 1 // 0)
    with distributed.fetched_to_lead([jax.numpy.ones(2), np.zeros(3)]) as arrays:
        assert [array.tolist() for array in arrays] == [[1, 1], [0, 0, 0]]
    assert distributed.leave(2) == 2


@pytest.mark.parametrize(("size", "processes"), [(8, 3), (64, 7), (5, 8), (1, 2)])
def test_each_row_is_of_one_process(size, processes, monkeypatch):
    """The shards are contiguous and as equal as possible."""
    prompts = Prompts((), (), None, None, None, np.arange(size) < size - 1)
    rows, valid = [], np.zeros(size, int)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for number in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        rows.append(range(size)[distributed.local_slice(size)])
        valid += distributed.local_rows(prompts).valid
    assert list(itertools.chain(*rows)) == list(range(size))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert valid.tolist() == prompts.valid.astype(int).tolist()


def test_require_equal_names_a_process_that_differs():
    one, other = {"config": "a", "prompts": "b"}, {"config": "a", "prompts": "c"}
    collectives.require_equal([one, one, dict(one)])
    with pytest.raises(Failed, match="^process 2 has another prompts than process 0; start all"):
        collectives.require_equal([one, one, other])


# ---- how they are found ---------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environ", "seen"),
    [
        ({}, None),
        (SLURM, "Slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),  # srun of a single task
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # the batch script outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod on Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_a_cluster_is_seen_where_there_is_one(environ, seen, monkeypatch):
    monkeypatch.setattr(cluster_detection, "has_tpu", lambda: False)
    assert cluster_detection.detect(environ) == seen


def test_detect_finds_a_tpu_machine(monkeypatch):
    monkeypatch.setattr(cluster_detection, "has_tpu", lambda: True)
    assert cluster_detection.detect({}) == "TPU VM"
    assert cluster_detection.detect({"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=on"], "distributed.mode is 'on', but no TPU pod, Slurm step, "),
        (["mode=maybe"], "distributed.mode: 'auto' or 'on' or 'off' is expected, found 'maybe'"),
        (["num_processes=2"], "distributed.coordinator is None, but num_processes or process_id is set"),
        (["coordinator=somewhere"], "distributed.coordinator is 'somewhere', must be host:port of process 0"),
        (["timeout_seconds=0"], "distributed.timeout_seconds is 0, must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(overrides, message, tmp_path):
    spec = write_config(tmp_path / "c.py", tiny_config(tmp_path))
    status, out, err = run_main([f"--config={spec}", *(f"--config.distributed.{o}" for o in overrides)])
    assert (status, out) == (2, "") and err.startswith(f"xpo_jax: {message}") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_config_without_the_group_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    del config.distributed
    status, _, err = run_main([f"--config={write_config(tmp_path / 'c.py', config)}"])
    assert status == 2 and err == "xpo_jax: config.distributed is missing: a mapping is expected\n"


# ---- two processes ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Ended:
    """A process that has ended: exit status, output, and time of its end."""

    status: int
    out: str
    err: str
    at: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of the model, its prompts and all runs."""
    return tmp_path_factory.mktemp("processes")


def start(folder: Path, name: str, processes: int, judge: dict, overrides=((), ()), rank=0) -> list[Ended]:
    """Run the command line on four CPU devices in total; return every process once it has ended."""
    config = tiny_config(folder)
    config.run_dir, config.steps, config.judge = str(folder / name), STEPS, ConfigDict(judge)
    config.lora.rank = rank
    config.mesh = ConfigDict({"data": 1, "fsdp": 2, "tensor": 2})
    config.data.buckets = (40,)  # fewer programs to compile
    spec = write_config(folder / f"{name}.py", config)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environ = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={4 // processes}",
        "PYTHONPATH": str(ROOT / "tests"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    for number in range(processes):
        command = [sys.executable, "-m", "tiny_run", f"--config={spec}"]
        if processes > 1:
            settings = {"mode": "on", "coordinator": coordinator, "num_processes": processes}
            settings["process_id"] = number
            command += [f"--config.distributed.{k}={v}" for k, v in settings.items()]
        command += [f"--config.{override}" for override in overrides[number]]
        out, err = (folder / f"{name}.{number}.{kind}" for kind in ("out", "err"))
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=stdout, stderr=stderr)
        started.append((process, out, err))
    ended: dict[int, Ended] = {}
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        while len(ended) < processes:
            assert time.monotonic() < until, "the processes hang"
            for number, (process, out, err) in enumerate(started):
                if number not in ended and process.poll() is not None:
                    ended[number] = Ended(process.returncode, out.read_text(), err.read_text(), time.time())
            time.sleep(0.05)
    finally:
        for process, *_ in started:
            process.kill()
            process.wait()
    return [ended[number] for number in range(processes)]


@pytest.fixture(scope="module")
def alone(folder):
    (ended,) = start(folder, "alone", 1, {"name": "fakes:Patchy"})
    assert ended.status == 0, ended.err
    return folder / "alone"


@pytest.fixture(scope="module")
def pair(folder):
    """Run two processes that prefetch two steps of the reference's samples, unlike the single process."""
    ahead = (("layout.reference_steps=2",),) * 2
    return start(folder, "pair", 2, {"name": "fakes:Patchy"}, ahead)


@pytest.fixture(scope="module")
def two_processes(pair, folder):
    assert [ended.status for ended in pair] == [0, 0], pair[0].err + pair[1].err
    return folder / "pair"


def metrics(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if "time/" not in k and k != "tokens_per_second"} for m in lines]


def test_two_processes_draw_and_judge_the_same_pairs(alone, two_processes):
    """Global batches, tokens, order shown and verdicts are equal; each process logs its shard of every batch."""
    expected = list(read_pairs(alone / "pairs.jsonl"))
    first, second = (list(read_pairs(two_processes / name)) for name in ("pairs.jsonl", "pairs-1.jsonl"))
    assert {pair["position"] for pair in first} == set(range(4))
    assert {pair["position"] for pair in second} == set(range(4, 8))
    order = lambda pair: (pair["step"], pair["position"])
    assert sorted(first + second, key=order) == expected
    assert len({order(pair) for pair in expected}) == len(expected) == 21  # the third batch has five rows
    assert {pair["shown"][0] for pair in expected if pair["shown"]} == {0, 1}


def test_two_processes_report_what_one_reports(alone, two_processes):
    ours, expected = metrics(two_processes), metrics(alone)
    assert [list(row) for row in ours] == [list(row) for row in expected]
    assert [row["step"] for row in ours] == list(range(STEPS + 1))
    for row, expected_row in zip(ours, expected, strict=True):
        for name, value in expected_row.items():
            assert row[name] == (value and pytest.approx(value, rel=1e-4, abs=1e-4)), name
    held_out = [(path / "samples" / "held_out.md").read_text() for path in (two_processes, alone)]
    assert held_out[0] == held_out[1] and held_out[0].count("\n") == 2 + HELD_OUT_ROWS


def test_two_processes_learn_what_one_learns(alone, two_processes):
    """Compare exported weights, and the checkpoint that both processes wrote, restored in one process."""
    ours, expected = (load_file(path / "export" / "model.safetensors") for path in (two_processes, alone))
    start = load_file(two_processes.parent / "model" / "model.safetensors")
    assert ours.keys() == expected.keys() == start.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=1e-6, err_msg=name)
    assert max(np.abs(expected[name] - start[name]).max() for name in start) > 1e-3
    model_config = model_folder.read_config(two_processes / "export")
    config = tiny_config(two_processes.parent)
    optimizer, _ = make_optimizer(**config.optimizer, steps=STEPS)
    like = jax.eval_shape(
        lambda params: init_state(params, optimizer), model_folder.param_shapes(model_config)
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    state, _ = checkpoint.restore(two_processes / "checkpoints", STEPS, like)
    exported = model_folder.load_params(two_processes / "export", model_config)
    jax.tree.map(np.testing.assert_array_equal, state.params, exported)
    assert state.step == STEPS


@pytest.mark.slow
def test_two_processes_learn_the_adapter_that_one_learns(folder):
    """They draw the same pairs, and export the same adapter and merged weights up to rounding."""
    judge = {"name": "fakes:Patchy"}
    for name, processes in (("adapted", 1), ("adapted_pair", 2)):
        ended = start(folder, name, processes, judge, rank=4)
        assert [process.status for process in ended] == [0] * processes, ended[0].err
    alone, both = folder / "adapted", folder / "adapted_pair"
    pairs = [pair for name in ("pairs.jsonl", "pairs-1.jsonl") for pair in read_pairs(both / name)]
    order = lambda pair: (pair["step"], pair["position"])
    assert sorted(pairs, key=order) == list(read_pairs(alone / "pairs.jsonl"))
    assert metrics(both)[1]["objective/kl"] == 0.0
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        ours, expected = load_file(both / file), load_file(alone / file)
        assert ours.keys() == expected.keys()
        for name, weight in expected.items():
            np.testing.assert_allclose(ours[name], weight, rtol=0, atol=1e-5, err_msg=name)
    b = load_file(both / "adapter/adapter_model.safetensors")
    assert max(np.abs(weight).max() for name, weight in b.items() if "lora_B" in name) > 1e-3


@pytest.mark.slow
def test_two_processes_choose_the_pairs_that_one_chooses(folder):
    """Each scores the answers to its own rows; the queries are those of one process, and so are all three pairs."""
    overrides = ["loss.candidates=2", "loss.pairing=all"]
    for name, processes in (("chosen", 1), ("chosen_pair", 2)):
        ended = start(folder, name, processes, {"name": "fakes:Scoring"}, [overrides] * processes)
        assert [process.status for process in ended] == [0] * processes, ended[0].err
    alone, both = folder / "chosen", folder / "chosen_pair"
    pairs = [pair for name in ("pairs.jsonl", "pairs-1.jsonl") for pair in read_pairs(both / name)]
    expected = list(read_pairs(alone / "pairs.jsonl"))
    assert len(expected) == 3 * 21
    assert sorted(pairs, key=lambda pair: (pair["step"], pair["position"])) == expected
    results = [json.loads((path / "result.json").read_text()) for path in (alone, both)]
    assert results[0]["judge_queries"] == results[1]["judge_queries"] > 0


def test_only_process_0_prints_and_writes(pair, two_processes):
    first, second = pair
    # Gloo's C++ lists its peers on standard output, from several threads at once
    assert all("peer ranks" in line or line == "[Gloo] Rank " for line in second.out.splitlines())
    assert "step 3/3" in first.err and "step" not in second.err
    result = json.loads(first.out.splitlines()[-1])
    assert result == json.loads((two_processes / "result.json").read_text())
    assert result["compilations_during_run"] == 0
    assert json.loads((two_processes / "environment.json").read_text())["processes"] == 2
    assert {path.name for path in two_processes.iterdir()} == {
        "xpo_jax_run.json",
        "config.json",
        "inputs.json",
        "environment.json",
        "metrics.jsonl",
        "pairs.jsonl",
        "pairs-1.jsonl",
        "samples",
        "evaluations",
        "checkpoints",
        "export",
        "result.json",
        "report.html",
    }


def test_a_judge_that_raises_on_one_process_costs_its_rows_and_ends_both_past_the_limit(
    two_processes, folder
):
    """Both report why, and have saved the weights. How soon they end is printed but not asserted, because it depends
    on how busy the machine is:

    python -m pytest tests/test_distributed.py -k raises -s
    """
    limit = ["judging.max_failed_fraction=0.4"]
    ended = start(
        folder, "broken", 2, {"name": "fakes:BrokenOn", "process": 1, "at": 4}, (limit, limit)
    )  # from its first step on
    line = (
        r"xpo_jax: the judge gave no verdict on more than 40% of the pairs in 2 batches in a row; in the last of them: "
        r"the judge failed: KeyError: 'the\\nserver is gone' \(fakes.py, line \d+\); the last weights are in \S+/1"
    )
    for process in ended:
        assert process.status == 2 and re.fullmatch(line, process.err.splitlines()[-1]), process.err
    raised = float(re.search(r"raised at (\S+)", ended[1].err)[1])
    assert not (folder / "broken" / "result.json").exists()
    assert checkpoint.latest(folder / "broken" / "checkpoints") == 1
    rows = metrics(folder / "broken")
    assert [row["step"] for row in rows] == [0, 1] and 0.4 < rows[1]["judge/failed_rate"] <= 0.5
    print(
        "seconds from the first raise to the end of each process:", *(round(e.at - raised, 2) for e in ended)
    )


@pytest.mark.slow
def test_a_budget_of_queries_is_shared_by_all_processes(alone, folder):
    """The budget is one query short of a second step: both end after the first, and all queries are counted."""
    before, first = metrics(alone)[:2]
    spent = int(before["eval/queries"] + first["judge/queries"])
    most = spent + 8 + HELD_OUT_ROWS * 2 * 2 - 1  # the second step's rows, and the last evaluation
    limit = [f"judging.max_queries={most}"]
    ended = start(folder, "limited", 2, {"name": "fakes:Patchy"}, (limit, limit))
    assert [process.status for process in ended] == [0, 0], ended[0].err
    result = json.loads((folder / "limited" / "result.json").read_text())
    assert (result["steps"], result["ended_by"]) == (1, "judging.max_queries")
    assert result["judge_queries"] == first["judge/queries"]
    rows = metrics(folder / "limited")
    assert result["evaluation_queries"] == sum(row["eval/queries"] for row in rows)
    assert spent < result["judge_queries"] + result["evaluation_queries"] <= most


@pytest.mark.slow
def test_processes_of_different_configs_are_refused(folder):
    ended = start(folder, "differing", 2, {"name": "fakes:LongerText"}, ([], ["seed=4"]))
    for process in ended:
        assert process.status == 2
        assert process.err.splitlines()[-1].startswith(
            "xpo_jax: process 1 has another config than process 0; "
        )
    assert not (folder / "differing").exists()
