"""The factory's signature is the schema: a config's group is checked against the factory that it feeds.

Names and types come from the signature alone. Every parameter must be in the config, those with a default too, so
that a config shows everything that a run depends on.

Left out on purpose: ranges and combinations (the factory raises ValueError, and `build` adds the group's name);
pydantic and draccus, because the arguments of each factory, a user's own judge or data source among them, would have
to be repeated as a model, and their errors take several lines and suggest no name. No JAX is imported here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from xpo_jax.config.annotations import describe, fits, parameters_of
from xpo_jax.io.text import error_line, one_line, shorten


class ConfigError(ValueError):
    """A config that cannot be used; one line that states what, where and how to fix it."""


# ------------------------------------------------------------------------------------- check and build


def check(
    factory: Callable[..., Any],
    group: Mapping[str, Any] | ConfigDict,
    where: str,
    provided: Collection[str] = (),
) -> None:
    """Check a config group against a factory's signature and annotations.

    Args:
      factory: a function, a class or a dataclass.
      group: the fields; `name`, which chooses the factory, is ignored if the factory has no such parameter.
      where: the group's path in the config, for errors ("loss").
      provided: parameters that the program passes itself; they must not be in the group.

    Raises:
      ConfigError: an unknown or missing field, or a value of the wrong type, with its path.
    """
    if not isinstance(group, Mapping | ConfigDict):
        raise ConfigError(f"{where}: a group of fields is expected, found {abbreviate(group)}")
    parameters = parameters_of(factory)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    for name in group:
        if name in parameters and name in provided:
            raise ConfigError(f"{where}.{name} is set by the program; take it out of the config")
        if name not in parameters and name != "name" and not open_ended:
            wanted = [parameter for parameter in parameters if parameter not in provided]
            hint = suggestion(name, wanted)
            raise ConfigError(f"{where}.{name}: no such field{hint or f'; {where} has ' + ', '.join(wanted)}")
    for name, annotation in parameters.items():
        if name in provided:
            continue
        if name not in group:
            raise ConfigError(f"{where}.{name} is missing: {describe(annotation)} is expected")
        value = plain(group[name], f"{where}.{name}")
        if not fits(value, annotation):
            raise ConfigError(
                f"{where}.{name}: {describe(annotation)} is expected, found {abbreviate(value)}"
            )


def build(
    factory: Callable[..., Any], group: Mapping[str, Any] | ConfigDict, where: str, **provided: Any
) -> Any:
    """Check a group, then call its factory with it, and return what that returns.

    Args:
      factory, group, where: as for `check`.
      provided: arguments that the program can pass; the factory receives those that its signature names.

    Raises:
      ConfigError: what `check` raises, or a ValueError of the factory with the group's name in front. Error classes
        of this package, such as DataError, pass unchanged: their message already states where.
    """
    parameters = parameters_of(factory)
    check(factory, group, where, provided)
    fields = {
        name: plain(group[name], f"{where}.{name}") for name in group if name != "name" or name in parameters
    }
    fields |= {name: value for name, value in provided.items() if name in parameters}
    try:
        return factory(**fields)
    except ValueError as error:
        if type(error).__module__.startswith("xpo_jax."):
            raise
        text = reason(error)
        if re.match(rf"{re.escape(where)}[.:]", text):
            raise ConfigError(text) from error
        field = re.match(r"(\w+)(:| is) ", text)  # "take is 0, ..." becomes "data.take is 0, ..."
        joint = "." if field and field[1] in parameters else ": "
        raise ConfigError(f"{where}{joint}{text}") from error


def resolve(name: str, where: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the factory that a config names.

    Args:
      name: one of `known`, or `package.module:Name`, which may be in the current directory.
      where: the field, for errors ("judge.name").
      known: the built-in factories by name.

    Raises:
      ConfigError: an unknown name (with the choices), or a module or attribute that does not exist.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a name is expected, found {abbreviate(name)}")
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(
            f"{where}: {name!r} is unknown; choose {', '.join(known)}, "
            f"or one of yours as package.module:Name{suggestion(name, known)}"
        )
    import_from_here()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module can fail in any way
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name + ".").startswith(missing + "."):
            raise ConfigError(f"{where}: no module {missing!r}, seen from {os.getcwd()}") from error
        raise ConfigError(f"{where}: importing {module_name!r} failed: {reason(error)}") from error
    if not hasattr(module, attribute):
        hint = suggestion(attribute, vars(module))
        raise ConfigError(f"{where}: module {module_name!r} has no {attribute!r}{hint}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise ConfigError(f"{where}: {name} is {abbreviate(factory)}, which cannot be called")
    return factory


# ------------------------------------------------------------------------------------------ schedules

SCHEDULE_FIELDS = frozenset(("kind", "start", "end", "steps"))


def schedule(value: float | Mapping[str, Any], where: str) -> Callable[[int], float]:
    """Return a constant or a schedule as a function of the step (from 0).

    Args:
      value: a number, or {"kind": "linear" or "cosine", "start": a, "end": b, "steps": n}: a at step 0, b from step n.
      where: the field, for errors ("loss.alpha").

    Raises:
      ConfigError: anything else.
    """
    value = plain(value, where)
    if not isinstance(value, Mapping):
        if not fits(value, float):
            raise ConfigError(f"{where}: a number or a schedule is expected, found {abbreviate(value)}")
        constant = float(value)
        return lambda step: constant
    check(_interpolate, value, where, provided=("step",))
    if value["steps"] < 1:
        raise ConfigError(f"{where}.steps: at least 1 is expected, found {value['steps']}")
    return lambda step: _interpolate(**value, step=step)


def _interpolate(kind: Literal["linear", "cosine"], start: float, end: float, steps: int, step: int) -> float:
    fraction = min(max(step / steps, 0.0), 1.0)
    if kind == "cosine":
        fraction = 0.5 - 0.5 * math.cos(math.pi * fraction)
    return start * (1.0 - fraction) + end * fraction  # exactly start and end at the ends


# -------------------------------------------------------------------------------------------- small tools


def plain(value: Any, where: str) -> Any:
    """Return a config's value as None, bool, int, float, str, tuple or dict; ConfigError for anything else."""
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
        f"{where}: a config holds numbers, text, true, false, None, lists and groups, not {abbreviate(value)}"
    )


def finite(number: float) -> float:
    """Return the number; ValueError if it is infinite or not a number."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def abbreviate(value: Any) -> str:
    """Return a value as an error's line shows it, in at most 80 characters."""
    return shorten(one_line(repr(value.to_dict() if isinstance(value, ConfigDict) else value)), 80)


def reason(error: BaseException) -> str:
    """Return an error's message on one line, with its class unless it is a plain ValueError."""
    return error_line(error, with_class=not isinstance(error, ConfigError) and type(error) is not ValueError)


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean ...?" with the nearest of the known names, or nothing."""
    close = difflib.get_close_matches(name, [k for k in known if not k.startswith("__")], 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_increasing(numbers: Sequence[int], where: str) -> None:
    """Raise ValueError unless there is at least one number, all are positive, and each exceeds the one before."""
    if not numbers or numbers[0] < 1 or any(low >= high for low, high in itertools.pairwise(numbers)):
        raise ValueError(f"{where}: increasing positive integers are expected, found {list(numbers)}")


def import_from_here() -> None:
    """Let modules in the current directory be imported, after the installed ones."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
