"""What the requests of the judge over HTTP hold besides the question: parameters, headers and keys.

A config is written to files, so it names the environment variables of keys and never holds one; the checks here refuse
what looks like a key, and their messages do not show it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from xpo_jax.judges.http_connection import is_loopback

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# Names of fields and headers; a body may well have "stop_token_ids".
_SECRET_FIELD = re.compile(
    r"api[-_]?key|secret|passw(or)?d|authorization|credential|bearer|(access|auth)[-_]?token", re.IGNORECASE
)
_SECRET_HEADER = re.compile(_SECRET_FIELD.pattern + r"|key|token|auth|cookie|signature", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"(sk-|bearer )", re.IGNORECASE)
# Set by the judge, or of the connection.
_SET_FIELDS = (
    "model", "messages", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "temperature", "seed",
    "stream", "n",
)  # fmt: skip
_SET_HEADERS = (
    "host", "accept", "accept-encoding", "connection", "content-type", "content-length", "transfer-encoding",
    "user-agent",
)  # fmt: skip


class Headers(NamedTuple):
    """Headers of each request.

    fields: their values by name, those of keys included.
    secrets: texts that no message may show.
    """

    fields: Mapping[str, str]
    secrets: tuple[str, ...]

    def without_secrets(self, text: str) -> str:
        """Return a text from outside without the keys, also as Python and JSON escape them."""
        for key in self.secrets:
            for form in {key, repr(key)[1:-1], json.dumps(key)[1:-1]}:
                text = text.replace(form, "***")
        return text


def make_headers(api_key_env: str | None, headers: Mapping[str, str] | None) -> Headers:
    """Return the headers that a config names, with the keys from the environment.

    Args:
      api_key_env: the variable with the key that is sent as bearer token, or None.
      headers: further ones; a value of the form "$NAME" is that environment variable's.

    Raises:
      ValueError: a header or value that may not be in a config, or a variable that is not set.
    """
    fields, secrets = dict[str, str](), []
    for name, value in (headers or {}).items():
        if not re.fullmatch(r"[A-Za-z0-9-]+", name) or name.lower() in _SET_HEADERS:
            raise ValueError(f"headers: {name!r} cannot be set; take it out")
        if name.lower() == "authorization":
            raise ValueError(
                "headers: Authorization is set by api_key_env, the name of an environment variable"
            )
        if value.startswith("$"):
            value = read_key(value[1:], f"headers: {name}")
            secrets.append(value)
        elif _SECRET_HEADER.search(name) or _SECRET_VALUE.match(value):
            raise ValueError(
                f'headers: {name} may be a key, and would be written to files; give "$NAME", the environment variable'
                " that holds it (the value is not shown)"
            )
        elif not re.fullmatch(r"[\x20-\x7e]+", value):
            raise ValueError(f"headers: {name}, {value!r}, holds characters that an HTTP header cannot")
        fields[name.lower()] = value
    if api_key_env is not None:
        secrets.append(read_key(api_key_env, "api_key_env"))
        fields["authorization"] = f"Bearer {secrets[-1]}"
    return Headers(fields, tuple(secrets))


def make_parameters(
    *,
    max_tokens: int | None,
    max_completion_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    extra_body: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the parameters of each request; what is None is left out.

    Raises:
      ValueError: one out of range, two limits, or an extra field that is set otherwise or may be a key.
    """
    if max_tokens is not None and max_completion_tokens is not None:
        raise ValueError("max_tokens: max_completion_tokens is its new name; set one of them to None")
    parameters: dict[str, Any] = {
        "max_tokens": max_tokens,
        "max_completion_tokens": max_completion_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    for name, least in (("max_tokens", 1), ("max_completion_tokens", 1), ("temperature", 0)):
        if parameters[name] is not None and parameters[name] < least:
            raise ValueError(f"{name}: {least} or more is expected, found {parameters[name]}")
    if temperature is not None and float(temperature).is_integer():
        parameters["temperature"] = int(temperature)  # 0 and 0.0 share their entries in a cache
    extra = dict(extra_body or {})
    for name in extra:
        if name in _SET_FIELDS:
            raise ValueError(f"extra_body: {name} is set by the judge; take it out")
    _refuse_secrets(extra, "")
    parameters = {name: value for name, value in parameters.items() if value is not None}
    return {**parameters, "extra_body": extra} if extra else parameters


def _refuse_secrets(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if _SECRET_FIELD.search(name):
                raise ValueError(
                    f"extra_body: {where}{name} may be a key, and would be written to files; take it out, and name the"
                    " environment variable that holds it in api_key_env or headers (the value is not shown)"
                )
            _refuse_secrets(inner, f"{where}{name}.")
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_secrets(inner, where)
    elif isinstance(value, str) and _SECRET_VALUE.match(value):
        raise ValueError(
            f"extra_body: {where[:-1]} may be a key, and would be written to files; take it out (it is not shown)"
        )


def read_key(variable: str, field: str) -> str:
    """Return the key. No error shows it, nor the variable's name if that may be the key itself."""
    if not _VARIABLE.fullmatch(variable):
        raise ValueError(
            f"{field}: the name of an environment variable is expected, such as OPENAI_API_KEY (capitals, digits,"
            " underscores); the value is not shown, since it may be the key itself"
        )
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"{field}: the environment variable {variable} is not set; export it, or give None")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(
            f"{field}: the key in {variable} holds white space or characters that an HTTP header cannot"
        )
    return key


def check_address(base_url: str, key_needs_tls: bool) -> None:
    """Raise ValueError for an address that cannot be used, or that would show a key on the way."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ValueError("base_url: an address such as https://host/v1 is expected")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "base_url: it holds a user, a password or a query, and would be written to files; set judge.api_key_env to"
            " the name of an environment variable with the key instead"
        )
    if parts.scheme == "http" and key_needs_tls and not is_loopback(host):
        raise ValueError(
            f"base_url: the key would be sent to {host} over plain http, readable on the way; use https, or set"
            " judge.allow_plain_http to True"
        )
