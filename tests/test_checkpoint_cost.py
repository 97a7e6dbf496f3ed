"""tools.checkpoint_cost: its ratios, and that it does what it times."""

from tools import checkpoint_cost


def test_show_ratios_are_those_of_medians():
    seconds = {
        "none": [(10.0, 15.0), (30.0, 16.0), (20.0, 14.0)],
        "every 10": [(21.0, 15.0), (11.0, 18.0), (50.0, 14.0)],
    }
    lines = checkpoint_cost.show(seconds).splitlines()
    assert lines[-1] == "with checkpoints: 1.050 times the seconds, 1.000 times the CPU seconds"
    assert "10.0, 30.0, 20.0" in lines[2] and "21.0, 11.0, 50.0" in lines[3]


def test_main_saves_and_restores_a_state(tmp_path, capsys):
    assert checkpoint_cost.main(["--rounds=0", "--restore_mb=1"]) == 0
    out = capsys.readouterr().out
    assert "0.001 GB" in out and "verified and restored" in out
    assert min(checkpoint_cost.restore(tmp_path, 1)) > 0
    assert (
        sum(file.stat().st_size for file in (tmp_path / "1" / "state").rglob("*") if file.is_file())
        > 1_000_000
    )


def test_main_invalid_input_is_one_line(capsys):
    assert checkpoint_cost.main(["--steps=5"]) == 2
    assert (
        capsys.readouterr().err
        == "checkpoint_cost: --rounds and --restore_mb must be at least 0, --steps at least 10\n"
    )
