"""What an installer is promised: bounded ranges, and constraints that are plain and inside them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

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
    assert set(EXTRAS) == {"cuda12", "cuda13", "tpu", "judge", "wandb", "gcs", "report", "peer", "dev"}
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


def test_only_the_package_is_installed():
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["xpo_jax"]}


def test_embedded_files_stay_small():
    size = sum(path.stat().st_size for path in (ROOT / "xpo_jax" / "embedded").rglob("*") if path.is_file())
    assert size < 8e6


def test_table_of_tested_versions_is_that_of_the_constraints():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (3\.\d+) \| (\S+) \| (\S+) \|", text, re.MULTILINE)
    pins = {python: constraints(python) for python in PYTHONS}
    assert rows == [(python, str(pins[python]["jax"]), str(pins[python]["flax"])) for python in PYTHONS]
