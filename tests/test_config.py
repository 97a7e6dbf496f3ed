"""Configs: command line, files, overrides; every error by its text. The schema of a group: test_config_schema.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_run import config_error

from xpo_jax.config import loader
from xpo_jax.config.loss import make_loss

if TYPE_CHECKING:
    pass

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg):
    config = ConfigDict()
    config.steps = 4
    config.model = ConfigDict(dict(path=arg or "embedded", dtype=None))
    config.loss = dict(name="xpo", alpha=1e-5, beta=0.1)
    config.data = dict(
        train="train.jsonl", buckets=(64, 128), shuffle=True, template=[dict(role="user", content="{text}")]
    )
    config.sampling = dict(max_new_tokens=32)
    config.judge = dict(max_tokens=config.sampling.get_ref("max_new_tokens"))
    return config
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "c.py").write_text(CONFIG, encoding="utf-8")
    return tmp_path


# ---------------------------------------------------------------------------------------- command line


def test_split_argv_any_order_and_both_spellings():
    expected = loader.Arguments("c.py:Qwen/Q:1", ("loss.alpha=-1", "data.train=a=b"), False)
    flags = ["--config=c.py:Qwen/Q:1", "--config.loss.alpha=-1", "--config.data.train=a=b"]
    assert loader.split_argv(flags) == expected
    assert loader.split_argv([*flags[1:], flags[0]]) == expected
    apart = ["--config.loss.alpha", "-1", "--config", "c.py:Qwen/Q:1", "--config.data.train", "a=b"]
    assert loader.split_argv(apart) == expected


def test_split_argv_help_needs_no_config():
    assert loader.split_argv(["--config.x=1", "--help"]).help
    assert loader.split_argv(["-h"]).help
    assert not loader.split_argv(["--config=c.py"]).help


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "--config is missing; for example --config=paraphrase"),
        (["--config=a.py", "--config=b.py"], "--config is given twice: a.py and b.py"),
        (["--config"], "--config needs a value: --config=..."),
        (["--config="], "--config needs a value: --config=..."),
        (["--config.steps", "--config=a.py"], "--config.steps needs a value: --config.steps=..."),
        (
            ["--config=a.py", "alpha=3"],
            "argument 'alpha=3' is not understood; write --config=FILE or --config.group.field=value",
        ),
        (
            ["--configs=a.py"],
            "argument '--configs=a.py' is not understood; write --config=FILE or --config.group.field=value",
        ),
    ],
)
def test_split_argv_wrong_command_line_is_one_line(argv, text):
    assert config_error(loader.split_argv, argv) == text


# ----------------------------------------------------------------------------------------------- files


def test_load_argument_may_hold_slashes_and_colons():
    assert loader.load("c.py").model.path == "embedded"
    assert loader.load("c.py:Qwen/Qwen2.5-0.5B-Instruct").model.path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert loader.load("c.py:a:b.py:c").model.path == "a:b.py:c"


def test_load_returns_a_locked_config_and_leaves_no_files(folder):
    loaded = loader.load("c.py")
    with pytest.raises(AttributeError):
        loaded.loss.alhpa = 3
    assert sorted(p.name for p in folder.iterdir()) == ["c.py"]


def test_serialize_reads_back_equal_and_stays_the_same_text(folder):
    loaded = loader.load("c.py:x", ["loss.alpha=3", "data.buckets=1,2,3"])
    text = loader.serialize(loaded)
    (folder / "config.json").write_text(text, encoding="utf-8")
    again = loader.load("config.json")
    assert again == loaded
    assert again.data.buckets == (1, 2, 3)
    assert loader.serialize(again) == text
    assert loader.load("config.json", ["steps=5"]).steps == 5


@pytest.mark.parametrize(
    ("spec", "source", "text"),
    [
        ("none.py", None, "none.py: there is no such file in {cwd}"),
        ("none.json", None, "none.json: there is no such file in {cwd}"),
        (
            "c.yaml",
            None,
            "c.yaml: a config is a .py file (or file.py:argument) or a .json file, or the name of a packaged one:"
            " human, ifeval, offline_dpo, paraphrase",
        ),
        ("a/paraphrase", None, "a/paraphrase: a config is a .py file"),
        ("paraphrase:", None, "paraphrase:: nothing follows the colon; leave it out or name an argument"),
        (
            "parafrase",
            None,
            "parafrase: no packaged config has this name; there are human, ifeval, offline_dpo, paraphrase; a file of"
            " your own ends with .py or .json",
        ),
        ("c.py:", CONFIG, "c.py:: nothing follows the colon; leave it out or name an argument"),
        ("d.py", "x = 1", "d.py: has no get_config(arg)"),
        (
            "d.py",
            "def get_config(): pass",
            "d.py: get_config must take one argument: def get_config(arg)",
        ),
        (
            "d.py",
            "def get_config(arg):\n  return 3",
            "d.py: get_config must return a ConfigDict, it returned 3",
        ),
        (
            "d.py",
            "def get_config(arg):\n\n  return 1 / 0",
            "d.py, line 3: ZeroDivisionError: division by zero",
        ),
        (
            "d.py:tiny",
            "def get_config(arg):\n  raise ValueError(f'unknown\\n  argument {arg}')",
            "d.py, line 2: unknown argument tiny",
        ),
        ("d.py", "import nothing_here", "d.py, line 1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("d.py", "x =\n", "d.py, line 1: SyntaxError: invalid syntax (d.py, line 1)"),
        (
            "d.py",
            "from ml_collections import ConfigDict\nget_config = lambda arg: ConfigDict({'a': {'f': print}})",
            "a.f: a config holds numbers, text, true, false, None, lists and groups, not <built-in function",
        ),
        ("d.json", '{"a": 1,\n x}', "d.json, line 2: not JSON: "),
        ("d.json", "[1]", "d.json: a JSON object is expected, found [1]"),
        ("d.json", '{"a": {"b": NaN}}', "a.b: a finite number is expected, found nan"),
    ],
)
def test_load_wrong_file_is_one_line(folder, spec, source, text):
    if source is not None:
        (folder / spec.partition(":")[0]).write_text(source, encoding="utf-8")
    assert config_error(loader.load, spec).startswith(text.format(cwd=folder))


def test_load_file_that_is_not_utf8_is_one_line(folder):
    (folder / "d.py").write_bytes(b"# Gr\xfc\xdfe")
    assert config_error(loader.load, "d.py").startswith("d.py: not UTF-8: ")


def test_load_name_is_a_packaged_config_from_any_folder():
    configs = Path(__file__).parents[1] / "configs"
    for name in ("paraphrase", "offline_dpo", "human", "ifeval"):
        assert loader.load(name) == loader.load(f"{configs / name}.py")
    assert loader.load("paraphrase:Qwen/Q@1:2").model.path == "Qwen/Q@1:2"
    assert loader.load("offline_dpo:a.py:b", ["steps=3"]).offline.pairs == "a.py:b"


def test_load_name_of_a_file_in_this_directory_is_one_line_with_both(folder, monkeypatch):
    configs = Path(__file__).parents[1] / "configs"
    (folder / "paraphrase.py").write_text(CONFIG, encoding="utf-8")
    assert config_error(loader.load, "paraphrase:x") == (
        "paraphrase: names a packaged config, but paraphrase.py is in this directory as well; write"
        f" --config=paraphrase.py for that file, or --config={configs / 'paraphrase.py'} for the packaged one"
    )
    assert loader.load("paraphrase.py:x").model.path == "x"
    assert config_error(loader.load, "c:x").endswith("; for c.py in this directory write --config=c.py")
    monkeypatch.chdir(configs)  # there both are one file
    assert loader.load("paraphrase").run_dir == "runs/paraphrase"


# ------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=5", 5),
        ("loss.alpha=3", 3.0),
        ("loss.alpha=1e-4", 1e-4),
        ("loss.alpha=None", None),
        ('loss.alpha={"kind": "linear", "start": 1, "end": 0, "steps": 9}', None),
        ("model.dtype=none", None),
        ("model.dtype=bfloat16", "bfloat16"),
        ("model.dtype=7", 7),
        ("model.dtype=true", True),
        ("model.dtype=[1, 2]", (1, 2)),
        ("data.shuffle=FALSE", False),
        ("data.train=7", "7"),
        ("data.train=", ""),
        ("data.buckets=32,64", (32, 64)),
        ("data.buckets=32", (32,)),
        ("data.buckets=(32, 64)", (32, 64)),
        ("data.buckets=[32, 64]", (32, 64)),
        ("data.template=None", None),
        ("data.template=Say, please: {text}", "Say, please: {text}"),
        ('data.template=[{"role": "user", "content": "x"}]', ({"role": "user", "content": "x"},)),
    ],
)
def test_override_takes_the_type_of_the_present_value(override, value):
    field, text = override.split("=", 1)
    loaded = loader.load("c.py", [override])[field]
    if text.startswith("{"):
        assert loaded.to_dict() == {"kind": "linear", "start": 1, "end": 0, "steps": 9}
    else:
        assert loaded == value
        assert type(loaded) is type(value)


def test_override_reference_follows_and_the_last_counts():
    loaded = loader.load("c.py", ["sampling.max_new_tokens=7", "sampling.max_new_tokens=9"])
    assert (loaded.sampling.max_new_tokens, loaded.judge.max_tokens) == (9, 9)


def test_override_schedule_by_field_or_by_a_number():
    ramp = 'loss.alpha={"kind": "linear", "start": 1, "end": 0, "steps": 9}'
    assert loader.load("c.py", [ramp, "loss.alpha.steps=5"]).loss.alpha.steps == 5
    assert loader.load("c.py", [ramp, "loss.alpha=0.5"]).loss.alpha == 0.5


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("loss.alhpa=1", "loss.alhpa: no such field; did you mean 'loss.alpha'?"),
        ("los.alpha=1", "los.alpha: no such field; did you mean 'loss.alpha'?"),
        ("max_new_tokens=1", "max_new_tokens: no such field; did you mean 'sampling.max_new_tokens'?"),
        ("loss.zzzzz=1", "loss.zzzzz: no such field; loss has alpha, beta, name"),
        (
            "zzzzz=1",
            "zzzzz: no such field; the config has data, judge, loss, model, sampling, steps",
        ),
        ("loss=1", "loss is a group; override one of its fields: alpha, beta, name"),
        ("steps.x=1", "steps.x: steps is 4, not a group of fields; override it whole"),
        ("steps", "override 'steps' needs a value: steps=..."),
        ("steps=1.5", "steps: an integer is expected, found '1.5'"),
        ("loss.alpha=high", "loss.alpha: a finite number is expected, found 'high'"),
        ("loss.alpha=inf", "loss.alpha: a finite number is expected, found 'inf'"),
        ("data.shuffle=1", "data.shuffle: true or false is expected, found '1'"),
        ("data.buckets=64,x", "data.buckets: an integer is expected, found 'x'"),
        ("data.buckets=[64", "data.buckets: '[64' is neither JSON nor a Python literal"),
    ],
)
def test_override_wrong_is_one_line(override, text):
    assert config_error(loader.load, "c.py", [override]) == text


def test_diff_names_each_field():
    a = loader.load("c.py")
    b = loader.load("c.py", ["loss.alpha=1e-4", "data.template=None", 'loss.beta={"kind": "x"}'])
    assert loader.diff(a, a) == []
    assert loader.diff(a, b) == [
        "data.template: ({'role': 'user', 'content': '{text}'},) -> None",
        "loss.alpha: 1e-05 -> 0.0001",
        "loss.beta: 0.1 -> absent",
        "loss.beta.kind: absent -> 'x'",
    ]


# ------------------------------------------------------------------------------------- configs of users


def test_loader_import_needs_no_jax():
    code = "import sys, xpo_jax.config.loader; assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("name", ["embedded", "Qwen/Qwen2.5-0.5B-Instruct"])
@pytest.mark.parametrize("field", ["alpha", "beta"])
def test_a_users_config_may_make_a_schedule_of_a_number_and_the_other_way_round(tmp_path, name, field):
    """As docs/choosing.md shows; and the command line may replace either by the other."""
    schedule = {"kind": "linear", "start": 0.01, "end": 0.005, "steps": 4}
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs.paraphrase import get_config as shipped\n\n\n"
        "def get_config(name):\n"
        f"    config = shipped({name!r})\n    config.loss.{field} = {schedule!r}\n    return config\n"
    )
    config = loader.load(str(file))
    assert config.loss[field].to_dict() == schedule
    settings, loss = make_loss(config.loss)
    assert dict(zip(("alpha", "beta"), settings.coefficients(loss, 4), strict=True))[field](2) == 0.0075
    assert loader.load(str(file), [f"loss.{field}=0.125"]).loss[field] == 0.125


def test_a_config_that_loads_another_may_replace_auto_by_a_number():
    """As configs/human.py starts from configs/paraphrase.py."""
    config = loader.load("paraphrase").unlock()
    config.layout.micro_batch_rows, config.model.reference_every_steps = 3, 5
    assert loader.serialize(config) == loader.serialize(
        loader.load("paraphrase", ["layout.micro_batch_rows=3", "model.reference_every_steps=5"])
    )


def test_alpha_of_a_pretrained_model_falls_to_0_over_its_run():
    config = loader.load("paraphrase:Qwen/Qwen2.5-0.5B-Instruct")
    settings, loss = make_loss(config.loss)
    alpha, beta = settings.coefficients(loss, config.steps)
    assert (alpha(0), alpha(config.steps), beta(0)) == (1e-5, 0.0, 0.1)
