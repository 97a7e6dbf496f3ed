"""The LLM A/B judge over HTTP: any server that speaks OpenAI's chat completions (vLLM, SGLang, a hosted API).

With mode "logprobs" p = P(label of A) / (P(label of A) + P(label of B)), of the first token of the answer that is a
label, over what the server lists as alternatives. With "text" the answer must be one of the labels and nothing else,
and the verdict is hard. Whatever else a server does is no verdict, with a reason; a key or a model that it refuses
ends the run. How it is asked is `http_client.py`, what it is shown `prompting.py`.

Left out on purpose: asking in both orders (`judging.both_orders` does it for any judge), reasoning before the verdict,
structured output (each server spells it differently), system prompts beside the template, and failures in the cache.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from xpo_jax.judges.cache import AnswerCache
from xpo_jax.judges.completion_parsing import Masses, NoLogprobs, Unreadable, bare, from_logprobs, from_text
from xpo_jax.judges.http_client import Failed, Server, is_loopback
from xpo_jax.judges.prompting import Rendering
from xpo_jax.values import Comparison, Message, Verdict

MAX_TOKENS = {"logprobs": 4, "text": 8}  # a label, with quotation marks or a line break around it
ALTERNATIVES = 20  # the most that OpenAI's interface allows


class OpenAIJudge:
    """Compares two answers by what a chat model behind HTTP says of them."""

    def __init__(
        self,
        server: Server,
        rendering: Rendering,
        labels: tuple[str, str],
        settings: Mapping[str, Any],
        mode: str,
        cache: AnswerCache | None,
    ):
        """Take what `openai` has checked. `settings` go into each request, beside the messages."""
        self._server, self._rendered, self._cache = server, rendering, cache
        self._labels = (bare(labels[0]), bare(labels[1]))
        self._settings, self._read = dict(settings), from_logprobs if mode == "logprobs" else from_text
        self._soft = mode == "logprobs"
        self._cached = 0

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Refuse a prompt that this judge cannot judge; a run asks for each before it begins.

        Raises:
          ValueError: a column of the template that is missing, empty or no text.
        """
        self._rendered(Comparison(messages, row, "", ""))

    def probe(self) -> None:
        """Ask one short question, so that a wrong address, key, model or mode is known before anything is loaded.

        Raises:
          ValueError: the server does not answer it, or without the probabilities that mode "logprobs" needs.
        """
        turn = Message(role="user", content=f"Reply with the letter {self._labels[0]}.")
        reply = self._server.probe({**self._settings, "messages": [turn]})
        try:
            self._read(reply, self._labels)
        except NoLogprobs as error:
            raise ValueError(str(error)) from None
        except Unreadable:  # this one question need not make sense to the model
            pass

    def stats(self) -> Mapping[str, float]:
        """What it did since it was built.

        Returns:
          "requests": sent; "retries": of these the further attempts at the same question; "unanswered": questions
          without an answer; "prompt_tokens", "completion_tokens": as the server counts them; "cache_hits": questions
          answered from the cache; "cache_damaged": entries of it that could not be used and were asked again.
        """
        damaged = 0 if self._cache is None else self._cache.damaged
        return {**self._server.counts, "cache_hits": self._cached, "cache_damaged": damaged}

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts. The scores of mode "logprobs": "a" and "b" hold the log-probability of the answer's label
          ("logp", nats, None if it was not listed); "mass" is P(label of A) + P(label of B), which is far below 1
          where the model does not answer the question.

        Raises:
          ValueError: the server refuses the key, the model or the address; the cache cannot be written.
        """
        questions = [
            {**self._settings, "messages": _as_messages(self._rendered(comparison))}
            for comparison in comparisons
        ]
        return [self._verdict(answer) for answer in self._answers(questions)]

    def _answers(self, questions: Sequence[Mapping[str, Any]]) -> list[Masses | Failed]:
        """An answer to each question: from the cache, else from the server and then into the cache."""
        cache = self._cache
        kept = [None if cache is None else cache.get(question) for question in questions]
        missing = [i for i, answer in enumerate(kept) if answer is None]
        self._cached += len(questions) - len(missing)

        def read(place: int, reply: Any) -> Masses:
            masses = self._read(reply, self._labels)
            if cache is not None:
                cache.put(questions[missing[place]], masses)
            return masses

        asked = iter(self._server.ask([questions[i] for i in missing], read))
        return [next(asked) if answer is None else answer for answer in kept]

    def _verdict(self, answer: Masses | Failed) -> Verdict:
        if isinstance(answer, Failed):
            return Verdict(None, answer.reason)
        a, b = answer
        p = a / (a + b)
        if not self._soft:
            return Verdict(p, "A" if p > 0.5 else "B")
        logps = [math.log(mass) if mass else None for mass in answer]
        scores = {"a": {"logp": logps[0]}, "b": {"logp": logps[1]}, "mass": a + b}
        return Verdict(p, f"{p:.3f} for A, mass {a + b:.3f}", scores)


def _as_messages(rendered: str | Sequence[Message]) -> list[dict[str, str]]:
    """Messages for a request; a text is one turn of the user's. Half a surrogate pair cannot be sent."""
    turns = [Message(role="user", content=rendered)] if isinstance(rendered, str) else rendered
    return [
        {
            "role": turn["role"],
            "content": turn["content"].encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        }
        for turn in turns
    ]


