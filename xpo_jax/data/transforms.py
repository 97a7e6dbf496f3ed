"""From a row to a prompt, or to the name of the config field that excludes it.

The transforms, in this order: select, rename, template (or column), validation, tokenisation, filter_tokens,
filter_length, max_prompt_tokens, the judge's own check. Those that need other rows (deduplicate, take, shuffle) come
afterwards, in prompts.py and batches.py.

A plain-text prompt is tokenised unchanged, control tokens included: an author who writes `<|im_start|>` there means it.
A conversation goes through the tokenizer's chat template, and there control tokens inside a message are ordinary text.

Left out on purpose: responses (a prompt has none) and truncation (a prompt that is too long is refused or dropped,
never cut).
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from xpo_jax.data import conversations, templates, validate
from xpo_jax.data.chat_templates import ChatTemplate
from xpo_jax.data.rows import DataError, Prompt, Row, Rows, SourceError
from xpo_jax.data.turns import STRICT, Rules
from xpo_jax.values import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Why a row can be excluded, in the order of the checks.
REASONS = (
    "on_bad_row",
    "filter_tokens",
    "filter_length",
    "max_prompt_tokens",
    "deduplicate",
    "held_out",
    "take",
)
Check = Callable[[Sequence[Message], Mapping[str, Any]], None]


class TokenFilter(NamedTuple):
    """Exclude rows whose `columns` exceed `max_tokens` tokens: the longest of them, or their sum."""

    columns: Sequence[str]
    combine: Literal["max", "sum"]
    max_tokens: int


@dataclass(frozen=True)
class TransformSettings:
    """The fields of the config's `data` group that concern one row at a time, see `prompts.load_prompts`.

    filter_length: the maximum tokens of the last user content, or None.
    conversations: on_extra_keys and on_assistant_last.
    chat_template_arguments: see `chat_templates.ChatTemplate`.
    """

    # long: one field for each transform
    max_prompt_tokens: int
    on_long: Literal["error", "drop"]
    select: Sequence[str] | None = None
    rename: Mapping[str, str] | None = None
    template: str | Sequence[Mapping[str, str]] | None = None
    column: str | None = None
    filter_tokens: TokenFilter | None = None
    filter_length: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    conversations: Rules = STRICT
    chat_template_arguments: Mapping[str, Any] | None = None


class Transforms:
    """Apply the settings to the rows of one source, one row at a time.

    first_bad: the error of the first row that on_bad_row = "skip" excluded, or None.
    columns_left_out: by select, of the first row.
    conversation_changes: how many keys, by name, and last turns `settings.conversations` has dropped.
    """

    def __init__(
        self,
        settings: TransformSettings,
        tokenizer: PreTrainedTokenizerBase,
        check: Check | None = None,
    ):
        """Store the arguments; `check` is the judge's, and raises ValueError for a prompt it cannot judge."""
        self._settings, self._tokenizer, self._check = settings, tokenizer, check
        try:
            self._chat_template = ChatTemplate(tokenizer, arguments=settings.chat_template_arguments)
        except ValueError as error:
            raise ValueError(f"chat_template_arguments: {error}") from error
        self._kind: tuple[bool, str] | None = None  # whether prompts are text, and the row that shows it
        self.first_bad: str | None = None
        self.columns_left_out: Sequence[str] | None = None
        self.conversation_changes: Counter[str] = Counter()

    def __call__(self, rows: Rows, index: int) -> Prompt | str:
        """Return the prompt of a row, or the field that excludes it.

        Raises:
          DataError: a bad row if on_bad_row is "error"; a prompt that is too long if on_long is "error".
        """
        try:
            prompt = self._make_prompt(rows[index])
            excluded_by = self._excluded_by(prompt)
            if excluded_by is None:
                self._run_check(prompt)
        except SourceError:
            raise
        except DataError as error:
            if self._settings.on_bad_row == "error":
                raise
            self.first_bad = self.first_bad or str(error)
            return "on_bad_row"
        if excluded_by == "max_prompt_tokens" and self._settings.on_long == "error":
            raise DataError(
                f"{prompt.row.at}: the prompt has {len(prompt.tokens)} tokens, more than "
                f"max_prompt_tokens = {self._settings.max_prompt_tokens}; raise it, or set on_long = 'drop'"
            )
        return excluded_by or prompt

    def _make_prompt(self, row: Row) -> Prompt:
        row = self._select_and_rename(row)
        if self._settings.template is not None:
            value, what = templates.fill(self._settings.template, row), "the filled template"
        else:
            assert self._settings.column is not None  # load_prompts has checked it
            value, what = validate.column(row, self._settings.column), f"column {self._settings.column!r}"
        prompt = conversations.parse(
            value, row.at, what, self._settings.conversations, self.conversation_changes
        )
        if is_text := isinstance(prompt, str):
            ids = self._tokenizer(prompt, verbose=False)["input_ids"]
        else:
            ids = self._apply_chat_template(prompt, row, what)
        if not ids:
            raise DataError(f"{row.at}: {what} has no tokens; remove the row, or set on_bad_row = 'skip'")
        self._kind = self._kind or (is_text, row.at)
        if self._kind[0] != is_text:
            kinds = ("text", "a list of messages")
            this, first = kinds if is_text else kinds[::-1]
            raise DataError(
                f"{row.at}: {what} is {this}, but {first} in {self._kind[1]}; make all of them lists of messages"
            )
        return Prompt(row, conversations.as_messages(prompt), np.asarray(ids, np.int32))

    def _select_and_rename(self, row: Row) -> Row:
        """Select and rename columns; the rest must fit into the logs, which are JSON."""
        values = row.values
        if self._settings.select is not None:
            values = {name: validate.column(row, name) for name in self._settings.select}
            if self.columns_left_out is None:
                self.columns_left_out = [name for name in row.values if name not in values]
        for old, new in (self._settings.rename or {}).items():
            value = validate.column(row._replace(values=values), old)
            if new in values:
                raise DataError(f"{row.at}: rename: column {new!r} exists already; leave it out with select")
            values = {(new if name == old else name): v for name, v in values.items()} | {new: value}
        try:
            return row._replace(
                values={name: _json_value(value, name, row) for name, value in values.items()}
            )
        except RecursionError:
            raise DataError(f"{row.at}: nested too deeply; name the columns to keep in select") from None

    def _excluded_by(self, prompt: Prompt) -> str | None:
        limits, max_content = self._settings.filter_tokens, self._settings.filter_length
        if limits is not None:
            counts = [
                self._count(
                    validate.text(validate.column(prompt.row, name), prompt.row.at, f"column {name!r}")
                )
                for name in limits.columns
            ]
            if (max(counts) if limits.combine == "max" else sum(counts)) > limits.max_tokens:
                return "filter_tokens"
        if max_content is not None and self._count(prompt.messages[-1]["content"]) > max_content:
            return "filter_length"
        return "max_prompt_tokens" if len(prompt.tokens) > self._settings.max_prompt_tokens else None

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _run_check(self, prompt: Prompt) -> None:
        if self._check is None:
            return
        try:
            self._check(prompt.messages, prompt.row.values)
        except ValueError as error:
            raise DataError(f"{prompt.row.at}: {error}") from error

    def _apply_chat_template(self, messages: Sequence[Message], row: Row, what: str) -> list[int]:
        try:
            return self._chat_template(messages, what)
        except ValueError as error:
            raise DataError(f"{row.at}: {error}") from error


def _json_value(value: Any, name: str, row: Row) -> Any:
    """Return the value as JSON can hold it: dates and times as text, arrays as lists."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):  # NumPy's float64 as well
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(entry, name, row) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(entry, name, row) for entry in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        return _json_value(value.tolist(), name, row)
    raise DataError(
        f"{row.at}: column {name!r} holds {type(value).__name__}, which JSON cannot; name the columns to keep in select"
    )
