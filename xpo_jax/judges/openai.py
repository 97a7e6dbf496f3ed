"""The LLM A/B judge over HTTP: any server with OpenAI's chat completions interface (vLLM, SGLang, a hosted API).

In mode "logprobs" p = P(label of A) / (P(label of A) + P(label of B)) at the first token of the answer that is a label,
from the alternatives that the server lists. In mode "text" the answer must be a label and nothing else, and the
verdict is hard. In mode "reasoning" the model argues first, and its last line is "Verdict: A", B or tie, and nothing
else; it may be asked several times (`votes`), see voting.py. Any other answer is no verdict, with a reason; a rejected
key or model ends the run. `http_client.py` asks, `prompting.py` renders the question, `completion_parsing.py` reads
the answer.

Left out on purpose: asking in both orders (`judging.both_orders` does that for any judge), structured output (every
server has its own syntax), and failures in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from xpo_jax.io.text import one_line, shorten
from xpo_jax.judges.cache import AnswerCache, CachedAnswer
from xpo_jax.judges.completion_parsing import (
    NoLogprobs,
    Unreadable,
    check_labels,
    from_logprobs,
    from_reasoning,
    from_text,
    reasoned_text,
    strip_punctuation,
)
from xpo_jax.judges.http_client import Server, Unanswered
from xpo_jax.judges.http_settings import check_address, make_headers, make_parameters
from xpo_jax.judges.prompting import MAX_REASONING_CHARACTERS, Rendering, check_asks_for_verdict
from xpo_jax.judges.voting import Request, vote
from xpo_jax.values import Comparison, Message, Verdict

ALTERNATIVES = 20  # the maximum that OpenAI's interface allows


class OpenAIJudge:
    """Compares two answers by the reply of a chat model behind HTTP."""

    def __init__(
        self,
        server: Server,
        rendering: Rendering,
        labels: tuple[str, str],
        settings: Mapping[str, Any],
        mode: str,
        votes: int,
        cache: AnswerCache | None,
    ):
        """Take what `openai` has checked; each request holds the `settings` and the messages."""
        self.queries_per_comparison = votes
        self._server, self._render, self._cache = server, rendering, cache
        self._labels = (strip_punctuation(labels[0]), strip_punctuation(labels[1]))
        self._settings = dict(settings)
        self._mode = mode
        self._read = {"logprobs": from_logprobs, "text": from_text, "reasoning": from_reasoning}[mode]
        self._cache_hits = 0

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check that the prompt can be rendered.

        Raises:
          JudgeError: a column of the template is missing, empty or not text.
        """
        self._render(Comparison(messages, row, "", ""))

    def probe(self) -> None:
        """Ask one short question, to detect a wrong address, key, model or mode before anything is loaded.

        Raises:
          ValueError: the server does not answer, or its answer lacks the probabilities that mode "logprobs" needs.
        """
        turn = Message(role="user", content=f"Reply with the letter {self._labels[0]}.")
        reply = self._server.probe({**self._settings, "messages": [turn]})
        try:
            self._read(reply, self._labels)
        except NoLogprobs as error:
            raise ValueError(str(error)) from None
        except Unreadable:  # the model need not understand this question
            pass

    def stats(self) -> Mapping[str, float]:
        """Return totals since construction.

        Returns:
          "requests": every attempt; "retries": attempts after the first; "unanswered": questions without an answer;
          "prompt_tokens", "completion_tokens": as the server reports them; "cache_hits": questions answered from the
          cache; "cache_damaged": entries that could not be read, so that the server was asked again.
        """
        damaged = 0 if self._cache is None else self._cache.damaged
        return {**self._server.counts, "cache_hits": self._cache_hits, "cache_damaged": damaged}

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts. In mode "logprobs" their scores hold, under "a" and "b", the log-probability of the answer's label
          ("logp", nats, None if it was not listed). "mass" is P(label of A) + P(label of B); far below 1, the model
          does not answer the question. With several votes, they are those of `voting.vote`.

        Raises:
          JudgeError: the server rejects the key, the model or the address, or the cache cannot be written.
        """
        messages = [_as_messages(self._render(comparison)) for comparison in comparisons]

        def ask(requests: Sequence[Request]) -> list[Verdict]:
            questions = [self._question(messages[index], number) for index, number in requests]
            return [self._verdict(a) for a in self._answers(questions, [number for _, number in requests])]

        return vote(ask, len(comparisons), self.queries_per_comparison)

    def _question(self, messages: list[dict[str, str]], number: int) -> dict[str, Any]:
        """Return the body of a request; a seed in it is that of the vote with this number."""
        question = {**self._settings, "messages": messages}
        return {**question, "seed": question["seed"] + number} if "seed" in question else question

    def _answers(
        self, questions: Sequence[Mapping[str, Any]], numbers: Sequence[int]
    ) -> list[CachedAnswer | Unanswered]:
        """Answer each question from the cache, or else from the server, and cache the new answers.

        Args:
          numbers: of the votes, one for each question: the same question is another one in each vote.
        """
        cache = self._cache
        keys = [{**q, "vote": number} if number else q for q, number in zip(questions, numbers, strict=True)]
        cached = [None if cache is None else cache.get(key) for key in keys]
        missing = [i for i, answer in enumerate(cached) if answer is None]
        self._cache_hits += len(questions) - len(missing)

        def read(index: int, reply: Any) -> CachedAnswer:
            masses = self._read(reply, self._labels)
            text = (
                self._server.headers.without_secrets(reasoned_text(reply))
                if self._mode == "reasoning"
                else ""
            )
            answer = CachedAnswer(masses, text)
            if cache is not None:
                cache.put(keys[missing[index]], answer)
            return answer

        new = iter(self._server.ask([questions[i] for i in missing], read))
        return [next(new) if answer is None else answer for answer in cached]

    def _verdict(self, answer: CachedAnswer | Unanswered) -> Verdict:
        if isinstance(answer, Unanswered):
            return Verdict(None, answer.reason)
        a, b = answer.masses
        p = a / (a + b)
        if self._mode == "reasoning":
            return Verdict(p, shorten(one_line(answer.text), MAX_REASONING_CHARACTERS))
        if self._mode == "text":
            return Verdict(p, "A" if p > 0.5 else "B")
        logps = [math.log(mass) if mass else None for mass in answer.masses]
        scores = {"a": {"logp": logps[0]}, "b": {"logp": logps[1]}, "mass": a + b}
        return Verdict(p, f"{p:.3f} for A, mass {a + b:.3f}", scores)


def _as_messages(rendered: str | Sequence[Message]) -> list[dict[str, str]]:
    """Return the messages of a request; a text becomes a user turn. A lone surrogate cannot be sent and is replaced."""
    turns = [Message(role="user", content=rendered)] if isinstance(rendered, str) else rendered
    return [
        {
            "role": turn["role"],
            "content": turn["content"].encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        }
        for turn in turns
    ]


# ---- factory --------------------------------------------------------------------------------------


def openai(
    *,
    base_url: str,
    model: str,
    api_key_env: str | None,
    template: str | Sequence[Mapping[str, str]],
    labels: tuple[str, str],
    mode: Literal["logprobs", "text", "reasoning"],
    votes: int,
    concurrency: int,
    timeout_seconds: float,
    batch_timeout_seconds: float,
    retries: int,
    cache: str | None,
    allow_plain_http: bool,
    max_tokens: int | None,
    max_completion_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    extra_body: Mapping[str, Any] | None,
    headers: Mapping[str, str] | None,
) -> OpenAIJudge:
    """Build the judge.

    Args:
      base_url: base address of the interface, for example "http://localhost:8000/v1".
      model: the model's name on the server.
      api_key_env: name of the environment variable that holds the key; None for a server that needs none.
      template: messages, or a text that becomes a user turn, with {A} and {B}; {prompt} is the last user turn, and any
        other {column} a text column of the row.
      labels: what the template asks for, for A and for B; for "logprobs" each must be one token.
      mode: "logprobs" if the server returns the probabilities of tokens, else "text"; or "reasoning".
      votes: answers to a comparison, at most: two where they agree, see voting.py. More than one needs a temperature
        above 0, and a mode with hard verdicts.
      concurrency: requests in flight at once.
      timeout_seconds: for one request, up to its last byte.
      batch_timeout_seconds: for all comparisons of a call; unanswered ones have no verdict.
      retries: further attempts after status 429 or 5xx, a timeout or a broken connection.
      cache: folder of a cache of answers, which runs may share; None for no cache.
      allow_plain_http: allow sending the key to another machine over plain http.
      max_tokens, max_completion_tokens: limits of an answer, by the old name and the new one; the servers of some
        models refuse the old one. None leaves out this field of a request, as the next two.
      temperature, seed: of sampling.
      extra_body, headers: further fields and headers of each request, see http_settings.py; None for none.

    Raises:
      ValueError: a value out of range, or no key in the environment; the field comes first.
    """
    # long: one field per setting of the server
    rendering = Rendering(template, break_control_tokens=True)
    bare_labels = [strip_punctuation(label) for label in labels]
    if len(set(bare_labels)) < 2 or "" in bare_labels:
        raise ValueError(
            f"labels: {labels[0]!r} and {labels[1]!r} must differ in more than white space and punctuation"
        )
    if not model:
        raise ValueError("model: it is empty; give the model's name on the server")
    _check_votes(votes, mode, temperature)
    if mode == "reasoning":
        check_labels((labels[0], labels[1]))
        check_asks_for_verdict(template)
    _check_numbers(concurrency, retries, timeout_seconds, batch_timeout_seconds)
    sent = make_headers(api_key_env, headers)
    check_address(base_url, bool(sent.secrets) and not allow_plain_http)
    parameters = make_parameters(
        max_tokens=max_tokens,
        max_completion_tokens=max_completion_tokens,
        temperature=temperature,
        seed=seed,
        extra_body=extra_body,
    )
    settings: dict[str, Any] = {"model": model, **parameters}
    if mode == "logprobs":
        settings |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
    server = Server(
        base_url=base_url,
        headers=sent,
        key_name=api_key_env,
        concurrency=concurrency,
        timeout_seconds=timeout_seconds,
        batch_timeout_seconds=batch_timeout_seconds,
        retries=retries,
    )
    answer_cache = None
    if cache is not None:
        answer_cache = AnswerCache(cache, base_url=base_url, labels=bare_labels, mode=mode)
    return OpenAIJudge(server, rendering, labels, settings, mode, votes, answer_cache)


def _check_votes(votes: int, mode: str, temperature: float | None) -> None:
    if votes < 1:
        raise ValueError(f"votes: at least 1 is expected, found {votes}")
    if votes > 1 and (mode == "logprobs" or temperature == 0):
        raise ValueError(
            f"votes: {votes} answers to the same comparison would be the same one; set votes to 1, or mode to 'text' or"
            " 'reasoning' with a temperature above 0"
        )


def _check_numbers(
    concurrency: int, retries: int, timeout_seconds: float, batch_timeout_seconds: float
) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency: at least 1 is expected, found {concurrency}")
    if retries < 0:
        raise ValueError(f"retries: 0 or more is expected, found {retries}")
    if not timeout_seconds > 0:
        raise ValueError(f"timeout_seconds: more than 0 is expected, found {timeout_seconds}")
    if not batch_timeout_seconds > 0:
        raise ValueError(f"batch_timeout_seconds: more than 0 is expected, found {batch_timeout_seconds}")
