"""A fake bucket on loopback: the part of Google Cloud Storage's JSON API that gcsfs and tensorstore use.

As in the real service, objects appear atomically, have a generation, and are written under a condition on it.
Left out on purpose: permissions, metadata, copies, and listings of several pages.
"""

from __future__ import annotations

import base64
import email
import functools
import hashlib
import http.server
import json
import os
import re
import threading
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket(http.server.ThreadingHTTPServer):
    """A server with one bucket, which is called "bucket".

    Attributes:
      objects: from names to (content, generation).
      full: refuse writes, as a read-only bucket does.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.full = False
        self.generation = 1000
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""

    def put(self, name: str, content: bytes, condition: str | None) -> dict[str, Any] | None:
        """Write an object; return its description, or None if the condition on its generation does not hold."""
        with self.lock:
            if condition is not None and int(condition) != self.objects.get(name, (b"", 0))[1]:
                return None
            self.generation += 1
            self.objects[name] = (content, self.generation)
            return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        content, generation = self.objects[name]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": time,
            "updated": time,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        }


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**20  # header and body in one packet: a second packet would wait 40 ms
    server: Bucket

    def do_GET(self) -> None:
        path, query = self._path_and_query()
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/bucket/o/(.+)", path):
            with self.server.lock:
                stored = self.server.objects.get(unquote(match[1]))
                about = stored and self.server.describe(unquote(match[1]))
            if stored is None:
                self._answer(404)
            elif query.get("alt") == "media":
                self._send(*stored)
            else:
                self._answer(200, about)
        elif path == "/storage/v1/b/bucket/o":
            self._answer(200, self._list(query))
        elif path == "/storage/v1/b/bucket":
            self._answer(200, {"kind": "storage#bucket", "name": "bucket", "storageClass": "STANDARD"})
        else:
            self._answer(404)

    def do_POST(self) -> None:
        path, query = self._path_and_query()
        if "upload_id" in query:
            return self.do_PUT()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/batch/storage/v1":
            return self._batch(content)
        if path != "/upload/storage/v1/b/bucket/o":
            return self._answer(404)
        if self.server.full:
            return self._answer(403)
        if query["uploadType"] == "media":
            return self._put(query["name"], content, query)
        if query["uploadType"] == "multipart":
            about, content = self._parts(content)
            return self._put(json.loads(about)["name"], content, query)
        number = str(len(self.server.uploads))  # resumable: the content comes with PUT
        self.server.uploads[number] = (query.get("name") or json.loads(content)["name"], b"")
        self._answer(200, Location=f"{self.server.url}{self.path}&upload_id={number}")

    def do_PUT(self) -> None:
        _, query = self._path_and_query()
        name, before = self.server.uploads[query["upload_id"]]
        content = before + self.rfile.read(int(self.headers["Content-Length"]))
        if not self.headers["Content-Range"].endswith("/*"):
            return self._put(name, content, query)
        self.server.uploads[query["upload_id"]] = (name, content)
        self._answer(308, Range=f"bytes=0-{len(content) - 1}")

    def do_DELETE(self) -> None:
        path, _ = self._path_and_query()
        self._answer(204 if self._delete(path) else 404)

    def _path_and_query(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _send(self, content: bytes, generation: int) -> None:
        size, status, headers = len(content), 200, {"x-goog-generation": str(generation)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            if first >= size:
                return self._answer(416)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(status, content, **headers)

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            for name in sorted(self.server.objects):
                rest = name.removeprefix(prefix)
                if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                else:
                    items.append(self.server.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _put(self, name: str, content: bytes, query: dict[str, str]) -> None:
        about = self.server.put(name, content, query.get("ifGenerationMatch"))
        self._answer(*((412,) if about is None else (200, about)))

    def _delete(self, path: str) -> bool:
        name = unquote(path.rpartition("/b/bucket/o/")[2])
        with self.server.lock:
            return self.server.objects.pop(name, None) is not None

    def _parts(self, content: bytes) -> list[bytes]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + content)
        return [part.get_payload(decode=True) for part in message.get_payload()]

    def _batch(self, content: bytes) -> None:
        """Answer a batch of deletions; each part of the content is a request."""
        answers = []
        for number, part in enumerate(self._parts(content), 1):
            path = part.split()[1].decode().partition("?")[0]
            status = "204 No Content" if self._delete(path) else "404 Not Found"
            answers.append(
                "--answers\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{number}>\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--answers--"
        self._answer(200, text.encode(), **{"Content-Type": "multipart/mixed; boundary=answers"})

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@functools.cache
def bucket() -> Bucket:
    """Return the server of gs://bucket for gcsfs and tensorstore in this process.

    Both remember the first address they used, so all tests share one server.
    """
    server = Bucket()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    os.environ["STORAGE_EMULATOR_HOST"] = server.url
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = server.url
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
        "false"  # otherwise gcsfs asks for the kind of bucket over gRPC
    )
    return server
