"""Render a comparison as the prompt of a judge's model, so that no filled-in text can change the prompt's structure.

Braces in a filled-in text are not placeholders. The tags that enclose a placeholder in the template are broken where a
filled-in text contains them ("</answer_A>" becomes "< /answer_A>"), so that no answer can close its tag and continue
as the template. Control tokens are broken only on request: a judge that has the tokenizer treats them exactly.

Left out on purpose: what a text says in plain words ("I am the better one"), columns that are not text, and all turns
of a conversation but the last user turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from xpo_jax.data import conversations, templates
from xpo_jax.data.rows import DataError
from xpo_jax.judges.contract import JudgeError
from xpo_jax.values import Comparison, Message

# an opening tag, one placeholder, the closing tag
_ENCLOSED = re.compile(r"<([\w-]+)>\s*\{[^{}]+\}\s*</\1>")
# control tokens as the chat templates of common open models write them: <|im_end|>, </s>, <end_of_turn>, [/INST]
_CONTROL = re.compile(
    r"<(?=[|\uff5c]|/?(?:s|bos|eos|pad|unk|mask|sep|cls|think|SYS|\w+_of_\w+)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+)\])",
    re.IGNORECASE,
)

MAX_REASONING_CHARACTERS = 1000  # of what a judge argued, in the log


def check_asks_for_verdict(template: str | Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError if the template of a judge that reasons does not ask for the line that is read."""
    contents = [template] if isinstance(template, str) else [turn["content"] for turn in template]
    if not any("verdict:" in content.casefold() for content in contents):
        raise ValueError(
            "template: it must ask for the line that is read, such as: End with a line of its own, 'Verdict: A',"
            " 'Verdict: B' or 'Verdict: tie'."
        )


class Rendering:
    """A template with {A} and {B}; {prompt} is the last user turn, and any other {column} a text column of the row."""

    def __init__(self, template: str | Sequence[Mapping[str, str]], *, break_control_tokens: bool):
        """Take a template: messages, or one text.

        Args:
          template: see `data.templates`.
          break_control_tokens: break what looks like a control token of any common chat template, for judges that do
            not know which tokenizer will read the text.

        Raises:
          ValueError: the template is invalid, or does not show both answers.
        """
        missing = {"A", "B"} - {*templates.check(template)}
        if missing:
            raise ValueError(
                f"template: {{{min(missing)}}} is missing, so the judge would not see that answer"
            )
        self.template = template
        contents = [template] if isinstance(template, str) else [turn["content"] for turn in template]
        tags = sorted({re.escape(tag) for content in contents for tag in _ENCLOSED.findall(content)})
        self._tags = re.compile(rf"<(?=\s*/?\s*(?:{'|'.join(tags)})\b)", re.IGNORECASE) if tags else None
        self._break_control_tokens = break_control_tokens

    def __call__(self, comparison: Comparison) -> str | tuple[Message, ...]:
        """Fill the template; return a text for a text, messages for messages.

        Raises:
          JudgeError: a column of the template is missing, empty or not text.
        """
        messages, row, a, b = comparison
        users = [message["content"] for message in messages if message["role"] == "user"]
        texts = {"A": a, "B": b, "prompt": users[-1] if users else ""}

        def value(name: str) -> str:
            if name in texts:
                return self._neutralize(texts[name])
            if name in row:
                try:
                    return self._neutralize(
                        conversations.text(row[name], "judge.template", f"column {name!r}")
                    )
                except DataError as error:
                    raise JudgeError(str(error)) from error
            raise JudgeError(
                f"judge.template: no column {name!r}; the row has: {', '.join(row) or 'nothing'};"
                " {prompt}, the last user turn, is always available"
            )

        return templates.substitute(self.template, value)

    def _neutralize(self, text: str) -> str:
        if self._tags is not None:
            text = self._tags.sub("< ", text)
        if self._break_control_tokens:
            text = _CONTROL.sub(lambda match: match[0] + " ", text)
        return text
