"""The factory's signature is the schema: hold a config's group against the factory that it feeds.

Names and types come from the signature alone. Every parameter must stand in the config, those with a
default too, so that a config shows all that a run depends on.

What it leaves out: ranges and combinations (the factory raises ValueError, and `build` puts the group's name
in front), and annotations it does not know (they accept anything). No jax here.
"""

from __future__ import annotations

import builtins
import collections.abc
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Union

from ml_collections import ConfigDict

from xpo_jax.io.text import error_line, one_line, shorten


class ConfigError(ValueError):
    """A config that cannot be used; one line that says what, where and how to mend it."""


# ------------------------------------------------------------------------------------- check and build


def check(
    factory: Callable[..., Any],
    group: Mapping[str, Any] | ConfigDict,
    where: str,
    given: Collection[str] = (),
) -> None:
    """Compares a config group with a factory's signature and annotations.

    Args:
      factory: a function, a class or a dataclass.
      group: the fields; `name`, which chooses the factory, is passed over if it has no such parameter.
      where: the group's path in the config, for errors ("loss").
      given: parameters that the program provides; they must not stand in the group.

    Raises:
      ConfigError: an unknown or missing field, or a value of the wrong type, with its path.
    """
    if not isinstance(group, Mapping | ConfigDict):
        raise ConfigError(f"{where}: a group of fields is expected, found {shown(group)}")
    parameters = _parameters(factory)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    for name in group:
        if name in parameters and name in given:
            raise ConfigError(f"{where}.{name} is set by the program; take it out of the config")
        if name not in parameters and name != "name" and not open_ended:
            wanted = [parameter for parameter in parameters if parameter not in given]
            hint = suggestion(name, wanted)
            raise ConfigError(f"{where}.{name}: no such field{hint or f'; {where} has ' + ', '.join(wanted)}")
    for name, annotation in parameters.items():
        if name in given:
            continue
        if name not in group:
            raise ConfigError(f"{where}.{name} is missing: {_expected(annotation)} is expected")
        value = plain(group[name], f"{where}.{name}")
        if not _fits(value, annotation):
            raise ConfigError(f"{where}.{name}: {_expected(annotation)} is expected, found {shown(value)}")


def build(
    factory: Callable[..., Any], group: Mapping[str, Any] | ConfigDict, where: str, **given: Any
) -> Any:
    """Checks a group, then calls its factory with it.

    Args:
      factory, group, where: as for `check`.
      given: what the program offers; a factory gets what its signature names.

    Raises:
      ConfigError: what `check` raises, and a ValueError of the factory with the group's name in front. Our
        own named errors (a DataError) pass as they are: they name their place themselves.
    """
    parameters = _parameters(factory)
    check(factory, group, where, given)
    fields = {
        name: plain(group[name], f"{where}.{name}") for name in group if name != "name" or name in parameters
    }
    offered = {name: value for name, value in given.items() if name in parameters}
    try:
        return factory(**fields, **offered)
    except ValueError as error:
        if type(error).__module__.startswith("xpo_jax."):
            raise
        text = reason(error)
        if re.match(rf"{re.escape(where)}[.:]", text):
            raise ConfigError(text) from error
        field = re.match(r"(\w+)(:| is) ", text)  # "take is 0, ..." becomes "data.take is 0, ..."
        joint = "." if field and field[1] in parameters else ": "
        raise ConfigError(f"{where}{joint}{text}") from error


