"""Load a config, override its fields, write it and compare it; the whole door to configs.

A config file is Python with `get_config(arg)` that returns a ConfigDict, or the JSON that a run directory
holds. Each group of it (`loss`, `data`, `judge`, ...) is the keyword arguments of one factory; `check`,
`build`, `resolve` and `schedule`, which hold a group against its factory, come from schema.py.

What it leaves out: defaults (every field stands in the config), field types that JSON lacks, environment
variables, includes (a config is Python and can import). No jax here: a config loads at once, anywhere.
"""

from __future__ import annotations

import ast
import inspect
import json
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from xpo_jax.config.schema import (
    SCHEDULE_FIELDS,
    ConfigError,
    build,
    check,
    finite,
    import_from_here,
    plain,
    reason,
    resolve,
    schedule,
    shown,
    suggestion,
)

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
    """The command line, taken apart: what to load, `field=text` overrides in their order, and the flags."""

    spec: str | None
    overrides: tuple[str, ...]
    help: bool
    accept_changes: bool = False


def split_argv(argv: Sequence[str]) -> Arguments:
    """Takes the command line apart (without the program's name); the order of the arguments is free.

    Args:
      argv: `--config=FILE`, `--config FILE`, `--config.a.b=v`, `--config.a.b v`, `--accept-changes`,
        `--profile` (which is `--config.logging.profile=True`), `--help` or `-h`.

    Returns:
      Arguments; spec is None only together with help. Of an override given twice, `load` takes the last.

    Raises:
      ConfigError: no or a second `--config`, a flag without its value, any other argument.
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
        raise ConfigError(f"{_FLAG} is missing; for example {_FLAG}=configs/paraphrase.py")
    return Arguments(spec, tuple(overrides), False, accept_changes)


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a config and applies overrides.

    Args:
      spec: `path.py` or `path.py:arg` (calls get_config(None) or get_config(arg)), or `path.json`.
      overrides: `loss.alpha=1e-4`; the text is read as the type of the value that stands there. "None" is
        None everywhere, a list is `64,128` or `[64, 128]`, a schedule may take a number's place and back.

    Returns:
      The config, locked, each sequence a tuple (so that it equals what `serialize` writes and load reads).

    Raises:
      ConfigError: in one line, with the file or the field.
    """
    path, colon, arg = spec.partition(".py:")
    if colon:
        if not arg:
            raise ConfigError(f"{spec}: nothing follows the colon; leave it out or name an argument")
        config = _from_python(path + ".py", arg)
    elif spec.endswith(".py"):
        config = _from_python(spec, None)
    elif spec.endswith(".json"):
        config = _from_json(spec)
    else:
        raise ConfigError(f"{spec}: a config is a .py file (or file.py:argument) or a .json file")
    for override in overrides:
        _override(config, override)
    return ConfigDict(plain(config, "")).lock()


def serialize(config: Mapping[str, Any] | ConfigDict) -> str:
    """The config as JSON, fields sorted, tuples as lists; `load` reads it back equal.

    Raises:
      ConfigError: a value that JSON lacks, with its field.
    """
    return json.dumps(plain(config, ""), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def diff(a: ConfigDict, b: ConfigDict) -> list[str]:
    """What differs from a to b, a line per field: `loss.alpha: 1e-05 -> 0.0001`; empty if nothing does."""
    old, new = dict(_leaves(plain(a, ""))), dict(_leaves(plain(b, "")))
    return [
        f"{path}: {shown(old[path]) if path in old else 'absent'}"
        f" -> {shown(new[path]) if path in new else 'absent'}"
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
    _source(path)  # says in our words what is wrong with the file
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
    except Exception as error:  # the user's own code can fail in any way
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
        ]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{where}: {reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config must return a ConfigDict, it returned {shown(config)}")
    return config


def _from_json(path: str) -> ConfigDict:
    try:
        values = json.loads(_source(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a JSON object is expected, found {shown(values)}")
    return ConfigDict(plain(values, ""))


# -------------------------------------------------------------------------------------------- overrides


def _override(config: ConfigDict, override: str) -> None:
    """Sets one field from `a.b=text`; the field must be there."""
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} needs a value: {path}=...")
    group: Any = config
    names = path.split(".")
    for depth, name in enumerate(names):
        above = ".".join(names[:depth])
        if not isinstance(group, ConfigDict):
            raise ConfigError(f"{path}: {above} is {shown(group)}, not a group of fields; override it whole")
        if name not in group:
            known = [known for known, _ in _leaves(config)]
            same_name = [known for known in known if known.split(".")[-1] == names[-1]]
            hint = suggestion(path, same_name, cutoff=0.0) or suggestion(path, known)
            place = above or "the config"
            raise ConfigError(f"{path}: no such field{hint or f'; {place} has ' + ', '.join(group.keys())}")
        group, parent = group[name], group
    value = _parse(text, group, path)
    with parent.ignore_type():  # _parse has seen to the type, and a None-able field changes it
        parent[names[-1]] = value


def _parse(text: str, old: Any, path: str) -> Any:
    """Reads text as the type of the value that it replaces; the factory's signature has the last word."""

    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{path}: {expected} is expected, found {text!r}")

    if text in ("None", "none"):
        return None
    if isinstance(old, ConfigDict) and set(old.keys()) != SCHEDULE_FIELDS:
        raise ConfigError(f"{path} is a group; override one of its fields: {', '.join(old.keys())}")
    if old is None or isinstance(old, ConfigDict):
        return _guess(text, path)
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise wrong("true or false")
        return text.lower() == "true"
    if isinstance(old, int | float):
        if text.startswith("{"):
            return _literal(text, path)
        try:
            return int(text) if isinstance(old, int) else finite(float(text))
        except ValueError:
            raise wrong("an integer" if isinstance(old, int) else "a finite number") from None
    if isinstance(old, list | tuple):
        if text.startswith(("[", "(")):
            return _literal(text, path)
        if old and isinstance(old[0], Mapping):
            return text  # a list of messages may give way to a plain text
        pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
        return [_parse(piece, old[0], path) if old else _guess(piece, path) for piece in pieces]
    return text


def _guess(text: str, path: str) -> Any:
    """Reads text where no old value tells the type."""
    if text.startswith(("[", "(", "{")):
        return _literal(text, path)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return finite(number(text))
        except ValueError:
            pass
    return text


def _literal(text: str, path: str) -> Any:
    """Reads a list or a mapping in JSON's or Python's spelling."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(f"{path}: {text!r} is neither JSON nor a Python literal") from None


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of each field that is not a group."""
    for name, value in values.items():
        if isinstance(value, ConfigDict | dict) and len(value):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
