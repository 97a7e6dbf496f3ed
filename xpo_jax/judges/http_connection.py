"""A connection for the openai client that sends only listed headers and reads bounded answers.

The openai client takes further keys and headers from environment variables, unpacks compressed answers of any size and
may follow redirects. Its options turn off none of the first two, so requests and answers are filtered below it, where
the headers of the config and the key are added as well.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

MAX_BODY_BYTES = 1 << 20  # an answer of a few tokens with 20 alternatives each has about 10 kB
CONNECT_SECONDS = 10.0  # an address without a host may never refuse the connection
_SENT_HEADERS = frozenset(
    ("host", "accept", "connection", "content-type", "content-length", "user-agent")
    + ("x-stainless-raw-response",)  # by which the client itself recognizes a raw request
)
_RECEIVED_HEADERS = ("content-type", "retry-after", "location")


class NoReply(Exception):
    """A question has no answer, and asking again would not help; the message is the reason."""


def open_client(openai: Any, base_url: str, sent: Mapping[str, str]) -> Any:
    """Return an openai.AsyncOpenAI without retries, redirects, or a timeout other than for connecting.

    Args:
      openai: the module of the openai client.
      base_url: of the server.
      sent: headers of each request, beside those of HTTP itself.
    """

    class Connection(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]
        async def send(self, request: Any, **options: Any) -> Any:
            for name in {name for name in request.headers if name.lower() not in _SENT_HEADERS}:
                del request.headers[name]
            request.headers["accept-encoding"] = (
                "identity"  # a small compressed body may unpack to a huge one
            )
            request.headers.update(sent)
            options |= {"stream": True, "follow_redirects": False}
            response = await super().send(request, **options)
            try:
                body = await _read(response)
            finally:
                await response.aclose()
            headers = {name: response.headers[name] for name in _RECEIVED_HEADERS if name in response.headers}
            return type(response)(response.status_code, headers=headers, content=body, request=request)

    timeout = openai.Timeout(None, connect=CONNECT_SECONDS)  # the caller has its own deadlines for the rest
    on_this_machine = is_loopback(urlsplit(base_url).hostname or "")
    return openai.AsyncOpenAI(
        base_url=base_url,
        api_key="none",  # `send` removes it; without any, the client would look for one
        max_retries=0,
        timeout=timeout,
        http_client=Connection(timeout=timeout, trust_env=not on_this_machine),  # no proxy to this machine
    )


async def _read(response: Any) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise NoReply("the server packed its answer, which it was asked not to do")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise NoReply(f"the server's answer has more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def is_loopback(host: str) -> bool:
    """Return whether a host name means this machine, without a name lookup."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
