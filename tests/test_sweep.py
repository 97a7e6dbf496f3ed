"""tools.sweep: the file, the choice of values, intervals, and a sweep that is stopped and resumed.

Runs are fakes except in one test, where two arms of two seeds are real processes with the tiny model.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tools import sweep as tool
from tools.faults import tiny_run
from tools.intervals import t_interval
from tools.sweeps.schedule import check, chosen, plan, read_result, run_dir, total
from tools.sweeps.spec import read
from tools.sweeps.table import as_json, notes, summary, tables
from xpo_jax.config import loader as configs

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "paraphrase.py")
FIELD = "optimizer.learning_rate"
FILE = {
    "config": CONFIG,
    "common": {"steps": 8},
    "arms": {
        "alpha 0": {"loss.alpha": 0.0},
        "XPO, alpha/beta 0.02": {"loss.alpha": 0.004, "loss.beta": 0.2},
    },
    "seeds": [0, 1, 2],
    "tune": {"field": FIELD, "values": [1e-3, 3e-4], "seeds": [100, 101]},
}
COLLECTED = FILE | {
    "arms": {
        "collect": {"tune": False, "evaluation.prompts": 2, "judge.input_tag": "tag_{seed}"},
        "offline": {
            "config": str(ROOT / "configs" / "offline_dpo.py"),
            "after": "collect",
            "offline.pairs": "{after}/pairs.jsonl",
        },
    }
}


def sweep_of(folder, content=FILE):
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return read(path, folder / "runs")


def result(win_rate, **others):
    rest = {"win_rate_controlled": win_rate, "valid": 0.9, "copy_rate": 0.1, "kl": 2.0}
    return {"win_rate": win_rate, **rest, "judge_queries": 64, "updates": 8, "seconds": 9.0, **others}


def finish(run, win_rate):
    """Write the files of a finished run."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    config = configs.serialize(configs.load(run.arm.config, run.overrides))
    (run.run_dir / "config.json").write_text(config)
    (run.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/kl": 0.0}) + "\n")
    (run.run_dir / "result.json").write_text(json.dumps(result(win_rate)))


class Fake:
    """Starts runs that end at the second poll; `rate(run)` is their win rate, or None for a failure."""

    def __init__(self, rate):
        self.rate, self.started, self.at_once, self.open = rate, [], 0, set()

    def __call__(self, run, cores):
        self.started.append(run)
        self.open.add(run.run_dir)
        self.at_once = max(self.at_once, len(self.open))
        return FakeProcess(self, run)


class FakeProcess:
    def __init__(self, fake, run):
        self.fake, self.run, self.polls, self.terminated = fake, run, 0, False

    def poll(self):
        self.polls += 1
        if self.polls < 2:
            return None
        self.fake.open.discard(self.run.run_dir)
        rate = self.fake.rate(self.run)
        if rate is None:
            self.run.log.parent.mkdir(parents=True, exist_ok=True)
            self.run.log.write_text("compiling ...\nxpo_jax: the judge is gone\n\n")
            return 2
        finish(self.run, rate)
        return 0

    def terminate(self):
        self.terminated = True

    def wait(self):
        assert self.terminated, "waits for a run that was not terminated"
        return 143


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(tool, "_POLL_SECONDS", 0.0)


def rates(run):
    """Return a win rate: the larger learning rate is better, the second arm wins 0.1 more, and seeds differ."""
    return 0.5 + 100 * (run.value or 0) + 0.1 * run.arm.name.startswith("XPO") + 0.01 * run.seed % 0.07


# ---- intervals ------------------------------------------------------------------------------------


def test_t_interval_is_that_of_the_textbook():
    # sleep gained under the second drug (Student 1908): t of 9 degrees of freedom is 2.262 in every table
    gained = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    interval = t_interval(gained)
    assert interval.mean == pytest.approx(2.33) and interval.high - interval.mean == pytest.approx(
        1.432, abs=5e-4
    )
    # R: t.test(gained, first, paired = TRUE) -> 1.58, [0.7001142, 2.4598858]
    paired = t_interval(np.subtract(gained, first))
    np.testing.assert_allclose(paired, [1.58, 0.7001142, 2.4598858], rtol=1e-6)
    assert t_interval([0.5]) == (0.5, None, None)


def test_t_interval_covers_the_mean_at_its_level():
    x = np.random.default_rng(0).normal(0.6, 0.02, (4000, 5))
    held = [low <= 0.6 <= high for _, low, high in map(t_interval, x)]
    assert 0.93 < np.mean(held) < 0.97


# ---- the choice of values, and the table ------------------------------------------------------------


def all_of(sweep, rate=rates):
    """Return the results of all runs of a sweep."""
    ended = {}
    while new := [run for run in plan(sweep, ended) if run.run_dir not in ended]:
        for run in new:
            ended[run.run_dir] = None if rate(run) is None else result(rate(run))
    return ended


def test_chosen_value_is_the_best_of_each_arm(tmp_path):
    sweep = sweep_of(tmp_path)
    first, second = sweep.arms
    table = {
        (first.name, 3e-4): (0.6, 0.7),
        (first.name, 1e-3): (0.9, 0.3),
        (second.name, 3e-4): (0.6, 0.6),
        (second.name, 1e-3): (0.55, 0.75),
    }

    def rate(run):
        return table[run.arm.name, run.value][run.seed - 100] if run.seed >= 100 else 0.5

    assert [chosen(sweep, arm, {}) for arm in sweep.arms] == [None, None]
    ended = all_of(sweep, rate)
    assert [chosen(sweep, arm, ended) for arm in sweep.arms] == [3e-4, 1e-3]
    assert len(ended) == total(sweep) == 2 * (2 * 2 + 3)
    assert all(line["win_rate"].mean == 0.5 for line in summary(sweep, ended))  # of the other seeds only
    table[second.name, 1e-3] = (0.5, 0.7)  # equal means: the smaller value
    assert chosen(sweep, second, all_of(sweep, rate)) == 3e-4
    table[second.name, 3e-4] = (0.9, None)  # a value with a failed run is not chosen
    assert chosen(sweep, second, all_of(sweep, rate)) == 1e-3
    missing = run_dir(sweep, second, 1e-3, 101)
    assert chosen(sweep, second, {path: r for path, r in ended.items() if path != missing}) is None


def test_summary_is_that_of_numpy(tmp_path):
    sweep, rng = sweep_of(tmp_path), np.random.default_rng(0)
    drawn = {path: result(rng.uniform(0.5, 0.9)) for path in all_of(sweep)}
    ended = drawn | all_of(
        sweep, lambda run: rates(run) if run.seed >= 100 else drawn[run.run_dir]["win_rate"]
    )
    second_rates, first_rates = (
        np.array([ended[run_dir(sweep, arm, 1e-3, seed)]["win_rate"] for seed in sweep.seeds])
        for arm in (sweep.arms[1], sweep.arms[0])
    )
    half = 4.302653 * np.std(second_rates - first_rates, ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom
    first, second = summary(sweep, ended)
    expected = [
        np.mean(second_rates - first_rates),
        np.mean(second_rates - first_rates) - half,
        np.mean(second_rates - first_rates) + half,
    ]
    np.testing.assert_allclose(second["difference"], expected, rtol=1e-6)
    assert first["difference"] is None and second["win_rate"].mean == pytest.approx(second_rates.mean())

    lines = tables(sweep, ended, width=300).splitlines()
    cells = re.split("  +", lines[3].strip())
    shown = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in expected))
    assert cells[:3] == ["XPO, alpha/beta 0.02", "0.001", "3"] and cells[5] == shown
    assert cells[6:] == ["0.9", "0.1", "2", "64", "8", "9"]
    assert any("- alpha 0: the best learning_rate is the largest" in line for line in lines)
    assert tables(sweep, ended, markdown=True).startswith("| arm | learning_rate | seeds | win rate, % |")

    # a seed without a partner counts in its arm's mean, but not in the difference
    ended[run_dir(sweep, sweep.arms[0], 1e-3, 2)] = None
    second = summary(sweep, ended)[1]
    assert second["difference"].mean == pytest.approx(np.mean((second_rates - first_rates)[:2]))
    assert second["seeds"] == [0, 1, 2] and "alpha 0: no result of seed 2" in notes(sweep, ended)
    arm = as_json(sweep, ended)["arms"][0]
    assert arm["seeds"] == [0, 1] and arm["tuning"]["0.001"] == [
        pytest.approx(rates(run)) for run in (plan(sweep, {})[2], plan(sweep, {})[3])
    ]


