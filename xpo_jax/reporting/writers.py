"""Where metrics and sample texts go besides metrics.jsonl: TensorBoard's event files, and Weights & Biases.

Their packages are imported only if the config enables them. `opened` finds out that one cannot be used before a run
has paid for anything; if one fails later, the run continues without it.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xpo_jax.io.files import atomic_write, read_json, to_json
from xpo_jax.io.text import error_line, markdown_table, shorten

_WANDB_FILE = "wandb.json"
_MESSAGE_CHARACTERS = 300


class Writer(Protocol):
    """A destination of `metrics.Metrics`."""

    def begin(self, first_step: int) -> None:
        """Take metrics of steps after `first_step` from now on; what was written of later ones is to be dropped."""
        ...

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write metrics by name, after `step` updates."""
        ...

    def texts(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table of texts, of rows with the same columns; called before the step's `scalars`."""
        ...

    def close(self) -> None:
        """Finish; the run is over."""
        ...


class TensorBoard:
    """Event files in <run_path>/tensorboard/. A number that is not finite is a gap."""

    def __init__(self, run_path: str | Path):
        """Check that the folder can be written to.

        Raises:
          ValueError: it cannot.
        """
        self._folder = Path(run_path) / "tensorboard"
        self._writer: Any = None  # until `begin`
        try:
            self._folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{self._folder}: cannot be written ({error.strerror}); fix that, or set logging.tensorboard to false"
            ) from error

    def begin(self, first_step: int) -> None:
        """See `Writer`."""
        from tensorboardX import SummaryWriter  # takes time to import

        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(logdir=str(self._folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Writer`."""
        for name, value in values.items():
            if math.isfinite(float(value)):  # tensorboardX warns about all others
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def texts(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Writer`."""
        self._writer.add_text(name, markdown_table(rows), step)

    def close(self) -> None:
        """See `Writer`."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the run directory.

    Its package takes key, project and mode from its own environment variables and settings. It receives the metrics
    and the samples only: config, command line, console and code may hold paths, addresses and keys. A run that resumes
    continues the same run there, whose id is in <run_path>/wandb.json; the package drops steps that it has already.
    """

    def __init__(self, run_path: str | Path):
        """Begin the run, or continue it.

        Raises:
          ValueError: there is no key, or the server does not answer.
        """
        import wandb

        self._package: Any = wandb
        quiet = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
        try:
            self._run: Any = wandb.init(
                name=Path(run_path).name,
                dir=str(run_path),
                id=_wandb_id(Path(run_path) / _WANDB_FILE),
                resume="allow",
                settings=quiet,
            )
        except Exception as error:  # its errors share no class with Python's
            raise ValueError(
                f"logging.wandb: Weights & Biases cannot be used ({_without_key(error)}); set WANDB_API_KEY, or"
                " WANDB_MODE=offline to upload later, or logging.wandb to false"
            ) from error

    def begin(self, first_step: int) -> None:
        """See `Writer`."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def texts(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Writer`."""
        table = self._package.Table(
            columns=list(rows[0]) if rows else [], data=[list(row.values()) for row in rows]
        )
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """See `Writer`."""
        self._run.finish()


class Optional:
    """A writer whose failure costs what it writes, and never the run.

    Args:
      name: of the service, for the line that says so.
      writer: is not called again once it has failed.
    """

    def __init__(self, name: str, writer: Writer):
        self._name, self._writer, self._works = name, writer, True

    def begin(self, first_step: int) -> None:
        """See `Writer`."""
        self._try(lambda: self._writer.begin(first_step))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._try(lambda: self._writer.scalars(step, values))

    def texts(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Writer`."""
        self._try(lambda: self._writer.texts(step, name, rows))

    def close(self) -> None:
        """See `Writer`."""
        self._try(self._writer.close)

    def _try(self, call: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as error:  # of a package whose errors share no class
            self._works = False
            print(
                f"xpo_jax: warning: {self._name} has failed ({_without_key(error)}) and receives nothing more;"
                " metrics.jsonl is complete",
                file=sys.stderr,
            )


@contextlib.contextmanager
def opened(run_path: str | Path, *, tensorboard: bool, wandb: bool) -> Iterator[list[Writer]]:
    """Open the writers that a config enables, and close them at the end.

    Args:
      run_path: the run directory.
      tensorboard: whether event files are written.
      wandb: whether Weights & Biases gets the same, see `WeightsAndBiases`.

    Raises:
      ValueError: one cannot be used.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for name, enabled, kind in (
            ("TensorBoard", tensorboard, TensorBoard),
            ("Weights & Biases", wandb, WeightsAndBiases),
        ):
            if enabled:
                writers.append(Optional(name, kind(run_path)))
                stack.callback(writers[-1].close)
        yield writers


def _wandb_id(file: Path) -> str:
    """Return the id of the run there, which the file keeps."""
    if not file.exists():
        atomic_write(file, to_json({"id": secrets.token_hex(8)}) + "\n")
    return str(read_json(file, remedy="delete it to begin another run there").get("id"))


def _without_key(error: Exception) -> str:
    """Return an error's line, shortened, without the key."""
    text, key = error_line(error, with_class=True), os.environ.get("WANDB_API_KEY")
    return shorten(text.replace(key, "***") if key else text, _MESSAGE_CHARACTERS)
