"""A fake server on loopback with the chat completions of OpenAI's API, and with faults.

`python tests/fake_openai.py 0.2` starts a server that takes 0.2 s for each answer, and prints its base_url.

A test scripts it: `answers` returns each label's probability for some messages, `faults` has a fault for each request.
The server records its `requests` and how many of them were open at the same time, `most_in_flight`.
"""

from __future__ import annotations

import http.server
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

Messages = Sequence[Mapping[str, str]]


class Request(NamedTuple):
    path: str
    headers: Mapping[str, str]
    body: Any


class Fault(NamedTuple):
    """A fault: kind "status" answers `status` with `headers` and `text`; other kinds are methods of _Handler."""

    kind: str
    status: int = 500
    text: str = "out of order"
    headers: Mapping[str, str] = {}


def longer_first(messages: Messages) -> dict[str, float]:
    """Prefer the longer of <a>...</a> and <b>...</b> with a probability below 1; without these tags, A is certain."""
    text = messages[-1]["content"]
    if "<a>" not in text:
        return {"A": 1.0}
    a, b = (len(text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]) for tag in "ab")
    p = 1 / (1 + math.exp(0.1 * (b - a)))
    return {"A": 0.9 * p, "B": 0.9 * (1 - p)}


class FakeOpenAI(http.server.ThreadingHTTPServer):
    """The server, used as a context manager; `url` is its base_url.

    Args:
      answers: from messages to each label's probability, or to the text of the answer.
      faults: a Fault or None for each request in order; later requests have no fault.
      key: the only API key that the server accepts; None accepts any.
      logprobs: whether answers contain log-probabilities.
      seconds: duration of each answer.
      finish_reason: of each answer.
      required_in_flight: hold every answer until this many requests are open.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        answers: Callable[[Messages], Mapping[str, float] | str] = longer_first,
        faults: Sequence[Fault | None] | Callable[[int], Fault | None] = (),
        *,
        model: str = "judge",
        key: str | None = None,
        logprobs: bool = True,
        seconds: float = 0.0,
        finish_reason: str = "length",
        required_in_flight: int = 1,
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.model, self.key, self.logprobs = answers, model, key, logprobs
        self.finish_reason = finish_reason
        self.seconds, self.barrier = seconds, threading.Barrier(required_in_flight)
        self.fault = faults if callable(faults) else lambda i: faults[i] if i < len(faults) else None
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # ends `trickle` and `silent`
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # tests hang up on purpose


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeOpenAI

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(Request(self.path, dict(self.headers), body))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            self.server.barrier.wait(30)
            fault = self.server.fault(number)
            if fault is None:
                self.without_fault(body)
            elif fault.kind == "status":
                self.answer(fault.status, fault.text.encode(), **fault.headers)
            else:
                getattr(self, fault.kind)()
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def do_GET(self) -> None:  # the target of a redirect, if a client follows it
        self.server.requests.append(Request(self.path, dict(self.headers), None))
        self.answer(200, b"{}")

    def without_fault(self, body: Any) -> None:
        self.server.closing.wait(self.server.seconds)
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.key is not None and key != self.server.key:
            self.error(401, f"Incorrect API key provided: {key}\nGet one.")
        elif self.path != "/v1/chat/completions" or body["model"] != self.server.model:
            self.error(404, f"The model `{body['model']}` does not exist.")
        else:
            answer = self.server.answers(body["messages"])
            given = completion(answer, logprobs=self.server.logprobs and body.get("logprobs", False))
            given["choices"][0]["finish_reason"] = self.server.finish_reason
            self.answer(200, json.dumps(given).encode())

    def error(self, status: int, message: str) -> None:
        self.answer(status, json.dumps({"error": {"message": message, "type": "x"}}).encode())

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass

    # ---- faults

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def drop_midway(self) -> None:
        """Close the connection after the complete JSON of a verdict, but before the declared length."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(json.dumps(completion("A", logprobs=False)).encode())
        self.drop()

    def silent(self) -> None:
        """Accept the request and never answer."""
        self.server.closing.wait(60)
        self.close_connection = True

    def trickle(self) -> None:
        """Send a byte every 10 ms, without end."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.server.closing.wait(0.01):
            self.wfile.write(b"1\r\n \r\n")

    def huge(self, status: int = 200, **headers: str) -> None:
        """Send a body of 1 GB as fast as the client reads."""
        self.send_response(status)
        for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")

    def huge_error(self) -> None:
        self.huge(500)

    def packed(self) -> None:
        """Send a compressed body that the client did not accept."""
        self.answer(200, b"\x1f\x8b", Content_Encoding="gzip")

    def no_http(self) -> None:
        self.wfile.write(b"220 mail.example.org ESMTP\r\n")
        self.drop()


def completion(answer: Mapping[str, float] | str, *, logprobs: bool) -> dict[str, Any]:
    """Return a chat completion in the format of OpenAI; its text is the most likely label."""
    ranked = [(answer, 1.0)] if isinstance(answer, str) else sorted(answer.items(), key=lambda item: -item[1])
    alternatives = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in ranked if p]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "another-name",
        "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": ranked[0][0]},
                "logprobs": {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
                if logprobs
                else None,
            }
        ],
    }


if __name__ == "__main__":  # python tests/fake_openai.py SECONDS, the duration of each answer
    with FakeOpenAI(seconds=float(sys.argv[1])) as fake:
        print(fake.url, flush=True)
        threading.Event().wait()
