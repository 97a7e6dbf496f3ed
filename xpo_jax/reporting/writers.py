"""Where metrics and sample texts go besides metrics.jsonl: TensorBoard's event files, and Weights & Biases.

Their packages are imported only if the config enables them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xpo_jax.io.text import markdown_table


class Writer(Protocol):
    """A destination of `metrics.Metrics`."""

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
    """Event files in <run_path>/tensorboard/. A number that is not finite is a gap.

    When a run resumes after `first_step`, events of later steps are dropped.
    """

    def __init__(self, run_path: str | Path, first_step: int = 0):
        from tensorboardX import SummaryWriter  # takes time to import

        self._writer = SummaryWriter(
            logdir=str(Path(run_path) / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )

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
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the run directory.

    Its package takes key, project and mode from its own environment variables and settings. It receives the metrics
    and the samples only: config, command line, console and code may hold paths, addresses and keys.
    """

    def __init__(self, run_path: str | Path):
        import wandb

        self._package: Any = wandb
        quiet = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
        self._run: Any = wandb.init(name=Path(run_path).name, dir=str(run_path), settings=quiet)

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
