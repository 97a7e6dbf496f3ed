"""The web page on which people judge, served to this machine alone.

The address holds a random token, and any other address is refused, so that other users of the machine, and other pages
in the browser, can neither read nor vote. The page is human.html; it fetches nothing from elsewhere.

Left out on purpose: TLS and other interfaces. From another machine, forward the port: `ssh -L 8123:127.0.0.1:8123`.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from xpo_jax.io.text import visible
from xpo_jax.judges.human_board import CHOICES, Board, NotTaken, Shown

HOST = "127.0.0.1"
MAX_BODY = 4096  # bytes of a request
MAX_DIFF = 4000  # words of both answers, beyond which differences are not marked
_BROWSER = re.compile(r"[0-9a-f]{16}")
_COMPARISON = re.compile(r"[0-9a-f]{64}")


class BadRequest(ValueError):
    """A request that the page does not send."""


class Server:
    """Serves the page from a thread of its own, until the program ends.

    Args:
      board: the comparisons.
      port: on this machine; 0 takes a free one.
      status: returns what the page shows of the run besides the comparison, plain JSON values.

    Raises:
      ValueError: the port is taken.
    """

    def __init__(self, board: Board, port: int, status: Callable[[], Mapping[str, Any]]):
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
            self._socket.listen()  # a browser that comes before the server waits
        except OSError as error:
            self._socket.close()
            raise ValueError(
                f"judge.port: {port} cannot be used ({error.strerror}); name another port, or 0 for a free one"
            ) from None
        token = secrets.token_urlsafe(16)
        self.address = f"http://{HOST}:{self._socket.getsockname()[1]}/{token}/"
        config = uvicorn.Config(
            make_app(board, token, status),
            log_config=None,
            log_level="error",  # a warning for each request that is not HTTP would flood the run's table
            access_log=False,
            lifespan="off",
        )
        self._server = uvicorn.Server(config)
        threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="judge's page", daemon=True
        ).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True


def make_app(board: Board, token: str, status: Callable[[], Mapping[str, Any]]) -> Starlette:
    """Return the application; every address outside of /token/ is 403."""
    text = (Path(__file__).parent / "human.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(text),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    def state(by: str, note: str = "") -> dict[str, Any]:
        shown = board.next(by)
        return {
            "pair": None if shown is None else _pair(shown),
            "note": note,
            **status(),
        }

    async def page(_: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    async def current(request: Request) -> Response:
        by = request.query_params.get("by", "")
        _matches(_BROWSER, by)
        return JSONResponse(await run_in_threadpool(state, by))

    async def vote(request: Request) -> Response:
        sent = await _fields(request, ("by", "pair", "choice"))
        _matches(_COMPARISON, sent["pair"])
        if sent["choice"] not in CHOICES:
            raise BadRequest
        return JSONResponse(
            await run_in_threadpool(take, sent["by"], board.vote, sent["pair"], sent["choice"])
        )

    async def undo(request: Request) -> Response:
        sent = await _fields(request, ("by",))
        return JSONResponse(await run_in_threadpool(take, sent["by"], board.undo))

    def take(by: str, method: Callable[..., None], *arguments: str) -> dict[str, Any]:
        try:
            method(by, *arguments)
        except NotTaken as error:
            return state(by, str(error))
        return state(by)

    async def refused(*_: Any) -> Response:
        return Response("403: open the address that the run printed\n", 403, media_type="text/plain")

    async def bad(*_: Any) -> Response:
        return Response("400: not a request of this page\n", 400, media_type="text/plain")

    routes = [
        Route(f"/{token}/", page),
        Route(f"/{token}/state", current),
        Route(f"/{token}/vote", vote, methods=["POST"]),
        Route(f"/{token}/undo", undo, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={404: refused, BadRequest: bad})
    app.router.redirect_slashes = False  # or an address without its slash would reveal that it exists
    return app


async def _fields(request: Request, names: tuple[str, ...]) -> dict[str, str]:
    """Return the fields of a request, which must be exactly these, all texts, and "by" a browser's id."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise BadRequest
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest from None
    if (
        not isinstance(sent, dict)
        or set(sent) != set(names)
        or not all(isinstance(x, str) for x in sent.values())
    ):
        raise BadRequest
    _matches(_BROWSER, sent["by"])
    return sent


def _matches(pattern: re.Pattern[str], text: str) -> None:
    if not pattern.fullmatch(text):
        raise BadRequest


def _policy(page: str) -> str:
    """Return a policy that lets the page's own script and style run, and nothing else be loaded."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    sources = "".join(f"; {tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    return f"default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'{sources}"


def _pair(shown: Shown) -> dict[str, Any]:
    a, b = differences(visible(shown.comparison.a), visible(shown.comparison.b))
    return {
        "id": shown.id,
        "number": shown.number,
        "total": shown.total,
        "messages": [
            {"role": message["role"], "content": visible(str(message["content"]))}
            for message in shown.comparison.messages
        ],
        "a": a,
        "b": b,
    }


Segment = tuple[str, bool]  # a part of an answer, and whether the other answer lacks it


def differences(a: str, b: str) -> tuple[list[Segment], list[Segment]]:
    """Divide two answers into what they share and what they do not, by words."""
    words = [re.findall(r"\s+|[^\W_]+|.", text, re.DOTALL) for text in (a, b)]
    if sum(map(len, words)) > MAX_DIFF:  # the comparison takes quadratic time
        return [(a, False)], [(b, False)]
    parts: tuple[list[Segment], list[Segment]] = ([], [])
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    for kind, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        for part, text in zip(parts, (words[0][a_start:a_end], words[1][b_start:b_end]), strict=True):
            if text:
                part.append(("".join(text), kind != "equal"))
    return parts
