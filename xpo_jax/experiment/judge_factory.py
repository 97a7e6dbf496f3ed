"""Make the judge that a config names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.judges import JUDGES, ask
from xpo_jax.runtime.user_code import surroundings_restored


def make_judge(group: Mapping[str, Any] | ConfigDict, where: str) -> Any:
    """Return the judge that a config's group names; a judge that is made of others makes them with this, too.

    The name is that of a factory (a class, or a function that returns the judge), whose arguments are the group's
    fields. A function whose only parameter is called `comparisons` is the judge itself, and so is a functools.partial
    that leaves only this parameter, or an object that is called so.

    Args:
      group: the judge's group of the config.
      where: its path in the config, for errors.

    Raises:
      ValueError: an unknown name, a field that does not fit, anything that the judge's factory refuses, an object
        that cannot be called as judge(comparisons).
    """
    judge = factory = configs.resolve(group["name"], f"{where}.name", JUDGES)
    if inspect.isfunction(factory) and _is_neither(factory, group):
        raise ValueError(
            f"{where}.name: {group['name']}{inspect.signature(factory)} is neither a judge, a function whose only"
            " parameter is called comparisons, nor a factory, whose arguments are the group's fields; see"
            " docs/judges.md"
        )
    if _is_judge(factory):
        configs.check(lambda: None, group, where)
    else:
        injected = {
            "rule_judge": JUDGES["paraphrase"],
            "make_judge": make_judge,
            "call_by_shares": ask.call_by_shares,
        }
        with surroundings_restored():
            judge = configs.build(factory, group, where, **injected)
    try:
        inspect.signature(judge).bind([])
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}.name: {group['name']} gives a {type(judge).__name__} that cannot be called as"
            " judge(comparisons); see docs/judges.md"
        ) from None
    return judge


def _is_judge(named: Callable[..., Any]) -> bool:
    """Return whether what a config names is the judge itself rather than its factory."""
    if inspect.isclass(named):
        return False
    bound = named.keywords if isinstance(named, functools.partial) else {}
    try:
        parameters = inspect.signature(named).parameters
    except ValueError:  # some builtins have no signature
        return False
    return [name for name in parameters if name not in bound] == ["comparisons"]


def _is_neither(function: Callable[..., Any], group: Mapping[str, Any] | ConfigDict) -> bool:
    """Return whether a function requires positional arguments none of which the group has: a misspelt judge."""
    parameters = inspect.signature(function).parameters
    required = [
        name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    return bool(required) and required != ["comparisons"] and not any(name in group for name in required)