# ---- the file ---------------------------------------------------------------------------------------


def test_run_dir_is_named_after_arm_value_and_seed(tmp_path):
    sweep = sweep_of(tmp_path)
    runs = plan(sweep, {})
    assert [str(run.run_dir.relative_to(tmp_path / "runs")) for run in runs[4:]] == [
        f"xpo_alpha_beta_0.02/learning_rate_{value}/seed_{seed}"
        for value in ("0.0003", "0.001")
        for seed in (100, 101)
    ]
    config = configs.load(runs[-1].arm.config, runs[-1].overrides)
    assert (config.steps, config.seed, config.loss.alpha, config.optimizer.learning_rate) == (
        8,
        101,
        0.004,
        1e-3,
    )
    assert config.run_dir == str(runs[-1].run_dir)


def test_plan_arm_after_another_reads_the_run_of_the_same_seed(tmp_path):
    sweep = sweep_of(tmp_path, COLLECTED)
    check(sweep)
    runs = plan(sweep, {})
    collected = [run for run in runs if run.arm.name == "collect"]
    assert [run.seed for run in collected] == [100, 101, 0, 1, 2]  # the tuning seeds for the other arm
    offline = [run for run in runs if run.arm.name == "offline"]
    assert {run.after for run in offline} == {run.run_dir for run in collected[:2]}
    config = configs.load(offline[1].arm.config, offline[1].overrides)
    before = tmp_path / "runs" / "collect" / "seed_101"
    assert configs.load(collected[1].arm.config, collected[1].overrides).judge.input_tag == "tag_101"
    assert config.offline.pairs == f"{before}/pairs.jsonl"
    assert len(all_of(sweep)) == total(sweep) == 5 + 2 * 2 + 3
    # after an arm that is tuned: its run with the value that it took
    tuned = COLLECTED["arms"] | {"collect": {}}
    sweep = sweep_of(tmp_path, FILE | {"arms": tuned})
    assert {run.arm.name for run in plan(sweep, {})} == {"collect"}
    ended = all_of(sweep)
    befores = {run.after for run in plan(sweep, ended) if run.after}
    assert befores == {run_dir(sweep, sweep.arms[0], 1e-3, seed) for seed in (100, 101, 0, 1, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [0]}, "'sedes' is unknown; known are config, common"),
        ({"arms": {}}, "arms: name at least one"),
        ({"arms": {"": {}}}, "arm '': the name must contain a letter"),
        ({"arms": {"a b": {}, "A-B": {}}}, "arm 'A-B': its folder a_b is also that of arm 'a b'"),
        ({"arms": {"a": {"loss.alhpa": 0}}}, "arm 'a': loss.alhpa: no such field; did you mean 'loss.alpha'"),
        ({"arms": {"a": {"loss.alpha": 0.3}}}, "arm 'a': loss at step 0"),
        ({"arms": {"a": {"seed": 3}}}, "arm 'a': seed is set by the sweep"),
        ({"arms": {"a": {FIELD: 1e-3}}}, "arm 'a': optimizer.learning_rate is tuned; remove it"),
        (
            {"arms": {"a": {"after": "b"}, "b": {}}},
            "\"after\" must name an arm above it, not 'b'",
        ),
        ({"arms": {"a": {"judge.input_tag": "{after}"}}}, "{after} is the run of another arm"),
        ({"arms": {"a": {"config": "nowhere.py"}}}, "arm 'a': nowhere.py: there is no such file"),
        ({"common": {"layout.micro_batch_rows": 0}}, "layout.micro_batch_rows is 0, must be at least 1"),
        ({"seeds": [0, 100]}, "tune.seeds: 100 is also in seeds"),
        ({"seeds": [0, 0]}, "seeds: duplicates"),
        ({"seeds": 5}, "seeds: a list of whole numbers"),
        ({"tune": FILE["tune"] | {"values": [1e-3]}}, "tune.values: at least two"),
        ({"tune": FILE["tune"] | {"values": [-1e-3, 1e-3]}}, "learning_rate is -0.001, must be positive"),
        ({"tune": FILE["tune"] | {"field": "optimizer.rate"}}, "optimizer.rate: no such field"),
    ],
)
def test_main_invalid_file_is_one_line_before_anything_runs(change, message, tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILE | change))
    assert tool.main([str(path), f"--runs={tmp_path / 'runs'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


def test_read_duplicate_arm_is_an_error(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('{"config": "x.py", "seeds": [0], "arms": {"a": {}, "a": {"steps": 3}}}')
    assert tool.main([str(path)]) == 2
    assert "'a' occurs twice" in capsys.readouterr().err


def test_examples_of_the_documents_are_valid_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are found from there
    example, arms = re.findall(r"```json\n(.*?)```", Path("docs/choosing.md").read_text(), re.DOTALL)
    content = json.loads(example)
    assert total(sweep_of(tmp_path, content)) == 3 * (3 * 2 + 5)
    check(sweep_of(tmp_path, content | {"arms": json.loads(f"{{{arms}}}")}))
    ours = read("tools/sweeps/embedded.json")
    assert ours.folder == Path("runs/embedded") and ours.arms[0].overrides["loss.alpha"] == 0


@pytest.mark.parametrize("file", sorted((ROOT / "tools/sweeps").glob("*.json")), ids=lambda file: file.stem)
def test_sweeps_of_the_repository_are_valid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(read(str(file)))


# ---- running ----------------------------------------------------------------------------------------


def test_execute_runs_everything_with_as_many_runs_as_core_groups(tmp_path, capsys):
    sweep, fake = sweep_of(tmp_path), Fake(rates)
    ended, failures = tool.execute(sweep, [[0], [1]], fake)
    assert failures == [] and fake.at_once == 2
    assert len(fake.started) == len(ended) == 14 and ended == tool.finished(sweep)
    assert [run.value for run in fake.started if run.seed < 100] == [1e-3] * 6
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/14] alpha 0, learning_rate 0.0003, seed 100: win rate 5")
    assert "; about " in lines[0] and " left" in lines[0] and "left" not in lines[-1]


def test_execute_after_an_interrupt_resumes(tmp_path, capsys):
    sweep, count = sweep_of(tmp_path), iter(range(100))

    def interrupted(run):
        if next(count) == 5:
            raise KeyboardInterrupt
        return rates(run)

    first = Fake(interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.execute(sweep, [[0], [1]], first)
    assert "1 running run(s) save their step" in capsys.readouterr().err
    done = tool.finished(sweep)
    assert len(done) == 5
    again = Fake(rates)
    tool.execute(sweep, [[0], [1]], again)
    assert {run.run_dir for run in again.started}.isdisjoint(done) and len(again.started) == 14 - 5
    tool.execute(sweep, [[0]], last := Fake(rates))
    assert last.started == []


def test_execute_failed_run_is_a_line_with_its_log_and_others_continue(tmp_path, capsys):
    sweep = sweep_of(tmp_path, COLLECTED)
    fake = Fake(lambda run: None if run.arm.name == "collect" and run.seed == 1 else rates(run))
    ended, failures = tool.execute(sweep, [[0]], fake)
    log = tmp_path / "runs" / "collect" / "seed_1.log"
    assert failures[0] == f"collect, seed 1: failed with status 2, see {log}: xpo_jax: the judge is gone"
    assert len(failures) == 2 and failures[1].startswith("offline, learning_rate 0.001, seed 1: not run")
    assert len(ended) == total(sweep) == len(fake.started) + 1
    # the next sweep retries it, and runs what depends on it
    again = Fake(rates)
    assert tool.execute(sweep, [[0]], again)[1] == []
    assert [(run.arm.name, run.seed) for run in again.started] == [("collect", 1), ("offline", 1)]


def test_read_result_of_a_run_with_another_config_is_an_error(tmp_path):
    sweep = sweep_of(tmp_path)
    run = plan(sweep, {})[0]
    finish(run, 0.6)
    assert read_result(run)["win_rate"] == 0.6
    changed = sweep_of(tmp_path, FILE | {"common": {"steps": 9}})
    fake = Fake(rates)
    with pytest.raises(ValueError, match=r"seed_100: is a run of another config \(steps: 8 there, 9 here\)"):
        tool.execute(changed, [[0]], fake)
    assert fake.started == []


def test_main_list_shows_the_status_of_runs(tmp_path, capsys):
    sweep = sweep_of(tmp_path)
    finish(plan(sweep, {})[0], 0.6)
    plan(sweep, {})[1].run_dir.mkdir(parents=True)
    assert tool.main([str(tmp_path / "mine.json"), f"--runs={tmp_path / 'runs'}", "--list"]) == 0
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines[2:5]] == ["done, 60.0 %", "interrupted, failed or running", "to do"]
    assert lines[-1] == ["1 of 14 runs done; 6 more follow once values are chosen"]


def test_divide_cores_is_even(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 1, 2, 3, 5})
    assert tool.divide_cores(2) == [[1, 2], [3, 5, 7]]
    assert tool.divide_cores(5) == [[1], [2], [3], [5], [7]]
    for jobs in (0, 6):
        with pytest.raises(ValueError, match=f"--jobs={jobs}: must be from 1 to 5"):
            tool.divide_cores(jobs)


def test_start_pins_the_run_and_appends_its_output(tmp_path, monkeypatch):
    run, core = plan(sweep_of(tmp_path), {})[0], min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import os; print(os.sched_getaffinity(0))" "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for _ in range(2):
        assert tool.start(run, [core]).wait() == 0
    assert run.log.read_text() == f"{{{core}}}\n" * 2 and os.sched_getaffinity(0) == before


@pytest.mark.slow  # processes of their own that load jax
def test_a_real_sweep_is_stopped_and_resumes(tmp_path):
    config = tiny_run.write_config(tmp_path)
    content = {
        "config": str(config),
        "common": {"steps": 4},
        "arms": {"DPO": {"loss.alpha": 0.0, "loss.second_candidate": "policy"}, "XPO": {"loss.alpha": 1e-3}},
        "seeds": [1, 2],
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "tools.sweep",
        str(tmp_path / "mine.json"),
        f"--runs={tmp_path / 'runs'}",
    ]
    command += ["--jobs=1", f"--json={out}"]
    cache = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    first = subprocess.Popen(command, cwd=ROOT, env=cache, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (tmp_path / "runs" / "dpo" / "seed_2" / "metrics.jsonl").exists():
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 130 and "run the same command to resume" in err
    assert not (tmp_path / "runs" / "dpo" / "seed_2" / "result.json").exists()
    again = subprocess.run(command, cwd=ROOT, env=cache, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "1 of 4 runs are already finished" in again.stderr
    content = json.loads(out.read_text())
    by_hand = [
        json.loads((tmp_path / "runs" / "xpo" / f"seed_{seed}" / "result.json").read_text())
        for seed in (1, 2)
    ]
    assert [arm["seeds"] for arm in content["arms"]] == [[1, 2], [1, 2]]
    assert content["arms"][1]["runs"] == by_hand
    assert content["arms"][1]["win_rate"]["mean"] == np.mean([result["win_rate"] for result in by_hand])
