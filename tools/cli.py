"""What the command lines of the tools share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from xpo_jax.io.text import error_line


class Parser(argparse.ArgumentParser):
    """argparse with its mistakes as ValueErrors, which a tool prints as one line; flags are written out in full."""

    def __init__(self, *, prog: str, description: str | None, usage: str | None = None):
        """Take the help text as it stands."""
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ValueError(f"{message}; --help shows examples")


def status_of(name: str, run: Callable[[], int]) -> int:
    """The exit status of a tool: what `run` returns, 2 for something to mend (one line says what), 130 interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would complain that torch is missing
    try:
        return run()
    except (ValueError, OSError) as error:
        print(f"{name}: {error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
