"""tools.bench.device_check on CPUs with tiny shapes: its parts, its limits of time, and what it reports."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tools.bench import device_check, device_parts, device_training
from tools.bench.device_scale import FULL, TINY, DoesNotFit, Record, kernels
from tools.planner import estimate
from tools.planner.hardware import DEVICES, SIZES, by_kind
from xpo_jax.models import attention_kernels, attention_splash
from xpo_jax.models.layers import attention
from xpo_jax.models.registry import read_model_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


def failed(record):
    return [check for check in record.checks if not check["passed"]]


# ---- parts ------------------------------------------------------------------------------------------


def test_full_scale_has_the_published_shapes():
    for name, size in (("0.5B", 494_032_768), ("1.5B", 1_543_714_304)):
        config = read_model_config(FULL.models[name])
        assert config == SIZES[name] and estimate.parameters(config) == size
    assert FULL.long_tokens > attention_kernels.EINSUM_TOKENS > FULL.prompt_tokens + 2 * FULL.new_tokens


def test_machine_records_the_device(record):
    device_parts.measure_machine(TINY, record)
    assert record.figures["platform"] == "cpu" and record.figures["devices"] == 8
    assert record.figures["dtype"] == "float32" and record.figures["memory_limit"] is None
    assert record.figures["matmul_flops"] > 0 and record.figures["copy_bandwidth"] > 0


def test_attention_compares_the_implementations_of_this_backend(record):
    device_parts.compare_attention(TINY, record)
    names = {name.rpartition(" ")[2] for name in record.figures} - {"refused"}
    assert names == set(kernels(8)[0]) and {"einsum", "blocks"} <= names
    assert "NVIDIA GPU" in record.figures["0.5B refused"]["cudnn"]
    assert len(record.checks) == 2 * 2 * len(names) * 4 and not failed(record)


def test_attention_takes_packed_rows_in_the_order_of_the_splash_kernel(record, monkeypatch):
    kernel = functools.partial(attention_splash.attend_by_splash, interpret=True)
    monkeypatch.setattr(attention_splash, "BLOCK", 128)
    monkeypatch.setattr(attention_kernels, "attend_by_splash", kernel)
    monkeypatch.setattr(device_parts, "kernels", lambda head_dim: (["einsum", "splash"], {}))
    monkeypatch.setattr(device_parts.machine, "best_of", lambda function, repeat: 0.0)
    model = {"0.5B": TINY.models["0.5B"]}
    device_parts.compare_attention(dataclasses.replace(TINY, models=model, attention_rows=1), record)
    assert sum("splash" in check["check"] for check in record.checks) == 8 and not failed(record)


def test_attention_of_a_wrong_implementation_fails(record, monkeypatch):
    """A kernel that forgets that the second response may not see the first."""

    def forgetful(q, keys):
        T = q.shape[2]
        return attention(
            q, keys._replace(mask=None if keys.mask is None else jnp.tril(jnp.ones((1, 1, T, T), bool)))
        )

    monkeypatch.setattr(attention_kernels, "attend_in_blocks", forgetful)
    device_parts.compare_attention(TINY, record)
    wrong = {check["check"] for check in failed(record)}
    assert wrong == {
        f"error of {model} packed rows blocks, {array}"
        for model in ("0.5B", "1.5B")
        for array in ("output", "dq", "dk", "dv")
    }


def test_packed_parts_are_a_prompt_two_responses_and_empty_slots():
    parts = device_parts.packed_parts(2, 10)
    np.testing.assert_array_equal(parts.part[1], [0, 0, 0, 0, 0, 1, 1, 2, 2, -1])
    np.testing.assert_array_equal(parts.prompt[1], [0, 0, 0, 0, 0, 0, 0, 0, 0, -1])


def test_train_records_steps_parts_and_the_plan(record):
    device_training.train("0.5B", TINY, record)
    figures = record.figures
    assert figures["steps"] == 3 and len(figures["losses"]) == 3
    assert figures["losses"][0] == pytest.approx(np.log(2), abs=1e-3)  # of equal weights, and a small bonus
    assert figures["planned_bytes"] > 0 and figures["peak_bytes"] is None  # CPUs do not count
    assert {"prefill", "decode", "score", "accumulate", "apply", "for_sampling", "step"} <= figures.keys()
    assert figures["decode"]["tokens_per_second"] > 0 and figures["accumulate"]["of_matmul_peak"] > 0
    assert [check["check"] for check in record.checks] == [
        "log ratios of equal weights",
        "steps that were not finite",
        "compilations during the steps",
    ]
    assert not failed(record)


def test_train_that_does_not_fit_by_its_plan_is_not_tried(record, monkeypatch):
    monkeypatch.setattr(device_training, "memory", lambda name: 1000)
    with pytest.raises(DoesNotFit, match="the plan is .* GiB, and the device offers"):
        device_training.train("0.5B", TINY, record)


def test_memory_beyond_the_plan_fails(record, monkeypatch):
    for peak, passes in ((110, True), (120, False)):
        monkeypatch.setattr(device_training, "memory", lambda name, peak=peak: peak)
        device_training.check_memory(100, record)
        assert record.checks[-1]["passed"] is passes and record.figures["peak_of_plan"] == peak / 100


def test_long_prompts_go_through_every_implementation(record):
    device_training.train_long(TINY, record)
    assert set(kernels(8)[0]) <= record.figures.keys()
    assert record.figures["blocks"]["steps"] == 2 and record.figures["auto"] == "einsum"  # 96 tokens are few
    assert len(record.checks) == 3 * len(kernels(8)[0]) and not failed(record)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("NVIDIA H100 PCIe", None),  # half of the bandwidth
        ("cpu", None),
    ],
)
def test_data_sheet_by_what_jax_calls_the_device(kind, name):
    assert by_kind(kind) == (DEVICES[name] if name else None)


def test_check_of_nan_fails(record):
    record.check("a figure", float("nan"), 1.0)
    assert len(failed(record)) == 1


# ---- the processes, and what is printed ---------------------------------------------------------------


SCRIPT = """
import json, sys, time
path = sys.argv[1]
figures = {"planned_bytes": 2**30, "step_seconds": 0.5}
checks = [{"check": "a", "measured": PASSES, "limit": 1.0, "passed": PASSES <= 1}]
open(path, "w").write(json.dumps({"figures": figures, "checks": checks}))
"""


def outcome(tmp_path, text, limit=60.0):
    path = tmp_path / "record.json"
    return device_check.run([sys.executable, "-c", text, str(path)], limit, path)


def test_run_of_a_part_reports_checks_errors_signals_and_time(tmp_path):
    good, bad = SCRIPT.replace("PASSES", "0.5"), SCRIPT.replace("PASSES", "2.5")
    assert outcome(tmp_path, good)["status"] == "passed"
    part = outcome(tmp_path, bad)
    assert (part["status"], part["error"]) == ("failed", "a is 2.5, at most 1 is right")
    part = outcome(tmp_path, good + "raise RuntimeError('no such kernel')")
    assert (part["status"], part["error"]) == ("failed", "RuntimeError: no such kernel")
    assert part["figures"]["step_seconds"] == 0.5
    part = outcome(tmp_path, good + "import os; os.kill(os.getpid(), 11)")
    assert part["status"] == "failed" and part["error"].startswith("ended by signal 11")
    part = outcome(tmp_path, good + "time.sleep(60)", limit=2.0)
    assert part["status"] == "ended" and "took longer than its 2 s" in part["error"]
    assert part["figures"]["step_seconds"] == 0.5 and part["seconds"] < 30
    part = outcome(tmp_path, good.replace('"step_seconds": 0.5', '"skipped": "too large"'))
    assert (part["status"], part["error"]) == ("skipped", "too large") and "skipped" not in part["figures"]


def test_parts_follow_one_that_fails_and_share_the_time(monkeypatch, capsys, tmp_path):
    limits = {}

    def run(command, limit, path):
        name = command[3].removeprefix("--only=")
        limits[name] = limit
        status = "failed" if name == "attention" else "passed"
        figures = {}
        if name == "0.5B":
            figures = {"planned_bytes": 2**31, "peak_bytes": 2**30, "losses": [0.7, float("nan")]}
        return {
            "status": status,
            "error": "why" if status == "failed" else None,
            "seconds": 0.0,
            "figures": figures,
            "checks": [],
        }

    monkeypatch.setattr(device_check, "run", run)
    monkeypatch.setenv("COLUMNS", "200")
    assert device_check.main(["--minutes=15", f"--json={tmp_path / 'device.json'}"]) == 1
    expected = dict(zip(device_check.PORTIONS, (900 / 21, 90, 900 * 8 / 18, 720, 900), strict=True))
    assert limits == pytest.approx(expected, rel=0.01)
    shown = capsys.readouterr().out
    results = json.loads(shown[shown.index("\n{") :])
    assert results == json.loads((tmp_path / "device.json").read_text()) and not results["passed"]
    assert results["parts"]["0.5B"]["figures"]["losses"] == [0.7, None]  # nan is no JSON
    assert "failed" in shown and "why" in shown and "planned GiB" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only=decode"], "--only=decode: no such part; the parts are machine, attention"),
        (["--minutes=0"], "--minutes=0.0: must be positive"),
        (["--record=a.json"], "--record: it measures one part; add --only=PART"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_invalid_input_is_one_line(argv, message, capsys):
    assert device_check.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("device_check: ") and message in line


@pytest.mark.slow
def test_script_checks_this_machine_with_tiny_shapes(tmp_path):
    """As it is called on an accelerator, in an environment that has everything."""
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = [
        ROOT / "tools" / "device_check.sh",
        "--tiny",
        "--minutes=20",
        f"--json={tmp_path / 'out.json'}",
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout[done.stdout.index("\n{") :]) == results
    assert results["passed"] and list(results["parts"]) == list(device_check.PORTIONS)


def test_script_without_a_device_says_what_to_set(tmp_path):
    if any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("nvidia*")):
        pytest.skip("this machine has a device, for which the script would install")
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [ROOT / "tools" / "device_check.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3 and "set EXTRA=tpu, cuda12 or cuda13" in done.stderr
