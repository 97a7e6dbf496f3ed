"""From messages to tokens by the tokenizer's chat template, checked once against what was meant.

A chat template is a program that comes with a model. It may leave out a turn whose role it does not know, leave out the
calls of tools, or end a prompt after the user's turn, and report nothing. Each of these is checked once, with a text
that must appear in what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta

from xpo_jax.io.text import error_line
from xpo_jax.values import Message

# The roles that are tried for an error that names what a template renders.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MARK, _WORD = "zq7mark", "zq7word"
_GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}  # by the run, or never


def _problem(template: Any, arguments: Mapping[str, Any]) -> str:
    """Return why a template cannot take these arguments, or ""."""
    if not arguments:
        return ""
    if not isinstance(template, str):
        return "is missing, so it takes no arguments; remove them"
    if given := sorted(_GIVEN & set(arguments)):
        return f"gets {', '.join(given)} from the run; remove it from the arguments"
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        read = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError:  # an extension of its own, such as {% generation %}
        read = set(re.findall(r"\w+", template))
    unread = sorted(set(arguments) - read)
    return f"reads no {', '.join(unread)}; correct or remove it" if unread else ""


class ChatTemplate:
    """The chat template of one tokenizer, with values for variables that it reads; nothing is rendered yet.

    Args:
      tokenizer: of transformers.
      owner: names it in errors: "the tokenizer", "the reward model".
      arguments: {name: value} for the template, such as {"enable_thinking": False}.

    Raises:
      ValueError: an argument that the template does not read.
    """

    def __init__(
        self, tokenizer: Any, owner: str = "the tokenizer", arguments: Mapping[str, Any] | None = None
    ):
        self._tokenizer, self._owner, self._arguments = tokenizer, owner, dict(arguments or {})
        if problem := _problem(tokenizer.chat_template, self._arguments):
            raise ValueError(f"{owner}'s chat template {problem}")
        self._rendered: set[str] = set()  # kinds of turns, see _check_turn
        self._has_generation_prompt = False

    def __call__(
        self, messages: Sequence[Message], what: str = "the conversation", *, generation_prompt: bool = True
    ) -> list[int]:
        """Return token ids; control tokens within a message become ordinary text.

        Args:
          what: the conversation's name in errors.
          generation_prompt: end with the beginning of an assistant's turn.

        Raises:
          ValueError: there is no template, it rejects the conversation or does not render a part of it, or it has no
            generation prompt.
        """
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"a conversation needs a chat template and {self._owner} has none; use plain text"
            )
        turns = [dict(message) for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=generation_prompt,
                return_dict=False,
                sanitize_control_tokens=True,
                **self._arguments,
            )
        except (
            Exception
        ) as error:  # a chat template is a program that the model brings and can fail in any way
            raise ValueError(f"{self._owner}'s chat template rejects {what}: {error_line(error)}") from error
        for number in range(len(turns)):
            self._check_turn(turns, number, what)
        if generation_prompt and not self._has_generation_prompt:
            self._check_generation_prompt(turns)
            self._has_generation_prompt = True
        return list(ids)

    def _check_turn(self, turns: Sequence[dict[str, Any]], number: int, what: str) -> None:
        """Check, once for each role, that its turns are rendered, and once that calls of tools are."""
        turn, this_turn = turns[number], f"turn {number + 1} of {what}"
        role, calls = turn["role"], "tool_calls" in turn
        kind = f"{role} with calls" if calls else role  # some templates leave out the words beside calls
        if kind not in self._rendered and (turn["content"] or not calls):
            if not self._is_known(role) or not self._renders(turns, number, {"content": _MARK}):
                has = "words beside tool_calls" if calls else f"the unknown role {role!r}"
                raise ValueError(
                    f"{this_turn} has {has}; {self._owner}'s chat template renders"
                    f" {', '.join(self._rendered_roles()) or 'nothing'}"
                )
            self._rendered.add(kind)
        if calls and "calls" not in self._rendered:
            call = {"id": "call00001", "type": "function", "function": {"name": _MARK, "arguments": {}}}
            if not self._renders(turns, number, {"tool_calls": [call]}):
                raise ValueError(
                    f"{this_turn} has tool_calls, which {self._owner}'s chat template does not render; use a model that"
                    " calls tools, or remove the row"
                )
            self._rendered.add("calls")

    def _renders(self, turns: Sequence[dict[str, Any]], number: int, marked: dict[str, Any]) -> bool:
        """Whether what is rendered holds the mark that a turn is given."""
        changed = [turn | marked if i == number else turn for i, turn in enumerate(turns)]
        text = self._text(changed, generation_prompt=False)
        return text is None or _MARK in text  # a template that rejects the mark was shown to look at the turn

    def _is_known(self, role: str) -> bool:
        """Whether a role is usual or named by the template: one that prints any role would print a misspelt one."""
        template = str(self._tokenizer.chat_template)
        return role in ROLES or f"'{role}'" in template or f'"{role}"' in template

    def _rendered_roles(self) -> list[str]:
        """Return the usual roles that the template renders in a short conversation."""
        user, answer = {"role": "user", "content": _WORD}, {"role": "assistant", "content": _WORD}
        roles = []
        for role in ROLES:
            turn = {"role": role, "content": _MARK}
            around: list[list[dict[str, Any]]] = [[turn], [turn, user], [user, turn], [user, answer, turn]]
            if any(_MARK in (self._text(turns, generation_prompt=False) or "") for turns in around):
                roles.append(role)
        return roles

    def _check_generation_prompt(self, turns: list[dict[str, Any]]) -> None:
        prompt = self._text(turns, generation_prompt=True)
        if prompt is None or prompt != self._text(turns, generation_prompt=False):
            return
        answer = {"role": "assistant", "content": _MARK}
        before, mark, _ = (self._text([*turns, answer], generation_prompt=False) or "").partition(_MARK)
        if mark and before.rstrip() == prompt.rstrip():
            return  # as in Llama 2, where the end of a user's turn begins the answer
        raise ValueError(
            f"{self._owner}'s chat template has no generation prompt, so an answer would continue the user's turn; add"
            " {% if add_generation_prompt %}(the beginning of an assistant's turn){% endif %} at its end"
        )

    def _text(self, turns: Sequence[Mapping[str, Any]], *, generation_prompt: bool) -> str | None:
        """Return the rendered text; None where the template rejects the turns."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns), tokenize=False, add_generation_prompt=generation_prompt, **self._arguments
                )
            )
        except Exception:  # as above
            return None