# ----------------------------------------------------------------------------------------------- factory


def openai(
    *,
    base_url: str,
    model: str,
    api_key_env: str | None,
    template: str | Sequence[Mapping[str, str]],
    labels: tuple[str, str],
    mode: Literal["logprobs", "text"],
    concurrency: int,
    timeout_seconds: float,
    batch_timeout_seconds: float,
    retries: int,
    cache: str | None,
    allow_plain_http: bool,
) -> OpenAIJudge:
    """Build the judge.

    Args:
      base_url: where the server's interface begins, for example "http://localhost:8000/v1".
      model: the name by which the server knows the model.
      api_key_env: the name of the environment variable that holds the key; None for a server without one.
      template: messages, or a text that becomes one turn of the user's, with {A} and {B}; {prompt}, the user's
        last turn; and any {column} of the row that holds text.
      labels: what the template asks for, for A and for B; for "logprobs" each must be one token.
      mode: "logprobs" where the server gives the probabilities of tokens, else "text".
      concurrency: requests under way at once.
      timeout_seconds: for one request, until its last byte.
      batch_timeout_seconds: for all comparisons of a call; what is not answered by then has no verdict.
      retries: further attempts after 429, 5xx, a timeout or a broken connection.
      cache: the folder that keeps answers, for this run and others; None asks always.
      allow_plain_http: send the key over plain http to another machine.

    Raises:
      ValueError: anything else, and a key that is not there; the field stands first.
    """
    rendering = Rendering(template, break_control_tokens=True)
    named = {bare(label) for label in labels}
    if len(named) < 2 or "" in named:
        raise ValueError(
            f"labels: {labels[0]!r} and {labels[1]!r} must be words that differ; blanks and punctuation do not count"
        )
    for name, value in (("concurrency", concurrency), ("retries", retries + 1)):
        if value < 1:
            raise ValueError(f"{name}: {'at least 1' if name == 'concurrency' else '0 or more'} is expected")
    for name, seconds in (
        ("timeout_seconds", timeout_seconds),
        ("batch_timeout_seconds", batch_timeout_seconds),
    ):
        if not seconds > 0:
            raise ValueError(f"{name}: more than 0 is expected, found {seconds}")
    if not model:
        raise ValueError("model: it is empty; give the name by which the server knows the model")
    key = _key(api_key_env)
    _check_address(base_url, key is not None and not allow_plain_http)
    settings: dict[str, Any] = {"model": model, "temperature": 0, "seed": 0, "max_tokens": MAX_TOKENS[mode]}
    if mode == "logprobs":
        settings |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
    server = Server(
        base_url=base_url,
        key=key,
        key_name=api_key_env,
        concurrency=concurrency,
        timeout_seconds=timeout_seconds,
        batch_timeout_seconds=batch_timeout_seconds,
        retries=retries,
    )
    answers = None
    if cache is not None:
        answers = AnswerCache(cache, base_url=base_url, labels=[bare(label) for label in labels], mode=mode)
    return OpenAIJudge(server, rendering, labels, settings, mode, answers)


def _key(variable: str | None) -> str | None:
    """The key; no error shows it, nor a name that looks as if it were one."""
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(
            "api_key_env: the name of an environment variable is expected, such as OPENAI_API_KEY (capitals, digits,"
            " underscores); what stands there is not shown, for it may be the key itself"
        )
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(
            f"api_key_env: the environment variable {variable} is not set; export it, or give None"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(
            f"api_key_env: the key in {variable} holds blanks, line breaks or letters that no header can"
        )
    return key


def _check_address(base_url: str, key_needs_tls: bool) -> None:
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ValueError("base_url: an address such as https://host/v1 is expected")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "base_url: it holds a user, a password or a query, and would be written into files; name the environment"
            " variable with the key in judge.api_key_env"
        )
    if parts.scheme == "http" and key_needs_tls and not is_loopback(host):
        raise ValueError(
            f"base_url: the key would go to {host} over plain http, for all between to read; use https, or set"
            " judge.allow_plain_http to True"
        )
