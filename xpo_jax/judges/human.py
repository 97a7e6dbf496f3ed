"""A person as judge: the run shows two answers in a browser and waits for the choice.

    config.judge = ConfigDict({"name": "human", "port": 8123, "votes": 1, "votes_folder": "runs/human_votes"})

Needs `pip install 'xpo_jax[human]'`. The run prints the page's address; several people may open it. Every choice is in
`votes_folder` before the page shows the next comparison, so a run that is interrupted asks nobody twice. A comparison
that all skip has no verdict.

Left out on purpose: a program of several processes, because each would need a page of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpo_jax.io.user_paths import expand
from xpo_jax.judges.contract import Progress
from xpo_jax.judges.human_board import Board, VoteFile
from xpo_jax.runtime.interruption import interruptible
from xpo_jax.values import Comparison, Verdict


class Human:
    """Asks the people who have the page open.

    Args:
      port: of the page on this machine, 127.0.0.1; 0 takes a free one.
      votes: people who must choose on each comparison; the verdict is their mean.
      votes_folder: keeps the choices, in votes.jsonl; several runs may name the same folder.

    Raises:
      ValueError: an argument that cannot be used, or the server's package is missing.
    """

    one_process = True  # the page shows all rows of a batch

    def __init__(self, *, port: int, votes: int, votes_folder: str):
        if not 0 <= port < 2**16:
            raise ValueError(f"port is {port}, must be from 0 (a free one) to 65535")
        if votes < 1:
            raise ValueError(f"votes is {votes}, must be at least 1")
        if not votes_folder.strip():
            raise ValueError("votes_folder is empty, must name a folder")
        if not all(importlib.util.find_spec(package) for package in ("starlette", "uvicorn")):
            raise ValueError("the human judge needs a web server: pip install 'xpo_jax[human]'")
        self._port, self._votes, self._folder = port, votes, Path(expand(votes_folder))
        self._board: Board | None = None
        self._server: Any = None
        self._asked = False
        self._progress: Progress | None = None
        self._earlier: int | None = None  # choices before the program began, in the same run

    def probe(self) -> None:
        """Open the page, and print its address."""
        self._open()

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Wait until all comparisons have been judged."""
        if not comparisons:
            return []
        board = self._open()
        if not self._asked:  # the opening summary has hidden the first mention
            print(f"the first comparisons wait for you: {self.address}", flush=True)
        self._asked = True
        with interruptible():
            return board.judge(comparisons)

    def progress(self, progress: Progress) -> None:
        """Show how the run is doing."""
        if self._earlier is None:
            here = self._board.taken if self._board else 0
            self._earlier = max(0, self._votes * progress.queries - here)
        self._progress = progress

    def stats(self) -> Mapping[str, float]:
        """Return how many choices were made."""
        return {"votes": float(self._board.taken if self._board else 0)}

    @property
    def address(self) -> str:
        """The page's address, "" before it is open."""
        return self._server.address if self._server else ""

    def close(self) -> None:
        """Close the page."""
        if self._server:
            self._server.close()

    def _open(self) -> Board:
        if self._board is None:
            from xpo_jax.judges.human_server import Server  # needs the extra packages

            board = Board(self._votes, VoteFile(self._folder / "votes.jsonl"))
            self._server = Server(board, self._port, self._status)
            self._board = board
            print(f"judge in a browser: {self.address}", flush=True)
        return self._board

    def _status(self) -> dict[str, Any]:
        agreement = self._board.agreement() if self._board and self._votes > 1 else None
        taken = (self._earlier or 0) + (self._board.taken if self._board else 0)
        progress = None if self._progress is None else self._progress._asdict()
        return {"votes": self._votes, "taken": taken, "agreement": agreement, "progress": progress}
