"""Command-line helpers shared by the tools: a strict argument parser, help that names the command as it was called, and
errors as one line with an exit status.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from xpo_jax.io import streams
from xpo_jax.io.text import error_line
from xpo_jax.io.user_paths import expand

_IN_A_CLONE = "tools"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for wrong arguments, and accepts no abbreviated flags."""

    def __init__(self, *, prog: str, description: str | None, usage: str | None = None):
        """Show `description` as it is laid out, and name the tools `as_called`."""
        super().__init__(
            prog=as_called(prog),
            usage=usage and as_called(usage),
            description=description and as_called(description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage and exiting."""
        raise ValueError(f"{message}; --help shows examples")


def as_called(text: str) -> str:
    """Return a help text that names the tools the way this one was called.

    Args:
      text: names them as in a clone. A console script is xpo- and the name; without a clone, the module is in
        xpo_jax.tools.
    """
    script = Path(sys.argv[0]).name.startswith("xpo-")
    return text.replace(f"python -m {_IN_A_CLONE}.", "xpo-" if script else f"python -m {__package__}.")


def path_argument(text: str) -> Path:
    """Return the path that an argument names, for `add_argument(type=path_argument)`; see `user_paths.expand`."""
    try:
        return Path(expand(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def exit_status(name: str, run: Callable[[], int]) -> int:
    """Run a tool and return its exit status.

    Args:
      name: the tool's name, which starts the error line.
      run: returns the status of a run without an error.

    Returns:
      What `run` returns; 2 for invalid input, which one line on stderr explains; 130 if interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # otherwise it warns that torch is missing
    with streams.protected(None):  # a reader may take its time; one that is gone ends nothing
        try:
            return run()
        except (ValueError, OSError) as error:
            print(f"{name}: {error_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