def resolve(name: str, where: str, own: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Finds the factory that a config names.

    Args:
      name: one of `own`, or `package.module:Name`; the current directory can be imported from.
      where: the field, for errors ("judge.name").
      own: our factories by name.

    Raises:
      ConfigError: an unknown name (with the choices), or a module or attribute that is not there.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a name is expected, found {shown(name)}")
    if name in own:
        return own[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(
            f"{where}: {name!r} is unknown; choose {', '.join(own)}, "
            f"or one of yours as package.module:Name{suggestion(name, own)}"
        )
    import_from_here()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's can fail in any way
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name + ".").startswith(missing + "."):
            raise ConfigError(f"{where}: no module {missing!r}, seen from {os.getcwd()}") from error
        raise ConfigError(f"{where}: importing {module_name!r} failed: {reason(error)}") from error
    if not hasattr(module, attribute):
        hint = suggestion(attribute, vars(module))
        raise ConfigError(f"{where}: module {module_name!r} has no {attribute!r}{hint}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise ConfigError(f"{where}: {name} is {shown(factory)}, which cannot be called")
    return factory


# ------------------------------------------------------------------------------------------ schedules

SCHEDULE_FIELDS = frozenset(("kind", "start", "end", "steps"))


def schedule(value: float | Mapping[str, Any], where: str) -> Callable[[int], float]:
    """A number, or a path from one number to another, as a function of the step (from 0).

    Args:
      value: a number, or {"kind": "linear" or "cosine", "start": a, "end": b, "steps": n}: a at step 0,
        b from step n on.
      where: the field, for errors ("loss.alpha").

    Raises:
      ConfigError: anything else.
    """
    value = plain(value, where)
    if not isinstance(value, Mapping):
        if not _fits(value, float):
            raise ConfigError(f"{where}: a number or a schedule is expected, found {shown(value)}")
        constant = float(value)
        return lambda step: constant
    check(_path, value, where, given=("step",))
    if value["steps"] < 1:
        raise ConfigError(f"{where}.steps: at least 1 is expected, found {value['steps']}")
    return lambda step: _path(**value, step=step)


def _path(kind: Literal["linear", "cosine"], start: float, end: float, steps: int, step: int) -> float:
    done = min(max(step / steps, 0.0), 1.0)
    if kind == "cosine":
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return start * (1.0 - done) + end * done  # exactly start and end at the ends


# ---------------------------------------------------------------------------------- signatures and types


def _parameters(factory: Callable[..., Any]) -> dict[str, Any]:
    """The factory's keyword parameters with their resolved annotations; Any where one cannot be resolved."""
    plain_class = inspect.isclass(factory) and not (
        dataclasses.is_dataclass(factory) or hasattr(factory, "_fields")
    )
    target = factory.__init__ if plain_class else factory
    try:
        hints = typing.get_type_hints(target)
    except (NameError, AttributeError, TypeError):  # one annotation is for type checkers only: one by one
        names = vars(sys.modules.get(factory.__module__, builtins))
        hints = {}
        for name, parameter in inspect.signature(factory).parameters.items():
            with contextlib.suppress(NameError, AttributeError, TypeError):
                alone = types.SimpleNamespace(__annotations__={name: parameter.annotation})
                hints |= typing.get_type_hints(alone, names)
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value (None, bool, int, float, str, tuple, dict) is of the annotated type."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return value is None
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is typing.Annotated:
        return _fits(value, args[0])
    kind = origin or annotation
    if kind is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_fits, value, args))
    if kind in _SEQUENCES:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value if args)
    if kind in _MAPPINGS:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values() if args)
    return True


_SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def _expected(annotation: Any) -> str:
    """The annotation in words: "a number or None"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "None"
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(arg) for arg in sorted(args, key=lambda arg: arg is types.NoneType))
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is typing.Annotated:
        return _expected(args[0])
    kind = origin or annotation
    if kind is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(_expected(arg) for arg in args)})"
    if kind in _SEQUENCES:
        return f"a list (each {_expected(args[0])})" if args else "a list"
    if kind in _MAPPINGS:
        return f"a mapping (each {_expected(args[1])})" if args and args[1] is not Any else "a mapping"
    return "a value"


# -------------------------------------------------------------------------------------------- small tools


def plain(value: Any, where: str) -> Any:
    """A config value as None, bool, int, float, str, tuple or dict; ConfigError for anything else."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        try:
            return finite(float(value))
        except ValueError:
            raise ConfigError(f"{where}: a finite number is expected, found {value}") from None
    if isinstance(value, list | tuple):
        return tuple(plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, Mapping | ConfigDict):
        for name in value:
            if not isinstance(name, str) or not name or "." in name:
                raise ConfigError(f"{where or 'config'}: {name!r} cannot be a field's name")
        return {name: plain(value[name], f"{where}.{name}" if where else name) for name in value}
    raise ConfigError(
        f"{where}: a config holds numbers, text, true, false, None, lists and groups, not {shown(value)}"
    )


def finite(number: float) -> float:
    """The number itself; ValueError if it is infinite or not a number."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def shown(value: Any) -> str:
    """A value for an error line, not too long."""
    return shorten(one_line(repr(value.to_dict() if isinstance(value, ConfigDict) else value)), 80)


def reason(error: BaseException) -> str:
    """Return an error's message on one line, with its class unless it is a plain ValueError."""
    return error_line(error, with_class=not isinstance(error, ConfigError) and type(error) is not ValueError)


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'; did you mean ...?' for the nearest of the known names, or nothing."""
    close = difflib.get_close_matches(name, [k for k in known if not k.startswith("__")], 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_increasing(numbers: Sequence[int], where: str) -> None:
    """Raise ValueError unless there is at least one number, all are positive, and each exceeds the one before."""
    if not numbers or numbers[0] < 1 or any(low >= high for low, high in itertools.pairwise(numbers)):
        raise ValueError(f"{where}: increasing positive integers are expected, found {list(numbers)}")


def import_from_here() -> None:
    """Lets modules in the current directory be imported, after the installed ones."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
