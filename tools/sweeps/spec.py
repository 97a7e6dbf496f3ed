"""The file of a sweep: its arms, its seeds, and the field that is tuned for each arm.

Left out on purpose: grids over several fields at once. Each arm is one setting, whose name states its purpose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_FILE_FIELDS = ("config", "common", "arms", "seeds", "tune")
_SET_BY_SWEEP = ("seed", "run_dir")  # fields of a config


class Tune(NamedTuple):
    """The field for which each arm takes the best of `values`, according to its runs on `seeds`."""

    field: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def short(self) -> str:
        """The name of the field without its group."""
        return self.field.split(".")[-1]


class Arm(NamedTuple):
    """One setting that is compared.

    Args:
      name, slug: the names in tables and of folders.
      config: the value of `--config`.
      overrides: JSON values by field; {seed} and {after} in them are filled in per run.
      after: the arm whose run of the same seed must finish before, or None.
      tuned: whether its final runs wait for the choice of a value.
    """

    name: str
    slug: str
    config: str
    overrides: Mapping[str, Any]
    after: str | None
    tuned: bool


class Sweep(NamedTuple):
    """A sweep's file, checked; `folder` holds its runs."""

    folder: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    tune: Tune | None

    def arm(self, name: str) -> Arm:
        """Return the arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)


def read(path: str | Path, folder: str | Path | None = None) -> Sweep:
    """Read a sweep's file; `schedule.check` checks the configs of its arms.

    Args:
      path: a JSON file, see docs/choosing.md.
      folder: of the runs; None for runs/ and the file's name.

    Raises:
      ValueError: the file is missing or invalid.
    """
    try:
        content = json.loads(Path(path).read_bytes(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file in {Path.cwd()}") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    try:
        return _sweep(content, Path(folder or Path("runs") / Path(path).stem))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of two entries of one name, Python would drop the first."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return entries


def _sweep(content: Any, folder: Path) -> Sweep:
    content = _object(content, "the file", required=("config", "arms", "seeds"), allowed=_FILE_FIELDS)
    common = _object(content.get("common", {}), "common")
    tune = None
    if content.get("tune") is not None:
        fields = _object(content["tune"], "tune", required=Tune._fields, allowed=Tune._fields)
        values = fields["values"]
        if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
            raise ValueError("tune.values: a list of numbers is expected")
        if len(set(values)) < max(2, len(values)):
            raise ValueError("tune.values: at least two are required, without duplicates")
        tune = Tune(str(fields["field"]), tuple(sorted(values)), _seeds(fields["seeds"], "tune.seeds"))
    seeds = _seeds(content["seeds"], "seeds")
    if tune and set(seeds) & set(tune.seeds):
        raise ValueError(
            f"tune.seeds: {min(set(seeds) & set(tune.seeds))} is also in seeds; name other seeds, because"
            " a value looks too good on the seeds that it was chosen on"
        )
    arms: list[Arm] = []
    for name, arm in _object(content["arms"], "arms").items():
        arms.append(_arm(name, _object(arm, f"arm {name!r}"), content["config"], common, tune, arms))
    if not arms:
        raise ValueError("arms: name at least one")
    return Sweep(folder, tuple(arms), seeds, tune)


def _arm(
    name: str,
    content: dict[str, Any],
    config: str,
    common: Mapping[str, Any],
    tune: Tune | None,
    earlier: list[Arm],
) -> Arm:
    where = f"arm {name!r}"
    slug = re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_.")
    if not slug:
        raise ValueError(f"{where}: the name must contain a letter or a digit")
    for other in earlier:
        if other.slug == slug:
            raise ValueError(f"{where}: its folder {slug} is also that of arm {other.name!r}; rename one")
    fields = {"config": config, "after": None, "tune": tune is not None} | content
    chosen = {key: fields.pop(key) for key in ("config", "after", "tune")}
    if not isinstance(chosen["config"], str) or not chosen["config"]:
        raise ValueError(f'{where}: "config" must name a config file')
    if not isinstance(chosen["tune"], bool) or (chosen["tune"] and tune is None):
        raise ValueError(f'{where}: "tune" must be true or false, and true requires "tune" in the file')
    if chosen["after"] is not None and chosen["after"] not in [arm.name for arm in earlier]:
        raise ValueError(f'{where}: "after" must name an arm above it, not {chosen["after"]!r}')
    overrides = {**common, **fields}
    for field in _SET_BY_SWEEP:
        if field in overrides:
            raise ValueError(f'{where}: {field} is set by the sweep; remove it, and list seeds in "seeds"')
    if tune and chosen["tune"] and tune.field in content:
        raise ValueError(f'{where}: {tune.field} is tuned; remove it, or add "tune": false')
    if chosen["after"] is None and "{after}" in json.dumps(overrides):
        raise ValueError(f'{where}: {{after}} is the run of another arm; name that arm with "after"')
    return Arm(name, slug, chosen["config"], overrides, chosen["after"], chosen["tune"])


def _object(
    value: Any, where: str, *, required: Collection[str] = (), allowed: Collection[str] | None = None
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is expected")
    for name in required:
        if name not in value:
            raise ValueError(f"{where}: {name!r} is missing")
    for name in value:
        if allowed is not None and name not in allowed:
            raise ValueError(f"{where}: {name!r} is unknown; known are {', '.join(allowed)}")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise ValueError(f"{where}: a list of whole numbers is expected, for example [0, 1, 2, 3, 4]")
    if len(set(value)) < len(value):
        raise ValueError(f"{where}: duplicates are not allowed")
    return tuple(value)
