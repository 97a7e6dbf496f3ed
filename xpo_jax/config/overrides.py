"""Overrides of a config's fields from the command line: `loss.alpha=1e-4`.

Left out on purpose: ml_collections.config_flags. There --config must come before its fields, an unknown field ends in a
traceback, and no number can be replaced by None or a schedule, no None by a number, and no list at all.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from xpo_jax.config.schema import SCHEDULE_FIELDS, ConfigError, abbreviate, finite, suggestion

AUTO = "auto"  # stands where a number or a name may stand as well


def override(config: ConfigDict, assignment: str) -> None:
    """Set one field of a config in place.

    Args:
      config: holds the field already.
      assignment: `group.field=text`; the text is read as the type of the present value, see `loader.load`.

    Raises:
      ConfigError: no such field (with a suggestion), or a text that is not of that type.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"override {assignment!r} needs a value: {path}=...")
    group: Any = config
    names = path.split(".")
    for depth, name in enumerate(names):
        above = ".".join(names[:depth])
        if not isinstance(group, ConfigDict):
            raise ConfigError(
                f"{path}: {above} is {abbreviate(group)}, not a group of fields; override it whole"
            )
        if name not in group:
            fields = [field for field, _ in leaves(config)]
            same_name = [field for field in fields if field.split(".")[-1] == names[-1]]
            hint = suggestion(path, same_name, cutoff=0.0) or suggestion(path, fields)
            choices = f"; {above or 'the config'} has {', '.join(group.keys())}"
            raise ConfigError(f"{path}: no such field{hint or choices}")
        group, parent = group[name], group
    value = _parse(text, group, path)
    with parent.ignore_type():  # _parse has checked the type, and a field that may be None changes it
        parent[names[-1]] = value


def _parse(text: str, old: Any, path: str) -> Any:
    """Return the text as the type of the value that it replaces; the factory's signature is checked later."""

    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{path}: {expected} is expected, found {text!r}")

    if text in ("None", "none"):
        return None
    if isinstance(old, ConfigDict) and set(old.keys()) != SCHEDULE_FIELDS:
        raise ConfigError(f"{path} is a group; override one of its fields: {', '.join(old.keys())}")
    if old is None or old == AUTO or isinstance(old, ConfigDict):
        return _guess(text, path)
    if text == AUTO:
        return text
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
            return text  # a plain text may replace a list of messages
        pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
        return [_parse(piece, old[0], path) if old else _guess(piece, path) for piece in pieces]
    return text


def _guess(text: str, path: str) -> Any:
    """Return the text as the type that it looks like, where there is no old value."""
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
    """Return a list or a mapping, written in JSON or Python."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(f"{path}: {text!r} is neither JSON nor a Python literal") from None


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each field that is not a group."""
    for name, value in values.items():
        if isinstance(value, ConfigDict | dict) and len(value):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
