"""Annotations of a factory's parameters: what they are, whether a config's value fits, and how an error states them.

Left out on purpose: annotations other than those of JSON's types; they accept anything.
"""

from __future__ import annotations

import builtins
import collections.abc
import contextlib
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

_SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def parameters_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the factory's keyword parameters with their resolved annotations; Any where one cannot be resolved."""
    plain_class = inspect.isclass(factory) and not (
        dataclasses.is_dataclass(factory) or hasattr(factory, "_fields")
    )
    target = factory.__init__ if plain_class else factory
    try:
        hints = typing.get_type_hints(target)
    except (
        NameError,
        AttributeError,
        TypeError,
    ):  # an annotation exists for type checkers only: resolve each alone
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


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a plain value (None, bool, int, float, str, tuple, dict) is of the annotated type."""
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
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is typing.Annotated:
        return fits(value, args[0])
    kind = origin or annotation
    if kind is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if kind in _SEQUENCES:
        return isinstance(value, tuple) and all(fits(item, args[0]) for item in value if args)
    if kind in _MAPPINGS:
        return isinstance(value, dict) and all(fits(item, args[1]) for item in value.values() if args)
    return True


def describe(annotation: Any) -> str:
    """Return the annotation in words, such as "a number or None"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "None"
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in sorted(args, key=lambda arg: arg is types.NoneType))
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is typing.Annotated:
        return describe(args[0])
    kind = origin or annotation
    if kind is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(describe(arg) for arg in args)})"
    if kind in _SEQUENCES:
        return f"a list (each {describe(args[0])})" if args else "a list"
    if kind in _MAPPINGS:
        return f"a mapping (each {describe(args[1])})" if args and args[1] is not Any else "a mapping"
    return "a value"
