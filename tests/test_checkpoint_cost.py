"""The tool that says what checkpoints cost: its ratios, and that what it times is done."""

from tools import checkpoint_cost


def test_ratios_are_of_medians():
    found = {
        "none": [(10.0, 15.0), (30.0, 16.0), (20.0, 14.0)],
        "every 10": [(21.0, 15.0), (11.0, 18.0), (50.0, 14.0)],
    }
    lines = checkpoint_cost.show(found).splitlines()
    assert lines[-1] == "with checkpoints: 1.050 of the seconds, 1.000 of the CPU seconds"
    assert "10.0, 30.0, 20.0" in lines[2] and "21.0, 11.0, 50.0" in lines[3]


def test_a_state_is_saved_and_restored(tmp_path, capsys):
    assert checkpoint_cost.main(["--rounds=0", "--restore_mb=1"]) == 0
    out = capsys.readouterr().out
    assert "0.001 GB" in out and "verified and restored" in out
    assert min(checkpoint_cost.restore(tmp_path, 1)) > 0
    assert (
        sum(file.stat().st_size for file in (tmp_path / "1" / "state").rglob("*") if file.is_file())
        > 1_000_000
    )


def test_what_cannot_be_run_is_refused_in_one_line(capsys):
    assert checkpoint_cost.main(["--steps=5"]) == 2
    assert (
        capsys.readouterr().err
        == "checkpoint_cost: --rounds and --restore_mb are from 0 on, --steps from 10 on\n"
    )
