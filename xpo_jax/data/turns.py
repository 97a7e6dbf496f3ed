"""One turn of a conversation, as data sets write it, to a message; conversations.py calls this for each turn.

Keys whose value is null are left out, because Arrow adds them. A content may be a list of text parts, which are joined.
An assistant's turn may have tool_calls, and a tool's turn answers them. Which roles there are is decided by the model's
chat template: see chat_templates.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from xpo_jax.data import validate
from xpo_jax.data.rows import DataError
from xpo_jax.io.copies import copied
from xpo_jax.io.text import one_line, shorten
from xpo_jax.values import Message

_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# What a turn may have besides role and content, by role.
_MORE_KEYS = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}


class Rules(NamedTuple):
    """What happens to two things that conversations of data sets have and prompts may not: config.data's fields.

    on_extra_keys: a turn with a key that no chat template reads: "error", or "drop" the key.
    on_assistant_last: a conversation that the assistant has answered: "error", or "drop" that answer.
    """

    on_extra_keys: Literal["error", "drop"] = "error"
    on_assistant_last: Literal["error", "drop"] = "error"


STRICT = Rules()


def with_common_keys(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn with the keys role and content; ShareGPT's roles get their common names."""
    if "role" in turn or not {"from", "value"} <= set(turn):
        return dict(turn)
    role = turn["from"]
    rest = {name: entry for name, entry in turn.items() if name not in ("from", "value")}
    return {
        "role": _SHAREGPT.get(role, role) if isinstance(role, str) else role,
        "content": turn["value"],
        **rest,
    }


def message(turn: Any, at: str, this_turn: str, rules: Rules, dropped: Counter[str] | None) -> Message:
    """Return one turn as a message.

    Args:
      turn: any JSON value.
      at, this_turn: the location and the turn's name there, for errors.
      rules, dropped: see `Rules`; counts the keys that were dropped, by name.

    Raises:
      DataError: it has no role or no content that is text, or it has an extra key.
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"{at}: {this_turn} must be a message with role and content, got {shortened(turn)}")
    fields = {name: entry for name, entry in with_common_keys(turn).items() if not _is_null(entry)}
    role = fields.get("role")
    calls = role == "assistant" and "tool_calls" in fields
    if "role" not in fields or ("content" not in turn and "value" not in turn and not calls):
        raise DataError(
            f"{at}: {this_turn} must have role and content, it has: {validate.column_names(turn)}"
        )
    if not isinstance(role, str) or not role:
        raise DataError(
            f"{at}: {this_turn} has the unknown role {shortened(role)}; write 'user' or 'assistant'"
        )
    more = _MORE_KEYS.get(role, ())
    for name in sorted(fields.keys() - {"role", "content", *more}):
        if rules.on_extra_keys == "error":
            raise DataError(
                f"{at}: {this_turn} has the extra key {name!r}; remove it, or set data.on_extra_keys = 'drop'"
            )
        if dropped is not None:
            dropped[f"key {name}"] += 1
    content = joined(fields.get("content"), at, this_turn)
    needs_no_words = calls or role == "tool"  # a tool may return nothing
    if needs_no_words and content in (None, ""):
        content = ""
    else:
        content = validate.text(content, at, f"the content of {this_turn}")
    result = Message(role=role, content=content)
    if calls:
        result["tool_calls"] = _tool_calls(fields["tool_calls"], at, this_turn)
    for name in set(more) & set(fields) - {"tool_calls"}:
        result[name] = validate.text(fields[name], at, f"{name} of {this_turn}")  # type: ignore[literal-required]
    return result


def joined(content: Any, at: str, this_turn: str) -> Any:
    """Return a list of text parts as one text; any other content unchanged."""
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return content
    if not all(isinstance(part, Mapping) and "type" in part for part in content):
        return content
    texts = []
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{at}: {this_turn} has a part of type {shortened(part['type'])}; only text can be read, so remove"
                " the row"
            )
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, at: str, this_turn: str) -> list[Any]:
    """Return the calls without null keys; arguments stored as JSON text become objects, as chat templates expect."""
    calls = _without_nulls(copied(calls))
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{at}: the tool_calls of {this_turn} must be a list of functions with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments)
            except (ValueError, RecursionError):
                raise DataError(
                    f"{at}: the arguments of a tool call of {this_turn} are not JSON: {shortened(arguments)}; fix them"
                ) from None
    return list(calls)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value


def _is_null(value: Any) -> bool:
    """Whether a key can be left out: Arrow gives all rows the keys of all, with null or an empty list."""
    return value is None or (isinstance(value, list) and not value)


def shortened(value: Any) -> str:
    """Return a value as an error shows it."""
    return shorten(one_line(repr(value)), 60)
