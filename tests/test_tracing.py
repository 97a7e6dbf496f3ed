"""Profiles: the names in the trace of a run's third and fourth step, and a run too short for a trace."""

import gzip
import json

import pytest
from tiny_run import run_main, tiny_config, write_config

from xpo_jax.config import loader as configs


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_profile_names_the_parts_of_two_steps(tmp_path):
    config = tiny_config(tmp_path)
    config.steps = 5
    status, _, err = run_main([f"--config={write_config(tmp_path / 'c.py', config)}", "--profile"])
    assert status == 0, err
    assert f"traced from step 3 into {tmp_path / 'run' / 'profile'}" in err
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {part: names.count(part) for part in ("sample", "judge", "score", "update")} == {
        "sample": 4,  # drawn, then decoded
        "judge": 2,
        "score": 2,
        "update": 2,
    }
    config.steps, config.run_dir = 2, str(tmp_path / "short")
    status, _, err = run_main([f"--config={write_config(tmp_path / 'c.py', config)}", "--profile"])
    assert status == 0 and "nothing was traced: there was no step 3" in err
    assert not (tmp_path / "short" / "profile").exists()


def test_profile_flag_sets_its_field():
    arguments = configs.split_argv(["--profile", "--config=x.py"])
    assert arguments.overrides == ("logging.profile=True",) and arguments.spec == "x.py"
