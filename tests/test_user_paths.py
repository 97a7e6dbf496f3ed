"""`~` and environment variables in every path of a config, of the command line and of the tools."""

import os

import pytest
from fake_models import write_model
from tiny_run import changed_config, run_main, write_config, write_prompts

from tools.cli import path_argument
from xpo_jax.config import loader as configs
from xpo_jax.data import offline_pairs, sources
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.io.user_paths import expand
from xpo_jax.judges.cache import AnswerCache, CachedAnswer
from xpo_jax.models.hf import hub
from xpo_jax.reporting import run_reader


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home folder, which is not the current directory; DATA is a folder in it."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DATA", str(home / "data"))
    monkeypatch.delenv("ABSENT", raising=False)
    return home


def test_expand_replaces_home_and_variables(home):
    assert expand("~/runs/a") == f"{home}/runs/a"
    assert expand("$DATA/a") == expand("${DATA}/a") == f"{home}/data/a"
    assert expand("gs://bucket$DATA") == f"gs://bucket{home}/data"
    for path in ("runs/a", "embedded", "owner/name@main", "a~b", "100$", "$/a", "*.jsonl"):
        assert expand(path) == path
    os.mkdir("$ABSENT")
    assert expand("$ABSENT") == "$ABSENT"  # exists as it is written


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "$ABSENT/a",
            r"^\$ABSENT/a: the environment variable ABSENT is not set; set it, or write the path out$",
        ),
        ("${ABSENT}", "ABSENT is not set"),
        ("~no_such_user/a", "no such home folder"),
    ],
)
def test_expand_what_is_not_set_is_refused(home, path, message):
    with pytest.raises(ValueError, match=message):
        expand(path)


def test_every_reader_of_a_path_expands_it(home):
    write_model(home / "model")
    write_prompts(home / "data")
    (home / "data" / "pairs.jsonl").touch()
    assert hub.find("~/model").folder == home / "model"
    for source in ("~/data/train.jsonl", "$DATA/train.jsonl", "$DATA/tr*.jsonl", ["$DATA/train.jsonl"]):
        assert len(sources.open_rows(source)) == 21
    assert offline_pairs.log_files("$DATA/pairs*.jsonl") == [f"{home}/data/pairs.jsonl"]
    AnswerCache("~/cache", base_url="", labels=(), mode="text").put({}, CachedAnswer((0.5, 0.5)))
    assert (home / "cache").is_dir()
    with RunDir.join("~/run", "{}", {}) as directory:
        assert directory.path == home / "run"
    with pytest.raises(ValueError, match=f"^{home}/run: this run has written no metrics yet"):
        run_reader.read("~/run")
    assert path_argument("$DATA/x") == home / "data" / "x"
    assert os.listdir(".") == []  # no folder called ~


def test_main_config_file_may_be_given_with_a_variable(home):
    config = changed_config(home, run_dir="$ABSENT/run")
    write_config(home / "data" / "config.py", config)
    assert configs.load("$DATA/config.py").run_dir == "$ABSENT/run"  # config.json has what was written
    status, _, err = run_main(["--config=$DATA/config.py"])
    assert status == 2 and err.startswith("xpo_jax: $ABSENT/run: the environment variable ABSENT is not set")
    status, _, err = run_main(["--config=$ABSENT/config.py"])
    assert status == 2 and "ABSENT is not set" in err and err.count("\n") == 1
