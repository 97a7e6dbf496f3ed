"""From a row to a prompt, or to the name of the field that leaves it out.

The steps, in this order: select, rename, template (or column), validation, tokenisation, filter_tokens,
filter_length, max_prompt_tokens, the judge's own check. What needs to know other rows (deduplicate, take, shuffle)
comes afterwards and stands in prompts.py and batches.py.

A standard prompt is plain text and is tokenised as it is, control tokens included: whoever writes `<|im_start|>`
there means it. A conversational prompt goes through the tokenizer's chat template, and there control tokens inside
a message are ordinary text. Left out: responses (a prompt has none), truncation (a prompt that is too long is
refused or dropped, never cut).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from xpo_jax.data import templates, validate
from xpo_jax.data.rows import DataError, Prompt, Row, Rows, SourceError
from xpo_jax.io.text import error_line
from xpo_jax.values import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Why a row can be left out, in the order in which it is looked at.
REASONS = ("on_bad_row", "filter_tokens", "filter_length", "max_prompt_tokens", "deduplicate", "take")
Check = Callable[[Sequence[Message], Mapping[str, Any]], None]


class TokenFilter(NamedTuple):
    """Leaves out rows of which `columns` have more than `max_tokens` tokens: the longest of them, or all together."""

    columns: Sequence[str]
    combine: Literal["max", "sum"]
    max_tokens: int


class Steps:
    """The steps that look at one row at a time; the arguments are those of `prompts.load_prompts`.

    first_bad: the error of the first row that on_bad_row = "skip" left out, or None.
    columns_left_out: by select, of the first row.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        select: Sequence[str] | None,
        rename: Mapping[str, str] | None,
        template: str | Sequence[Mapping[str, str]] | None,
        column: str | None,
        filter_tokens: TokenFilter | None,
        filter_length: int | None,
        max_prompt_tokens: int,
        on_long: Literal["error", "drop"],
        on_bad_row: Literal["error", "skip"],
        check: Check | None,
    ):
        """Args are held as they are; `filter_length` is the most tokens of the last user content."""
        self._tokenizer = tokenizer
        self._select, self._rename = select, rename
        self._template, self._column = template, column
        self._filter_tokens, self._filter_length = filter_tokens, filter_length
        self._max_prompt_tokens, self._on_long = max_prompt_tokens, on_long
        self._on_bad_row, self._check = on_bad_row, check
        self._kind: tuple[bool, str] | None = None  # whether prompts are text, and the row that shows it
        self.first_bad: str | None = None
        self.columns_left_out: Sequence[str] | None = None

    def __call__(self, rows: Rows, index: int) -> Prompt | str:
        """The prompt of a row, or the field that leaves it out.

        Raises:
          DataError: a bad row, where on_bad_row is "error"; a prompt that is too long, where on_long is.
        """
        try:
            prompt = self._prompt(rows[index])
            left_out = self._left_out(prompt)
            if left_out is None and self._check is not None:
                self._checked(prompt)
        except SourceError:
            raise
        except DataError as error:
            if self._on_bad_row == "error":
                raise
            self.first_bad = self.first_bad or str(error)
            return "on_bad_row"
        if left_out == "max_prompt_tokens" and self._on_long == "error":
            raise DataError(
                f"{prompt.row.at}: the prompt has {len(prompt.tokens)} tokens, more than "
                f"max_prompt_tokens = {self._max_prompt_tokens}; raise it, or set on_long = 'drop'"
            )
        return left_out or prompt

    def _prompt(self, row: Row) -> Prompt:
        row = self._columns(row)
        if self._template is not None:
            value, what = templates.fill(self._template, row), "the filled template"
        else:
            assert self._column is not None  # load_prompts has checked it
            value, what = validate.column(row, self._column), f"column {self._column!r}"
        if is_text := isinstance(value, str):
            content = validate.text(value, row.at, what)
            messages: tuple[Message, ...] = (Message(role="user", content=content),)
            ids = self._tokenizer(value, verbose=False)["input_ids"]
        else:
            messages = validate.conversation(value, row.at, what)
            ids = self._apply_chat_template(messages, row)
        if not ids:
            raise DataError(f"{row.at}: {what} gives no tokens")
        self._kind = self._kind or (is_text, row.at)
        if self._kind[0] != is_text:
            kinds = ("text", "a list of messages")
            here, there = kinds if is_text else kinds[::-1]
            raise DataError(
                f"{row.at}: {what} is {here}, but {there} in {self._kind[1]}; make all of them lists of messages"
            )
        return Prompt(row, messages, np.asarray(ids, np.int32))

    def _columns(self, row: Row) -> Row:
        """Select and rename; what is left must fit into the logs, which are JSON."""
        values = row.values
        if self._select is not None:
            values = {name: validate.column(row, name) for name in self._select}
            if self.columns_left_out is None:
                self.columns_left_out = [name for name in row.values if name not in values]
        for old, new in (self._rename or {}).items():
            value = validate.column(row._replace(values=values), old)
            if new in values:
                raise DataError(
                    f"{row.at}: rename: there is a column {new!r} already; leave it out with select"
                )
            values = {(new if name == old else name): each for name, each in values.items()} | {new: value}
        try:
            return row._replace(values={name: _json(value, name, row) for name, value in values.items()})
        except RecursionError:
            raise DataError(f"{row.at}: nested too deeply; name the columns to keep in select") from None

    def _left_out(self, prompt: Prompt) -> str | None:
        limits = self._filter_tokens
        if limits is not None:
            counts = [
                self._count(
                    validate.text(validate.column(prompt.row, name), prompt.row.at, f"column {name!r}")
                )
                for name in limits.columns
            ]
            if (max(counts) if limits.combine == "max" else sum(counts)) > limits.max_tokens:
                return "filter_tokens"
        if (
            self._filter_length is not None
            and self._count(prompt.messages[-1]["content"]) > self._filter_length
        ):
            return "filter_length"
        return "max_prompt_tokens" if len(prompt.tokens) > self._max_prompt_tokens else None

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _checked(self, prompt: Prompt) -> None:
        assert self._check is not None
        try:
            self._check(prompt.messages, prompt.row.values)
        except ValueError as error:
            raise DataError(f"{prompt.row.at}: {error}") from error

    def _apply_chat_template(self, messages: Sequence[Message], row: Row) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{row.at}: a conversation needs a chat template and the tokenizer has none; use plain text"
            )
        try:
            ids = self._tokenizer.apply_chat_template(
                cast(list[dict[str, str]], messages),
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
        except Exception as error:  # a chat template is a program of the model's and can refuse in any way
            raise DataError(
                f"{row.at}: the tokenizer's chat template refuses the conversation: {error_line(error)}"
            ) from error
        return cast(list[int], ids)


def _json(value: Any, name: str, row: Row) -> Any:
    """The value as JSON can hold it: times as text, arrays as lists."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):  # of NumPy too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json(each, name, row) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each, name, row) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        return _json(value.tolist(), name, row)
    raise DataError(
        f"{row.at}: column {name!r} holds {type(value).__name__}, which JSON cannot; name the columns to keep in"
        " select"
    )
