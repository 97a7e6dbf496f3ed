"""Save what a run has learned before an error ends it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import jax

from xpo_jax.judges.contract import JudgeError
from xpo_jax.runtime.collectives import Failed, all_or_none
from xpo_jax.runtime.interruption import Stopped


@contextlib.contextmanager
def save_on_error(save: Callable[[], object | None]) -> Iterator[None]:
    """Save before an error leaves the block, if every process has it; a kill saves nothing here.

    The message of a JudgeError names the checkpoint. Before any other error whose message does not, a line on standard
    error does.

    Args:
      save: saves what is not saved yet; returns the checkpoint's folder, or None if nothing can be saved.
    """
    try:
        yield
    except JudgeError as error:
        path = save()
        with all_or_none("judging"):  # so that every process raises the same error
            raise JudgeError(f"{error}; the last weights are in {path}") from error
    except Stopped as stopped:
        # in a wait, see `interruption.interruptible`; elsewhere a signal is held back, and the step is saved already
        if not stopped.on_all_processes and jax.process_count() == 1:
            save()
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if jax.process_count() == 1 or isinstance(error, Failed):
            # The same error may be why nothing can be saved; it is the one to report.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they may be errors
                if (path := save()) is not None and str(path) not in str(error):
                    print(f"xpo_jax: the last weights are in {path}", file=sys.stderr, flush=True)
        raise
