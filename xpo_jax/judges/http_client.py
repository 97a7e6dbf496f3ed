"""Ask an OpenAI-compatible server many questions at once, within deadlines, and let nothing of the key out.

Of the openai client only the request and its errors are used. Its own retries, redirects and the environment
variables that it would read are shut off: what is sent where is decided here.

Left out on purpose: streaming, and requests that outlive a batch.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import ipaddress
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from xpo_jax.io.text import one_line, shorten
from xpo_jax.judges.completion_parsing import Unreadable
from xpo_jax.judges.contract import JudgeError

MAX_BODY_BYTES = 1 << 20  # an answer of a few tokens with 20 alternatives each has some 10 kB
MAX_WORDS = 120  # letters of the server's words that go into a reason
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.5, 30.0  # between two attempts; doubled from one to the next
CONNECT_SECONDS = 10.0  # for a connection; an address where nobody is may swallow the attempt
_SENT = frozenset(
    ("host", "accept", "connection", "content-type", "content-length", "user-agent")
    + ("x-stainless-raw-response",)  # by which the client itself knows that an answer is wanted as it came
)

_TOKENS = ("prompt_tokens", "completion_tokens")
_KEPT = ("content-type", "retry-after", "location")  # of the headers that are received

T = TypeVar("T")


class Failed(NamedTuple):
    """Why a question has no answer, in one short line."""

    reason: str


class _NoReply(Exception):
    """Ends a question without an answer; its text is the reason."""


class Server:
    """A server with a model on it.

    counts: since the start, "requests" (sent, with every further attempt), "retries" (of these the further attempts),
      "unanswered" (questions left without an answer), and as the server says "prompt_tokens", "completion_tokens".
    """

    def __init__(
        self,
        *,
        base_url: str,
        key: str | None,
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
        self._base_url, self._key, self._key_name = base_url, key, key_name
        self._concurrency, self._retries = concurrency, retries
        self._timeout, self._batch_timeout = timeout_seconds, batch_timeout_seconds
        self._jitter = random.Random()  # its own: pauses are no business of a run's seeds
        self.counts = dict.fromkeys(("requests", "retries", "unanswered", *_TOKENS), 0)

    def probe(self, question: Mapping[str, Any]) -> Any:
        """The answer to one question, parsed JSON; a server that is not there is not waited for.

        Raises:
          ValueError: none came.
        """
        (found,) = self.ask([question], lambda _, reply: reply, waits_for_server=False)
        if isinstance(found, Failed):
            raise ValueError(
                f"judge.base_url {self._base_url}: {found.reason}; before anything is loaded the server must answer a"
                " short question: see that it is running, and that address and model are right"
            )
        return found

    def ask(
        self,
        questions: Sequence[Mapping[str, Any]],
        read: Callable[[int, Any], T],
        *,
        waits_for_server: bool = True,
    ) -> list[T | Failed]:
        """Ask all questions, so many at a time as `concurrency` says.

        Args:
          questions: the body of a chat completion each.
          read: makes of a question's place and the server's answer, parsed JSON, what is returned; called as
            answers arrive. It raises Unreadable where there is nothing to be had from one.
          waits_for_server: whether it is asked again where there was no connection, or no answer in time.

        Returns:
          What `read` returned, or Failed.

        Raises:
          JudgeError: the server refuses the key or does not know the model or the address; nothing else could
            be answered either.
        """
        if not questions:
            return []
        answers = asyncio.run(self._ask_all(questions, read, waits_for_server))
        self.counts["unanswered"] += sum(isinstance(answer, Failed) for answer in answers)
        return answers

    async def _ask_all(
        self, questions: Sequence[Mapping[str, Any]], read: Callable[[int, Any], T], waits: bool
    ) -> list[T | Failed]:
        late = Failed(f"not answered within the batch's {self._batch_timeout:g} s")
        answers: list[T | Failed] = [late] * len(questions)
        end = asyncio.get_running_loop().time() + self._batch_timeout
        slots, stopped = asyncio.Semaphore(self._concurrency), asyncio.Event()

        async def answer(i: int) -> None:
            async with slots:  # held during a pause too: a server that is busy is asked less
                if stopped.is_set():
                    return
                try:
                    reply = _parsed(await self._reply(client, questions[i], end, waits))
                    self._count_tokens(reply)
                    answers[i] = read(i, reply)
                except (Unreadable, RecursionError) as error:
                    answers[i] = Failed(self._words(str(error)))
                except _NoReply as error:
                    answers[i] = Failed(str(error))
                except ValueError:
                    stopped.set()
                    raise

        async with self._client() as client:
            tasks = [asyncio.create_task(answer(i)) for i in range(len(questions))]
            try:
                await asyncio.wait(tasks, timeout=self._batch_timeout, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        for found in ended:
            if isinstance(found, Exception):
                raise found
        return answers

    async def _reply(self, client: Any, question: Mapping[str, Any], end: float, waits: bool) -> bytes:
        """The body of the server's answer to one question; asks again where that may help."""
        now = asyncio.get_running_loop().time
        for attempt in range(self._retries + 1):
            self.counts["requests"] += 1
            self.counts["retries"] += attempt > 0
            asked_to_wait, there = 0.0, False
            try:
                async with asyncio.timeout(self._timeout):  # of the whole call, however its body trickles
                    raw = await client.chat.completions.with_raw_response.create(**question)
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s"
            except self._openai.APIStatusError as error:
                status, there = error.status_code, True
                said = self._words(_message(error.response.content))
                reason = f"the server answered {status}" + (f": {said}" if said else "")
                stop = self._stop(status, reason, error.response.headers)
                if stop:
                    raise JudgeError(stop) from None  # the client's error may hold more of the server's words
                if status != 429 and status < 500:
                    raise _NoReply(reason) from None
                asked_to_wait = _seconds(error.response.headers.get("retry-after"))
            except self._openai.APIConnectionError as error:
                cause = error.__cause__ or error  # its text may be anything, its type says enough
                reason = f"no connection, or one that broke ({type(cause).__name__})"
            except _NoReply:
                raise
            except Exception as error:  # what the libraries below do not foresee; again its type only
                raise _NoReply(f"the request failed ({type(error).__name__})") from None
            else:
                return bytes(raw.http_response.content)
            if not (there or waits):
                raise _NoReply(reason)
            pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 10), LAST_PAUSE_SECONDS)
            pause = max(asked_to_wait, pause) + pause * self._jitter.random()
            if attempt == self._retries or now() + pause >= end:
                break
            await asyncio.sleep(pause)
        attempts = f"; asked {attempt + 1} times" if attempt else ""
        if attempt < self._retries:
            attempts += f"; the next attempt, in {pause:.3g} s, would come after the batch's deadline"
        raise _NoReply(reason + attempts)

    def _count_tokens(self, reply: Any) -> None:
        usage = reply.get("usage") if isinstance(reply, dict) else None
        for name in _TOKENS:
            number = usage.get(name) if isinstance(usage, dict) else None
            if type(number) is int and 0 <= number < 2**32:
                self.counts[name] += number

    def _stop(self, status: int, reason: str, headers: Mapping[str, str]) -> str:
        """Where no further question would fare better: what is wrong and how to mend it. Else ""."""
        if 300 <= status < 400:
            to = self._words(headers.get("location", "elsewhere").partition("?")[0])
            return (
                f"judge.base_url: {self._base_url} redirects to {to}, which is not followed;"
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

    def _words(self, text: str) -> str:
        """Somebody else's words on one short line, without the key."""
        for key in {self._key, repr(self._key)[1:-1], json.dumps(self._key)[1:-1]} if self._key else ():
            text = text.replace(key, "***")
        return shorten(one_line("".join(c if c.isprintable() else " " for c in text)), MAX_WORDS)

    def _client(self) -> Any:
        """The openai client, on a connection that sends only what is listed and reads only so much."""
        key = self._key

        class Connection(self._openai.DefaultAsyncHttpxClient):  # type: ignore[misc, name-defined]
            async def send(self, request: Any, **options: Any) -> Any:
                # the client adds headers from environment variables of its own, another key among them
                for name in {name for name in request.headers if name.lower() not in _SENT}:
                    del request.headers[name]
                request.headers["accept-encoding"] = "identity"  # a small body could unpack to a huge one
                if key is not None:
                    request.headers["authorization"] = f"Bearer {key}"
                options |= {"stream": True, "follow_redirects": False}
                response = await super().send(request, **options)
                try:
                    body = bytearray()
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise _NoReply("the server packed its answer, which it was asked not to do")
                    async for piece in response.aiter_raw():
                        body += piece
                        if len(body) > MAX_BODY_BYTES:
                            raise _NoReply(f"the server's answer has more than {MAX_BODY_BYTES} bytes")
                finally:
                    await response.aclose()
                kept = {name: response.headers[name] for name in _KEPT if name in response.headers}
                return type(response)(
                    response.status_code, headers=kept, content=bytes(body), request=request
                )

        waiting = self._openai.Timeout(
            None, connect=CONNECT_SECONDS
        )  # for the rest there are our own deadlines
        loopback = is_loopback(urlsplit(self._base_url).hostname or "")
        return self._openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key="none",  # `send` has the last word; without any the client would look for one
            max_retries=0,
            timeout=waiting,
            # a proxy has no business between this machine and itself
            http_client=Connection(timeout=waiting, trust_env=not loopback),
        )


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine, without asking any name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable(f"the server's answer is not JSON: {_text(body)!r}") from None


def _message(body: bytes) -> str:
    """What an error's body says: {"error": {"message": ...}}, {"message": ...}, or its text."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return _text(body)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else _text(body)


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, seconds or a date, as seconds from now; 0 where it says nothing."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(retry_after)
            now = datetime.datetime.now(until.tzinfo)
            seconds = (until - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if seconds == seconds else 0.0
