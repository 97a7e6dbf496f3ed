"""What a judge is: how it is called, what it must return, and what it may offer besides.

A judge is any callable that takes a list of `values.Comparison` and returns one answer for each, in order: see
`Judge`. Everything else is optional, one protocol per method. A judge supports a protocol if it has the method, so
it need not inherit from anything. docs/judges.md shows an example of each.

`answers.py` reads what a judge returned. No jax here: a judge sees text and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from xpo_jax.io.copies import copied
from xpo_jax.io.text import error_line, one_line
from xpo_jax.values import Answer, Candidate, Comparison, Message, Params


class JudgeError(ValueError):
    """Ends the run: the judge cannot continue. The message states why and how to fix it.

    Any other exception that a judge raises costs the verdicts of that call and nothing else.
    """


class Judge(Protocol):
    """Compares the two answers of each comparison.

    Returns one answer per comparison, in order: "A", "B" or "tie"; a float, the probability that A is better; a
    `values.Verdict`, which adds a reason and scores for the log; None or nan for no verdict. Integers and booleans
    are refused, because elsewhere 0 means that the first answer won.
    """

    def __call__(self, comparisons: Sequence[Comparison], /) -> Sequence[Answer]:
        """Judge all comparisons of a batch."""
        ...


@runtime_checkable
class HasProbe(Protocol):
    """A judge that depends on something outside the run, such as a server."""

    def probe(self) -> None:
        """Check that it is available; called once, before anything is downloaded or loaded.

        Raises:
          ValueError: it is not; the message states how to fix it.
        """
        ...


@runtime_checkable
class HasCheck(Protocol):
    """A judge that cannot judge every prompt."""

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check one prompt; called for every prompt before the first step.

        Raises:
          ValueError: this prompt cannot be judged; the caller adds its file and row.
        """
        ...


@runtime_checkable
class HasParts(Protocol):
    """A judge that can measure one answer by itself."""

    def parts(self, messages: Sequence[Message], text: str) -> Mapping[str, Any]:
        """Return named measures of one answer; evaluations report the means of those that are numbers."""
        ...


@runtime_checkable
class HasScores(Protocol):
    """A judge that scores every answer by itself, and compares two answers by their scores.

    Rules that pair more than two candidates by their scores need it, see algorithm/pairing.py.
    """

    def scores(self, candidates: Sequence[Candidate], /) -> Sequence[float | None]:
        """Return one score for each answer, in order, higher for a better one; None or nan for no score."""
        ...

    def compare_scores(self, a: float, b: float, /) -> float:
        """Return the probability that an answer with score `a` is better than one with score `b`."""
        ...


@runtime_checkable
class HasStats(Protocol):
    """A judge that counts what it does, such as requests or tokens."""

    def stats(self) -> Mapping[str, float]:
        """Return totals since construction; each step logs the increase as `judge/<name>`."""
        ...


@runtime_checkable
class HasDoubt(Protocol):
    """A judge that notices when its own verdicts mean little."""

    def doubt(self) -> str:
        """Return what makes the verdicts since the last call doubtful and how to fix it, in one line; "" for nothing.

        Called after the first evaluation and every ten steps; the run prints it as a warning.
        """
        ...


class Progress(NamedTuple):
    """How a run is doing after some step.

    step, steps: done, and of the run.
    win_rate: of the policy over the reference in the latest training pairs, with the ends of its 95 % interval; None
      before the first verdict, and where both samples of a pair are the policy's.
    pairs: how many pairs that is over.
    examples: a few held-out prompts, each with the policy's first and its newest sample.
    held_out: the win rate of the latest evaluation, with its interval, and the step after which it was.
    queries: how many were put to this judge since the run began, also before it was interrupted.
    """

    step: int
    steps: int
    win_rate: tuple[float, float, float] | None
    pairs: int
    examples: Sequence[tuple[str, str, str]]
    held_out: tuple[float, float, float, int] | None = None
    queries: int = 0


@runtime_checkable
class HasProgress(Protocol):
    """A judge that shows people how the run is doing."""

    def progress(self, progress: Progress, /) -> None:
        """Take the progress; called between two steps, on every process."""
        ...


@runtime_checkable
class HasOneProcess(Protocol):
    """A judge that states whether it needs a run of one process, because it must see all rows of a batch."""

    one_process: bool


@runtime_checkable
class HasQueries(Protocol):
    """A judge that may take more than one query for a comparison, because it asks several times or several others.

    queries_per_comparison: at most; the run keeps as many in reserve. How many a comparison took is in the scores of
      its `values.Verdict`, as the integer "queries".
    """

    queries_per_comparison: int


@runtime_checkable
class HasModels(Protocol):
    """A judge that reads models from disk or from the hub."""

    def models(self) -> Sequence[Mapping[str, str | None]]:
        """Return the "path" and "commit" of each, for environment.json; called after `DeviceJudge.attach`."""
        ...


@runtime_checkable
class HasCollective(Protocol):
    """A judge that states whether it is collective: see `is_collective`."""

    collective: bool


@runtime_checkable
class DeviceJudge(HasCollective, Protocol):
    """A judge that runs a model on the run's devices; it needs every method below, and `collective` is True.

    The run calls `attach`, then compiles `declared_programs`, then calls `load`, and only then asks for verdicts.
    """

    def __call__(self, comparisons: Sequence[Comparison], /) -> Sequence[Answer]:
        """Judge, as every `Judge`; where there are several processes, all call it with the same comparisons."""
        ...

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Take the mesh, the policy's starting model (folder, config, tokenizer) and the dtype to compute in.

        Raises:
          ValueError: they do not suit this judge.
        """
        ...

    def declared_programs(self) -> Sequence[tuple[str, Callable[[], object]]]:
        """Return a label and a function that compiles, for each program that the judge will run."""
        ...

    def load(self, starting: Params | None) -> None:
        """Load the weights.

        Args:
          starting: the policy's starting weights as the sampler holds them, to be shared instead of read again; None
            where the run does not hold them.
        """
        ...


def is_collective(judge: Judge) -> bool:
    """Return whether every process must ask the judge about the whole batch.

    That is so for judges that run on the devices of all processes. Any other judge is asked by each process about
    its own shard of the rows.
    """
    return isinstance(judge, HasCollective) and bool(judge.collective)


def queries_per_comparison(judge: Judge) -> int:
    """Return how many queries a comparison takes at most (`HasQueries`), 1 for most judges."""
    return judge.queries_per_comparison if isinstance(judge, HasQueries) else 1


def check(judge: Judge, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
    """Let the judge check copies of a prompt and its row, if it does so (`HasCheck`).

    Raises:
      ValueError: this prompt cannot be judged.
    """
    if isinstance(judge, HasCheck):
        judge.check(copied(messages), copied(row))


def doubt(judge: Judge) -> str:
    """Return why the judge's latest verdicts mean little (`HasDoubt`), or ""."""
    if not isinstance(judge, HasDoubt):
        return ""
    try:
        return one_line(judge.doubt())
    except Exception as error:  # a judge is arbitrary code and can fail in any way
        return f"the judge's doubt() failed: {error_line(error, with_class=True)}"


def measure(judge: Judge, messages: Sequence[Message], text: str) -> Mapping[str, Any]:
    """Return what the judge measures in one answer (`HasParts`), or nothing; both ways it is a copy that is passed."""
    measures: Mapping[str, Any] = (
        copied(judge.parts(copied(messages), text)) if isinstance(judge, HasParts) else {}
    )
    return measures
