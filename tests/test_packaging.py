"""What an installation relies on: bounded ranges, constraints within them, and a wheel that needs no clone."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from xpo_jax.config import loader as configs

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PYTHONS = ["3.11", "3.12", "3.13"]
EXTRAS = PROJECT["optional-dependencies"]
EVERY = [
    *PYPROJECT["build-system"]["requires"],
    *PROJECT["dependencies"],
    *(line for extra in EXTRAS.values() for line in extra),
]
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*")  # no URL, marker, option or path


def constraints(python: str) -> dict[str, Version]:
    lines = (ROOT / f"constraints-{python}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not PLAIN.fullmatch(pin)] == []
    versions = {canonicalize_name(name): Version(version) for name, version in (p.split("==") for p in pins)}
    assert len(versions) == len(pins), "a package is named twice"
    return versions


@pytest.mark.parametrize("requirement", EVERY)
def test_ranges_are_bounded(requirement):
    parsed = Requirement(requirement)
    assert sorted(part.operator for part in parsed.specifier) == ["<", ">="]
    assert parsed.url is None


def test_extras():
    assert set(EXTRAS) == {
        "cuda12",
        "cuda13",
        "tpu",
        "judge",
        "human",
        "wandb",
        "gcs",
        "report",
        "real",
        "peer",
        "dev",
    }
    jax = next(Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == "jax")
    for name in ("cuda12", "cuda13", "tpu"):  # a wider range here would be a second, silent promise
        (parsed,) = map(Requirement, EXTRAS[name])
        assert (parsed.name, parsed.extras, parsed.specifier) == ("jax", {name}, jax.specifier)


def test_each_supported_python_has_constraints():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 30) if f"3.{minor}" in supported] == PYTHONS
    assert sorted(path.name for path in ROOT.glob("constraints*")) == [
        f"constraints-{p}.txt" for p in PYTHONS
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_satisfy_the_ranges(python):
    pins = constraints(python)
    for requirement in map(Requirement, PROJECT["dependencies"] + EXTRAS["dev"]):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert "torch" not in pins
    # flax and jax go in pairs: flax 0.12.8 fails on jax 0.11.1 and later
    assert pins["flax"] > Version("0.12.8") or pins["jax"] < Version("0.11.1")


def test_embedded_files_stay_small():
    size = sum(path.stat().st_size for path in (ROOT / "xpo_jax" / "embedded").rglob("*") if path.is_file())
    assert size < 8e6


def test_table_of_tested_versions_is_that_of_the_constraints():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (3\.\d+) \| (\S+) \| (\S+) \|", text, re.MULTILINE)
    pins = {python: constraints(python) for python in PYTHONS}
    assert rows == [(python, str(pins[python]["jax"]), str(pins[python]["flax"])) for python in PYTHONS]


# ---- the wheel, in an environment of its own and from an empty folder ----------------------------------

SCRIPTS = PROJECT["scripts"]
# Calls every console script with --help, then loads every packaged config.
PROBE = """
import contextlib, importlib.metadata, io, json, sys

helps = {}
for script in importlib.metadata.distribution("xpo_jax").entry_points:
    sys.argv, out = [f"bin/{script.name}", "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        script.load()()
    helps[script.name] = out.getvalue()
import xpo_jax.configs.paraphrase
from xpo_jax.config import loader, packaged

modules = {name: module.__file__ for name, module in sys.modules.items() if hasattr(module, "__file__")}
print(json.dumps({
    "helps": helps,
    "configs": {name: json.loads(loader.serialize(loader.load(name))) for name in packaged.names()},
    "files": {name: file for name, file in modules.items() if name.split(".")[0] in ("xpo_jax", "tools")},
}))
"""


def run(command: list[str | Path], cwd: Path) -> str:
    """Return the standard output of a command that succeeds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return the wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder], ROOT)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """Return the commands of an environment with the wheel, which has this one's dependencies but not the clone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    (site,) = {sysconfig.get_path(name, "venv", vars=paths) for name in ("purelib", "platlib")}
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # .pth files in a folder that a .pth file names are not read, so an editable installation stays out
    Path(site, "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    python = Path(sysconfig.get_path("scripts", "venv", vars=paths), "python")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "--python", python, *install, wheel], folder)
    return python.parent


def test_wheel_has_the_package_with_configs_and_tools_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {
        path for folder in ("xpo_jax", "configs") for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    names = {str(path.relative_to(ROOT)) for path in ours if "__pycache__" not in path.parts}
    expected = {f"xpo_jax/{name}" if name.startswith("configs/") else name for name in names}
    assert expected <= files
    tools = files - expected
    assert {name.split("/")[1] for name in tools} == {"tools"}
    developers = (
        "bench|build|faults|launch|research|run_tests|same_results|torture|sample_efficiency|rare_mode"
    )
    assert [name for name in tools if re.match(rf"xpo_jax/tools/({developers}|\w+cost)", name)] == []
    commands = {
        name for name in tools if "sys.exit(main())" in (ROOT / name.removeprefix("xpo_jax/")).read_text()
    }
    modules = {target.partition(":")[0].replace(".", "/") + ".py" for target in SCRIPTS.values()}
    assert modules == {"xpo_jax/main.py", *commands}


def test_editable_installation_copies_nothing_and_runs_the_files_of_the_clone():
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["dev-mode-dirs"] == ["."]
    modules = [target.partition(":")[0] for target in SCRIPTS.values()]
    origins = [Path(importlib.util.find_spec(name).origin) for name in modules]
    names = [name.replace(".", "/") + ".py" for name in modules]
    assert origins == [ROOT / name.replace("xpo_jax/tools/", "tools/") for name in names]


def test_wheel_scripts_and_configs_need_no_clone(bin_folder, tmp_path):
    probed = json.loads(run([bin_folder / "python", "-c", PROBE], tmp_path).splitlines()[-1])
    assert all(Path(file).is_relative_to(bin_folder.parent) for file in probed["files"].values()), probed[
        "files"
    ]
    assert not [name for name in probed["files"] if name.startswith("tools")]
    assert probed["helps"].keys() == SCRIPTS.keys()
    for script, text in probed["helps"].items():
        assert re.search(rf"^ *(usage: )?{script} ", text, re.MULTILINE), f"{script}: {text}"
        # only what exists without a clone
        assert not re.search(r"configs/\w+\.py|\btools[./]\w|python -m", text), f"{script}: {text}"
    # a user's own config can import one
    assert probed["files"]["xpo_jax.configs.paraphrase"].endswith("xpo_jax/configs/paraphrase.py")
    by_file = {path.stem: configs.load(str(path)) for path in (ROOT / "configs").glob("*.py")}
    assert probed["configs"] == {name: json.loads(configs.serialize(by_file[name])) for name in by_file}


def test_wheel_plan_of_a_packaged_config_from_an_empty_folder(bin_folder, tmp_path):
    as_script = run([bin_folder / "xpo-plan", "--config=offline_dpo"], tmp_path)
    as_module = [bin_folder / "python", "-m", "xpo_jax.tools.plan", "--config=offline_dpo"]
    assert as_script.startswith("parameters  1,575,168, ") and run(as_module, tmp_path) == as_script
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wheel_run_of_a_packaged_config_from_an_empty_folder(bin_folder, tmp_path):
    overrides = "steps=2 batch_size=8 evaluation.prompts=8 optimizer.warmup_steps=0 sampling.max_new_tokens=8"
    out = run(
        [bin_folder / "xpo", "--config=paraphrase", *(f"--config.{text}" for text in overrides.split())],
        tmp_path,
    )
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == 2 and (tmp_path / result["export"] / "model.safetensors").is_file()
