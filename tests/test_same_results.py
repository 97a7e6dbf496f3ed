"""tools.same_results: the comparison on fabricated run directories, and the commands that it runs."""

import json
from pathlib import Path

import pytest

from tools import same_results

METRICS = [
    {"step": 0, "eval/kl": None, "time/sample": 0.5},
    {"step": 1, "loss/total": 0.25, "alpha": 1e-05, "time/sample": 0.125, "tokens_per_second": 9.5},
]


def write_run(folder: Path, *, metrics=METRICS, weights=b"\x00\x01\x02\x03", pairs=("a", "b")) -> Path:
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "model.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    lines = "".join(json.dumps({"step": n, "text": text}) + "\n" for n, text in enumerate(pairs))
    (folder / "pairs.jsonl").write_text(lines)
    return folder


def differences(before, after):
    return {c.file: c.difference for c in same_results.compare(before, after) if c.difference}


def test_compare_runs_that_differ_in_timings_alone_is_equal(tmp_path):
    slower = [{**row, "time/sample": 7.0, "time/extra": 1.0} for row in METRICS]
    before, after = write_run(tmp_path / "a"), write_run(tmp_path / "b", metrics=slower)
    compared = same_results.compare(before, after)
    assert [(c.file, c.difference) for c in compared] == [
        ("export/model.safetensors", None),
        ("metrics.jsonl", None),
        ("pairs.jsonl", None),
    ]
    assert compared[0].bytes == 4 and compared[2].bytes == (before / "pairs.jsonl").stat().st_size


@pytest.mark.parametrize("at", range(4))
def test_compare_one_changed_bit_of_the_weights_is_a_difference(tmp_path, at):
    changed = bytearray(b"\x00\x01\x02\x03")
    changed[at] ^= 1
    before, after = write_run(tmp_path / "a"), write_run(tmp_path / "b", weights=bytes(changed))
    assert differences(before, after) == {"export/model.safetensors": f"byte {at} of 4 and 4"}


@pytest.mark.parametrize(
    ("row", "difference"),
    [
        ({**METRICS[1], "loss/total": 0.25000001}, "line 2: loss/total 0.25 -> 0.25000001"),
        ({**METRICS[1], "loss/total": None}, "line 2: loss/total 0.25 -> null"),
        ({"alpha": 1e-05, "step": 1, "loss/total": 0.25}, "line 2: the order of the fields"),
        ({**METRICS[1], "timely": 1.0}, "line 2: fields timely"),
    ],
)
def test_compare_a_changed_metric_is_named(tmp_path, row, difference):
    before = write_run(tmp_path / "a")
    after = write_run(tmp_path / "b", metrics=[METRICS[0], row])
    assert differences(before, after) == {"metrics.jsonl": difference}


def test_compare_a_missing_or_longer_file_is_a_difference(tmp_path):
    before, after = write_run(tmp_path / "a"), write_run(tmp_path / "b", pairs=("a", "b", "c"))
    (before / "pairs.1.jsonl").write_text("{}\n")
    assert differences(before, after) == {
        "pairs.1.jsonl": "the file does not exist after the change",
        "pairs.jsonl": "line 3: there are 2 lines before and 3 after",
    }
    (before / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        same_results.compare(before, after)


def test_main_reports_equal_and_different_runs_by_exit_status(tmp_path, monkeypatch, capsys):
    """The runs are fabricated: the second commit's offline run ends with other weights."""

    def run_commit(commit, folder, short):
        for name in same_results.scenarios(short):
            changed = commit == "after" and name == "offline"
            write_run(tmp_path / commit / name, weights=b"other" if changed else b"weights")
        return tmp_path / commit

    monkeypatch.setattr(same_results, "resolve", lambda revision, flag: revision)
    monkeypatch.setattr(same_results, "run_commit", run_commit)
    assert same_results.main(["--before=before", "--after=after"]) == 1
    out = capsys.readouterr().out
    assert "byte 0 of 7 and 5" in out and out.endswith("before and after: 11 of 12 files are equal\n")
    monkeypatch.setattr(same_results, "run_commit", lambda commit, folder, short: tmp_path / "before")
    assert same_results.main(["--before=before", "--after=after"]) == 0


def test_main_unknown_commit_is_invalid_input(capsys):
    assert same_results.main(["--before=no-such-commit"]) == 2
    assert "--before=no-such-commit" in capsys.readouterr().err


def test_run_scenario_passes_its_overrides_to_every_process(tmp_path, monkeypatch):
    """A stand-in for the package writes down its arguments."""
    package = tmp_path / "code" / "xpo_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(
        "import os, sys; print(sys.argv[1:]); sys.exit(3 * ('replay' in sys.argv[-1]))"
    )
    runs = tmp_path / "runs"
    runs.mkdir()
    overrides = same_results.scenarios(short=False)
    same_results.run_scenario(package.parent, runs, "two", overrides["two"])
    for number in range(2):
        log = (runs / f"two-{number}.log").read_text()
        assert f"--config.distributed.process_id={number}" in log and "--config.steps=12" in log
    same_results.run_scenario(package.parent, runs, "offline", overrides["offline"])
    assert (
        f"--config=configs/offline_dpo.py:{runs / 'run' / 'pairs.jsonl'}"
        in (runs / "offline-0.log").read_text()
    )
    with pytest.raises(ValueError, match="replay ended with status 3"):
        same_results.run_scenario(package.parent, runs, "replay", overrides["replay"])
