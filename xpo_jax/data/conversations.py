"""The one place that knows how conversations are written: from a value of a row to messages, or a refusal.

    [{"role": "user", "content": "..."}]            messages, as OpenAI and Hugging Face write them
    [{"from": "human", "value": "..."}]             ShareGPT's
    "[{\\"role\\": \\"user\\", ...}]"                    either, stored as JSON or as Python prints it
    {"messages": [...]}, {"conversations": [...]}   either, one level down
    "\\n\\nHuman: ...\\n\\nAssistant: ..."             in preference data, see preferences.py

turns.py has what a turn may hold, and chat_templates.py which roles there are.

Left out on purpose: whether user and assistant alternate, which the chat template decides as well; contents that are
not text.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.data import validate
from xpo_jax.data.rows import DataError
from xpo_jax.data.turns import STRICT, Rules, joined, message, shortened, with_common_keys
from xpo_jax.values import Message

_WRAPPERS = ("messages", "conversations", "conversation")
_ROLE_KEYS = ({"role", "content"}, {"from", "value"})
# The beginning of a list of messages, in JSON or as Python or NumPy print it.
_LIST_OF_TURNS = re.compile(r"""\s*(?:array\()?\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_SPEAKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
_NEVER_LAST = ("system", "developer", "assistant")  # roles of turns that a model does not answer


def parse(
    value: Any, at: str, what: str, rules: Rules = STRICT, dropped: Counter[str] | None = None
) -> str | tuple[Message, ...]:
    """Return a prompt: a text that is not blank, or the messages of a conversation that a model can answer.

    Args:
      value: any JSON value; a text that holds a conversation is read as that.
      at: the location, for errors ("data/train.jsonl, row 17").
      what: the value's name there ("column 'text'").
      rules: see `Rules`.
      dropped: counts what the rules dropped.

    Raises:
      DataError: anything else, with the number of the turn, from 1.
    """
    turns_value = unwrapped(value, at, what)
    if isinstance(turns_value, str):
        return validate.text(turns_value, at, what)
    messages = turns(turns_value, at, what, rules, dropped)
    if messages[-1]["role"] == "assistant" and rules.on_assistant_last == "drop" and len(messages) > 1:
        messages = messages[:-1]
        if dropped is not None:
            dropped["last assistant turn"] += 1
    last = messages[-1]["role"]
    if last in _NEVER_LAST:
        remedy = "; remove that turn, or set data.on_assistant_last = 'drop'" if last == "assistant" else ""
        raise DataError(f"{at}: {what} ends with the {last}'s turn; the last must be the user's{remedy}")
    return messages


def turns(
    value: Any, at: str, what: str, rules: Rules = STRICT, dropped: Counter[str] | None = None
) -> tuple[Message, ...]:
    """Return the messages of any conversation, also of one that ends with the assistant's turn.

    Args, Raises: as for `parse`.
    """
    value = unwrapped(value, at, what)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{at}: {what} must be text or a list of messages, got {shortened(value)}")
    if not value:
        raise DataError(f"{at}: {what} has no messages; add at least one")
    messages = []
    for number, turn in enumerate(value, start=1):
        turn_message = message(turn, at, f"turn {number} of {what}", rules, dropped)
        if turn_message["role"] == "system" and number > 1:
            raise DataError(f"{at}: turn {number} of {what} is a system turn; only the first turn can be one")
        messages.append(turn_message)
    return tuple(messages)


def answer(value: Any, at: str, what: str) -> str:
    """Return an answer, which may be empty: a text, or a list of one assistant's message, also where stored as JSON.

    Raises:
      DataError: anything else.
    """
    if isinstance(value, str):
        decoded = _decoded(value)
        if not _is_turns(decoded):
            return value
        value = decoded
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        fields = {name: entry for name, entry in with_common_keys(value[0]).items() if entry is not None}
        content = joined(fields.get("content"), at, what)
        if fields.get("role") == "assistant" and isinstance(content, str) and not fields.get("tool_calls"):
            return content
    raise DataError(
        f"{at}: {what} must be text, or a list of one message with role assistant, got {shortened(value)}"
    )


def unwrapped(value: Any, at: str, what: str) -> Any:
    """Return the list of turns that a text or a mapping holds; any other value unchanged.

    Raises:
      DataError: a text that begins as a list of turns, but cannot be read.
    """
    decoded = _decoded(value) if isinstance(value, str) else value
    if isinstance(decoded, Mapping):
        names = [name for name in _WRAPPERS if isinstance(decoded.get(name), list | tuple)]
        if len(names) == 1 and (decoded is value or _is_turns(decoded[names[0]])):
            return decoded[names[0]]
        if decoded is not value and _is_turns([decoded]):
            return [decoded]
    if not isinstance(value, str):
        return value
    if _is_turns(decoded):
        return decoded
    if _LIST_OF_TURNS.match(value):
        raise DataError(
            f"{at}: {what} holds a conversation as text that is neither JSON nor Python, {shortened(value)};"
            " write it as a list of messages, in jsonl or parquet"
        )
    return value


def text(value: Any, at: str, what: str) -> str:
    """Return a text that is part of a prompt, such as a column in a template; integers and booleans as JSON has them.

    Raises:
      DataError: not text, blank, or a conversation.
    """
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, str) and not isinstance(unwrapped(value, at, what), str):
        raise DataError(
            f"{at}: {what} holds a conversation as text, which a template would show as it is stored; set data.column"
            " to this column, and data.template to None"
        )
    return validate.text(value, at, what)


def dialogue(value: Any) -> Any:
    """Return the turns of a text in which "Human:" and "Assistant:" begin them, as in hh-rlhf.

    Any other value is returned unchanged. A dialogue begins with "Human:", and an "Assistant:" begins a paragraph.
    """
    if not isinstance(value, str):
        return value
    before, *parts = _SPEAKER.split(value)
    speakers, texts = parts[::2], parts[1::2]
    if before.strip() or speakers[:1] != ["Human"] or "Assistant" not in speakers:
        return value
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
        for speaker, text in zip(speakers, texts, strict=True)
    ]


def as_messages(prompt: str | Sequence[Message]) -> Sequence[Message]:
    """Return a prompt as messages: a plain text is one user's turn."""
    return (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt


def key(messages: Sequence[Message]) -> str:
    """Return a text that identifies a conversation."""
    parts: list[list[Any]] = [
        [turn.pop("role"), turn.pop("content"), turn] for turn in (dict(message) for message in messages)
    ]
    return json.dumps([part if part[2] else part[:2] for part in parts], sort_keys=True)


def _decoded(value: str) -> Any:
    """Return what a text holds as JSON, or as Python prints it; None if it is neither."""
    if not value.lstrip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return None


def _is_turns(value: Any) -> bool:
    """Whether a value is meant as a list of turns."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(turn, Mapping) for turn in value)
        and any(keys <= set(value[0]) for keys in _ROLE_KEYS)
    )
