"""A factory's signature is the schema of its group, and a schedule that of a number; every error by its text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from ml_collections import ConfigDict
from tiny_run import config_error

from xpo_jax.config import loader
from xpo_jax.config.loader import ConfigError
from xpo_jax.config.schema import check_increasing

if TYPE_CHECKING:
    from nowhere import OnlyForCheckers


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


# ------------------------------------------------------------------------------ the signature is the schema


def factory(
    *,
    alpha: float | Mapping[str, Any],
    kind: Literal["sigmoid", "ipo"],
    count: int | None,
    buckets: Sequence[int],
    pair: tuple[int, float],
    template: str | Sequence[Mapping[str, str]] | None,
    clip: bool = True,
    odd: OnlyForCheckers = 3,
    tokenizer: Any = None,
) -> dict[str, Any]:
    if count == 7:
        raise ValueError("count: seven is not possible")
    if count == 6:
        raise ValueError("count is 6, must be even more")
    if count == 8:
        raise ValueError("eight is not\npossible")
    if count == 9:
        raise ConfigError("loss.count: nine is not possible")
    return dict(locals())


TEMPLATE = "text or a list (each a mapping (each text)) or None"
FIELDS = {
    "alpha": 1,
    "kind": "ipo",
    "count": None,
    "buckets": [64, 128],
    "pair": (1, 2),
    "template": None,
    "clip": False,
    "odd": "anything",
}


@dataclass(frozen=True)
class Named:
    weight: float
    names: Sequence[str]


class WithInit:
    def __init__(self, weight: float) -> None:
        self.weight = weight


def test_build_passes_the_fields_and_what_is_provided():
    built = loader.build(factory, ConfigDict(FIELDS), "loss", tokenizer="t", seed=3)
    assert built == {**FIELDS, "buckets": (64, 128), "tokenizer": "t"}
    assert loader.build(Named, {"name": "named", "weight": 1, "names": ["a"]}, "judge") == Named(1, ("a",))
    assert loader.build(WithInit, {"name": "x", "weight": 0.5}, "judge").weight == 0.5
    ramp = {**FIELDS, "alpha": {"kind": "linear"}, "template": ({"role": "user", "content": "x"},)}
    assert loader.build(factory, ConfigDict(ramp), "loss", tokenizer=0)["alpha"] == {"kind": "linear"}


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("alhpa", 1, "loss.alhpa: no such field; did you mean 'alpha'?"),
        ("tokenizer", 1, "loss.tokenizer is set by the program; take it out of the config"),
        ("alpha", "high", "loss.alpha: a number or a mapping is expected, found 'high'"),
        ("alpha", True, "loss.alpha: a number or a mapping is expected, found True"),
        ("alpha", float("nan"), "loss.alpha: a finite number is expected, found nan"),
        ("kind", "dpo", "loss.kind: 'sigmoid' or 'ipo' is expected, found 'dpo'"),
        ("count", 1.5, "loss.count: an integer or None is expected, found 1.5"),
        ("count", True, "loss.count: an integer or None is expected, found True"),
        ("buckets", "64", "loss.buckets: a list (each an integer) is expected, found '64'"),
        ("buckets", [64, "x"], "loss.buckets: a list (each an integer) is expected, found (64, 'x')"),
        ("pair", [1], "loss.pair: a list of 2 values (an integer, a number) is expected, found (1,)"),
        (
            "template",
            [{"role": 3}],
            f"loss.template: {TEMPLATE} is expected, found ({{'role': 3}},)",
        ),
        ("clip", 1, "loss.clip: true or false is expected, found 1"),
        ("odd", float("inf"), "loss.odd: a finite number is expected, found inf"),
        ("count", 6, "loss.count is 6, must be even more"),
        ("count", 7, "loss.count: seven is not possible"),
        ("count", 8, "loss: eight is not possible"),
        ("count", 9, "loss.count: nine is not possible"),
    ],
)
def test_build_group_that_does_not_fit_is_one_line(field, value, text):
    assert config_error(loader.build, factory, {**FIELDS, field: value}, "loss", tokenizer=0) == text


def test_check_missing_field_is_named_even_with_a_default():
    for field in FIELDS:
        group = {name: value for name, value in FIELDS.items() if name != field}
        text = config_error(loader.check, factory, group, "loss", provided=("tokenizer",))
        assert text.startswith(f"loss.{field} is missing: ")
    assert config_error(loader.check, Named, {"weight": 1}, "judge") == (
        "judge.names is missing: a list (each text) is expected"
    )
    assert config_error(loader.check, Named, 3, "judge") == "judge: a group of fields is expected, found 3"
    assert (
        config_error(loader.check, WithInit, {"weight": "x"}, "j")
        == "j.weight: a number is expected, found 'x'"
    )


def test_build_named_error_passes_unchanged():
    from xpo_jax.data.rows import DataError

    def load(train: str) -> None:
        raise DataError(f"{train}, row 3: no column 'text'; the row has: id")

    with pytest.raises(DataError, match=r"^t\.jsonl, row 3: no column 'text'; the row has: id$"):
        loader.build(load, {"train": "t.jsonl"}, "data")


def test_resolve_known_name_or_module_of_the_current_directory(folder):
    (folder / "judges_of_mine.py").write_text("class Mine: pass\nnumber = 3\n", encoding="utf-8")
    (folder / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    (folder / "needs.py").write_text("import not_installed\n", encoding="utf-8")
    judges = {"paraphrase": Named, "length": WithInit}
    assert loader.resolve("length", "judge.name", judges) is WithInit
    assert loader.resolve("judges_of_mine:Mine", "judge.name", judges).__name__ == "Mine"
    for name, text in {
        "paraphrse": "judge.name: 'paraphrse' is unknown; choose paraphrase, length, "
        "or one of yours as package.module:Name; did you mean 'paraphrase'?",
        "judges_of_mine:Mime": "judge.name: module 'judges_of_mine' has no 'Mime'; did you mean 'Mine'?",
        "judges_of_mine:number": "judge.name: judges_of_mine:number is 3, which cannot be called",
        "nowhere.judges:Mine": f"judge.name: no module 'nowhere', seen from {folder}",
        "broken:Mine": "judge.name: importing 'broken' failed: ZeroDivisionError: division by zero",
        "needs:Mine": "judge.name: importing 'needs' failed: "
        "ModuleNotFoundError: No module named 'not_installed'",
    }.items():
        assert config_error(loader.resolve, name, "judge.name", judges) == text


@pytest.mark.parametrize("numbers", [(), (0, 64), (64, 64), (64, 32)])
def test_check_increasing_wrong_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match=r"^buckets: increasing positive integers are expected, found \["):
        check_increasing(numbers, "buckets")
    check_increasing((1,), "buckets")
    check_increasing([32, 64], "buckets")


# ------------------------------------------------------------------------------------------- schedules


def test_schedule_reaches_its_end_and_stays():
    linear = loader.schedule({"kind": "linear", "start": 1, "end": 0.2, "steps": 4}, "loss.alpha")
    assert [linear(step) for step in (0, 1, 2, 4, 5, 100)] == pytest.approx([1, 0.8, 0.6, 0.2, 0.2, 0.2])
    assert (linear(0), linear(4), linear(9)) == (1.0, 0.2, 0.2)
    cosine = loader.schedule(
        ConfigDict({"kind": "cosine", "start": 0.0, "end": 2.0, "steps": 4}), "loss.alpha"
    )
    # 1 - cos(pi / 4) = 0.29289...
    assert [cosine(step) for step in range(6)] == pytest.approx([0, 0.2928932188, 1, 1.7071067812, 2, 2])
    constant = loader.schedule(3, "loss.alpha")
    assert [constant(0), constant(9)] == [3.0, 3.0]
    assert type(constant(0)) is type(linear(1)) is type(cosine(1)) is float


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("high", "loss.alpha: a number or a schedule is expected, found 'high'"),
        (True, "loss.alpha: a number or a schedule is expected, found True"),
        (None, "loss.alpha: a number or a schedule is expected, found None"),
        (float("inf"), "loss.alpha: a finite number is expected, found inf"),
        (
            {"kind": "step", "start": 1, "end": 0, "steps": 4},
            "loss.alpha.kind: 'linear' or 'cosine' is expected, found 'step'",
        ),
        ({"kind": "linear", "start": 1, "end": 0}, "loss.alpha.steps is missing: an integer is expected"),
        (
            {"kind": "linear", "start": 1, "end": 0, "steps": 0},
            "loss.alpha.steps: at least 1 is expected, found 0",
        ),
        (
            {"kind": "linear", "start": 1, "stop": 0, "steps": 4},
            "loss.alpha.stop: no such field; did you mean 'steps'?",
        ),
    ],
)
def test_schedule_wrong_is_one_line(value, text):
    assert config_error(loader.schedule, value, "loss.alpha") == text
