"""Ask an OpenAI-compatible server many questions at once, within deadlines, without disclosing the key.

Only the request and the errors of the openai client are used. Its max_retries and timeout apply to each request alone:
they would lose the deadline of a whole batch, which a retry must not exceed, the deadline for a body that trickles in,
and the end of all questions at the first fatal answer. tenacity could replace only the loop over attempts, which is
where those deadlines are checked.

Left out on purpose: streaming, and requests that outlive a batch.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from xpo_jax.io.text import one_line, shorten
from xpo_jax.judges.completion_parsing import Unreadable
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.http_connection import NoReply, open_client
from xpo_jax.judges.http_settings import Headers

MAX_MESSAGE_CHARACTERS = 120  # of a server's message in a reason
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.5, 30.0  # between two attempts; doubles from one to the next
_TOKEN_COUNTS = ("prompt_tokens", "completion_tokens")

T = TypeVar("T")


class Unanswered(NamedTuple):
    """Why a question has no answer, in one short line."""

    reason: str


class _Retry(Exception):
    """An attempt failed, and another one may succeed; the message is the reason.

    Args:
      pause: seconds that the server asked to wait, or 0.
      server_answered: whether the failure is the server's own answer.
    """

    def __init__(self, reason: str, *, pause: float = 0.0, server_answered: bool = False):
        super().__init__(reason)
        self.pause, self.server_answered = pause, server_answered


class Server:
    """A server with a model on it.

    headers: of each request.
    counts: totals of "requests" (every attempt), "retries" (attempts after the first), "unanswered" (questions without
      an answer), and, as the server reports them, "prompt_tokens" and "completion_tokens".
    """

    def __init__(
        self,
        *,
        base_url: str,
        headers: Headers,
        key_name: str | None,
        concurrency: int,
        timeout_seconds: float,
        batch_timeout_seconds: float,
        retries: int,
    ):
        """Take what `judges.openai` has checked.

        Raises:
          ValueError: the openai client is not installed.
        """
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                f"name 'openai' needs the openai client ({error}); install the extra: pip install 'xpo-jax[judge]'"
            ) from None
        self._openai: Any = openai
        self._base_url, self.headers, self._key_name = base_url, headers, key_name
        self._concurrency, self._retries = concurrency, retries
        self._timeout, self._batch_timeout = timeout_seconds, batch_timeout_seconds
        self._jitter = random.Random()  # its own, so that pauses do not depend on the run's seed
        self.counts = dict.fromkeys(("requests", "retries", "unanswered", *_TOKEN_COUNTS), 0)

    def probe(self, question: Mapping[str, Any]) -> Any:
        """Return the server's answer to one question, parsed JSON; do not wait for a server that is unreachable.

        Raises:
          ValueError: there is no answer.
        """
        (answer,) = self.ask([question], lambda _, reply: reply, retry_unreachable=False)
        if isinstance(answer, Unanswered):
            if re.match("the server answered (400|422)", answer.reason):
                raise ValueError(
                    f"judge.base_url {self._base_url}: {answer.reason}; if it refuses a field, set that to None"
                    " (judge.max_tokens, temperature, seed, extra_body), or use judge.max_completion_tokens"
                )
            raise ValueError(
                f"judge.base_url {self._base_url}: {answer.reason}; the server must answer a short question before"
                " anything is loaded: check that it is running, and that the address and the model are right"
            )
        return answer

    def ask(
        self,
        questions: Sequence[Mapping[str, Any]],
        read: Callable[[int, Any], T],
        *,
        retry_unreachable: bool = True,
    ) -> list[T | Unanswered]:
        """Ask all questions, at most `concurrency` at once.

        Args:
          questions: the bodies of chat completions.
          read: turns a question's index and the server's answer, parsed JSON, into a result; called as answers arrive.
            It raises Unreadable for an unusable answer.
          retry_unreachable: also retry if there was no connection, or no answer in time.

        Returns:
          The result of `read`, or Unanswered, for each question.

        Raises:
          JudgeError: the server rejects the key, the model or the address, so no other question could be answered.
        """
        if not questions:
            return []
        answers = asyncio.run(self._ask_all(questions, read, retry_unreachable))
        self.counts["unanswered"] += sum(isinstance(answer, Unanswered) for answer in answers)
        return answers

    async def _ask_all(
        self, questions: Sequence[Mapping[str, Any]], read: Callable[[int, Any], T], retry_unreachable: bool
    ) -> list[T | Unanswered]:
        too_late = Unanswered(f"not answered within the batch's {self._batch_timeout:g} s")
        answers: list[T | Unanswered] = [too_late] * len(questions)
        deadline = asyncio.get_running_loop().time() + self._batch_timeout
        slots, stopped = asyncio.Semaphore(self._concurrency), asyncio.Event()

        async def answer(i: int) -> None:
            async with slots:  # held during a pause too, so that a busy server gets fewer requests
                if stopped.is_set():
                    return
                try:
                    reply = _parse_json(await self._reply(client, questions[i], deadline, retry_unreachable))
                    self._count_tokens(reply)
                    answers[i] = read(i, reply)
                except (Unreadable, RecursionError) as error:
                    answers[i] = Unanswered(self._redact(str(error)))
                except NoReply as error:
                    answers[i] = Unanswered(str(error))
                except ValueError:
                    stopped.set()
                    raise

        async with open_client(self._openai, self._base_url, self.headers.fields) as client:
            tasks = [asyncio.create_task(answer(i)) for i in range(len(questions))]
            try:
                await asyncio.wait(tasks, timeout=self._batch_timeout, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return answers

    async def _reply(
        self, client: Any, question: Mapping[str, Any], deadline: float, retry_unreachable: bool
    ) -> bytes:
        """Return the body of the server's answer to one question; retry where that may help.

        Raises:
          NoReply: there is no answer.
          JudgeError: see `ask`.
        """
        for attempt in range(self._retries + 1):
            self.counts["requests"] += 1
            self.counts["retries"] += attempt > 0
            try:
                return await self._attempt(client, question)
            except _Retry as error:
                failure = error
            if not (failure.server_answered or retry_unreachable):
                raise NoReply(str(failure))
            pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 10), LAST_PAUSE_SECONDS)
            pause = max(failure.pause, pause) + pause * self._jitter.random()
            if attempt == self._retries or asyncio.get_running_loop().time() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        attempts = f"; asked {attempt + 1} times" if attempt else ""
        if attempt < self._retries:
            attempts += f"; the next attempt, in {pause:.3g} s, would come after the batch's deadline"
        raise NoReply(f"{failure}{attempts}")

    async def _attempt(self, client: Any, question: Mapping[str, Any]) -> bytes:
        """Send one request. Errors of the libraries below are named by their type, since their text may be anything."""
        try:
            async with asyncio.timeout(self._timeout):  # of the whole call, even if its body trickles in
                raw = await client.chat.completions.with_raw_response.create(**question)
            return bytes(raw.http_response.content)
        except TimeoutError:
            raise _Retry(f"no answer within {self._timeout:g} s") from None
        except self._openai.APIStatusError as error:
            status, headers = error.status_code, error.response.headers
            message = self._redact(_error_message(error.response.content))
            reason = f"the server answered {status}" + (f": {message}" if message else "")
            fatal_error = self._fatal_error(status, reason, headers)
            if fatal_error:
                raise JudgeError(fatal_error) from None  # the cause may hold more of the server's message
            if status != 429 and status < 500:
                raise NoReply(reason) from None
            pause = _retry_after_seconds(headers.get("retry-after"))
            raise _Retry(reason, pause=pause, server_answered=True) from None
        except self._openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            raise _Retry(f"no connection, or one that broke ({cause})") from None
        except NoReply:
            raise
        except Exception as error:  # anything that the libraries below do not foresee
            raise NoReply(f"the request failed ({type(error).__name__})") from None

    def _count_tokens(self, reply: Any) -> None:
        usage = reply.get("usage") if isinstance(reply, dict) else None
        for name in _TOKEN_COUNTS:
            number = usage.get(name) if isinstance(usage, dict) else None
            if type(number) is int and 0 <= number < 2**32:
                self.counts[name] += number

    def _fatal_error(self, status: int, reason: str, headers: Mapping[str, str]) -> str:
        """Return what is wrong and how to fix it, if no other question could be answered either; else ""."""
        if 300 <= status < 400:
            target = self._redact(headers.get("location", "elsewhere").partition("?")[0])
            return (
                f"judge.base_url: {self._base_url} redirects to {target}, which is not followed;"
                " give the address that answers"
            )
        where = f"judge.base_url {self._base_url}: {reason}; "
        if status in (401, 403):
            if self._key_name is None:
                return where + "name the environment variable that holds a key in judge.api_key_env"
            return where + f"the environment variable {self._key_name} must hold a key that may use the model"
        if status == 404:
            return where + "judge.model must be one that it serves, and the address usually ends in /v1"
        return ""

    def _redact(self, text: str) -> str:
        """Return a text from outside on one short line, without the key."""
        text = self.headers.without_secrets(text)
        return shorten(one_line("".join(c if c.isprintable() else " " for c in text)), MAX_MESSAGE_CHARACTERS)


# ---- bodies and headers ---------------------------------------------------------------------------


def _parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable(f"the server's answer is not JSON: {_decode(body)!r}") from None


def _error_message(body: bytes) -> str:
    """Return the message of an error: {"error": {"message": ...}}, {"message": ...}, or the body as text."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return _decode(body)
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    return content if isinstance(content, str) else _decode(body)


def _decode(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _retry_after_seconds(header: str | None) -> float:
    """Return a Retry-After header, seconds or a date, as seconds from now; 0 if it has neither."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(header)
            now = datetime.datetime.now(until.tzinfo)
            seconds = (until - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if seconds == seconds else 0.0
