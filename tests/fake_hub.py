"""A fake model hub on loopback that answers the requests of huggingface_hub for a snapshot."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one model.

    Args:
      name: "owner/name" of the model.
      folder: its files.

    Attributes:
      revisions: branches and tags, to commits.
      gated: refuse the files, as of a model whose terms were not accepted.
      requests: (method, path, token) of every request so far.
      barrier: a barrier that requests for the commit wait at; replace it for several processes.
    """

    def __init__(self, name: str, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.name, self.folder, self.gated = name, folder, False
        self.revisions = {"main": "a" * 40, "v1": "b" * 40}
        self.requests: list[tuple[str, str, str | None]] = []
        self.barrier = threading.Barrier(1)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()

    def fetched(self) -> set[str]:
        """Return the names of the files that were sent."""
        return {
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        }


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        name, parts = self.server.name, self.path.partition("?")[0].split("/")
        folder = self.server.folder
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        if "/".join(parts[3:5]) == name and parts[1:3] == ["api", "models"]:
            what, revision = parts[5:7]
            commit = self.server.revisions.get(revision, revision)
            if commit not in self.server.revisions.values():
                self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
            elif what == "revision":
                self.server.barrier.wait(60)
                self.answer(200, json.dumps({"id": name, "sha": commit}).encode())
            else:
                tree = [
                    {"type": "file", "path": k, "size": f.stat().st_size, "oid": k} for k, f in files.items()
                ]
                self.answer(200, json.dumps(tree).encode())
        elif "/".join(parts[1:3]) == name and parts[3] == "resolve":
            content = files["/".join(parts[5:])].read_bytes()
            if self.server.gated:
                self.answer(403, **{"X-Error-Code": "GatedRepo"})
            else:
                self.answer(
                    200, content, ETag=hashlib.sha256(content).hexdigest(), **{"X-Repo-Commit": parts[4]}
                )
        else:
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
