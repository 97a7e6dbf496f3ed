"""Load a config, override its fields, write it and compare it; all that other modules use of configs.

A config file is Python with `get_config(arg)` that returns a ConfigDict, or the JSON of a run directory; packaged.py
finds the file of a bare name. Each group of a config (`loss`, `data`, `judge`, ...) is the keyword arguments of one
factory; `check`, `build`, `resolve` and `schedule`, which check a group against its factory, come from schema.py.

Left out on purpose: defaults (every field is in the config), field types that JSON lacks, and includes (a config is
Python and can import). Variables in paths are replaced where a path is used, so that config.json has what was written.
No JAX is imported here: a config loads at once, anywhere.
"""

from __future__ import annotations

import inspect
import json
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from xpo_jax.config import packaged
from xpo_jax.config.overrides import leaves, override
from xpo_jax.config.schema import (
    ConfigError,
    abbreviate,
    build,
    check,
    import_from_here,
    plain,
    reason,
    resolve,
    schedule,
)
from xpo_jax.io.user_paths import expand

__all__ = [
    "Arguments",
    "ConfigError",
    "build",
    "check",
    "diff",
    "load",
    "resolve",
    "schedule",
    "serialize",
    "split_argv",
]

_FLAG = "--config"


class Arguments(NamedTuple):
    """A parsed command line: what to load, `field=text` overrides in their order, and the flags."""

    spec: str | None
    overrides: tuple[str, ...]
    help: bool
    accept_changes: bool = False


def split_argv(argv: Sequence[str]) -> Arguments:
    """Parse the command line (without the program's name); arguments may come in any order.

    Args:
      argv: `--config=FILE`, `--config FILE`, `--config.a.b=v`, `--config.a.b v`, `--accept-changes`,
        `--profile` (which is `--config.logging.profile=True`), `--help` or `-h`.

    Returns:
      Arguments; spec is None only with help. Of two overrides of one field, `load` applies the last.

    Raises:
      ConfigError: no `--config` or a second one, a flag without its value, or any other argument.
    """
    spec: str | None = None
    overrides: list[str] = []
    rest = list(argv)
    if "--help" in rest or "-h" in rest:
        return Arguments(None, (), True)
    accept_changes = "--accept-changes" in rest
    overrides += ["logging.profile=True"] if "--profile" in rest else []
    rest = [argument for argument in rest if argument not in ("--accept-changes", "--profile")]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name != _FLAG and not name.startswith(_FLAG + "."):
            raise ConfigError(
                f"argument {argument!r} is not understood; write {_FLAG}=FILE or {_FLAG}.group.field=value"
            )
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals or (name == _FLAG and not value):
            raise ConfigError(f"{name} needs a value: {name}=...")
        if name != _FLAG:
            overrides.append(f"{name.removeprefix(_FLAG + '.')}={value}")
        elif spec is not None:
            raise ConfigError(f"{_FLAG} is given twice: {spec} and {value}")
        else:
            spec = value
    if spec is None:
        raise ConfigError(f"{_FLAG} is missing; for example {_FLAG}=paraphrase")
    return Arguments(spec, tuple(overrides), False, accept_changes)


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load a config and apply overrides.

    Args:
      spec: `path.py` or `path.py:arg` (calls get_config(None) or get_config(arg)), `path.json`, or `name` or
        `name:arg` of a packaged config.
      overrides: `loss.alpha=1e-4`; the text is read as the type of the present value. "None" is None
        everywhere, a list is `64,128` or `[64, 128]`, and a schedule may replace a number and vice versa.

    Returns:
      The config, locked, all sequences tuples (so that it equals what `serialize` writes and `load` reads).

    Raises:
      ConfigError: one line with the file or the field.
    """
    named = packaged.is_name(spec)
    path, colon, arg = spec.partition(":" if named else ".py:")
    if colon and not arg:
        raise ConfigError(f"{spec}: nothing follows the colon; leave it out or name an argument")
    path = packaged.file(path) if named else expand(path + colon.removesuffix(":"))
    if path.endswith(".py"):
        config = _from_python(path, arg or None)
    elif path.endswith(".json"):
        config = _from_json(path)
    else:
        raise ConfigError(
            f"{spec}: a config is a .py file (or file.py:argument) or a .json file, or the name of a packaged one:"
            f" {', '.join(packaged.names())}"
        )
    for assignment in overrides:
        override(config, assignment)
    # not type_safe, because a config that starts from this one may replace "auto" by a number; `check` knows the types
    return ConfigDict(plain(config, ""), type_safe=False).lock()


def serialize(config: Mapping[str, Any] | ConfigDict) -> str:
    """Return the config as JSON, fields sorted, tuples as lists; `load` reads it back equal.

    Raises:
      ConfigError: a value that JSON cannot hold, with its field.
    """
    return json.dumps(plain(config, ""), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def diff(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Return the differences from a to b, a line per field: `loss.alpha: 1e-05 -> 0.0001`."""
    old, new = dict(leaves(plain(a, ""))), dict(leaves(plain(b, "")))
    return [
        f"{path}: {abbreviate(old[path]) if path in old else 'absent'}"
        f" -> {abbreviate(new[path]) if path in new else 'absent'}"
        for path in sorted(old.keys() | new.keys())
        if path not in old or path not in new or old[path] != new[path]
    ]


# ------------------------------------------------------------------------------------------------ files


def _source(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file in {Path.cwd()}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {reason(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _from_python(path: str, arg: str | None) -> ConfigDict:
    _source(path)  # raises if the file cannot be read
    import_from_here()
    try:
        # run_path, not an import: an import would write __pycache__ beside the user's configs
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise ConfigError("has no get_config(arg)")
        try:
            inspect.signature(get_config).bind(arg)
        except TypeError:
            raise ConfigError("get_config must take one argument: def get_config(arg)") from None
        config = get_config(arg)
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}" if error.filename == path else path
        raise ConfigError(f"{where}: {reason(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    except Exception as error:  # a user's code can fail in any way
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
        ]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{where}: {reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config must return a ConfigDict, it returned {abbreviate(config)}")
    return config


def _from_json(path: str) -> ConfigDict:
    try:
        values = json.loads(_source(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a JSON object is expected, found {abbreviate(values)}")
    return ConfigDict(plain(values, ""))
