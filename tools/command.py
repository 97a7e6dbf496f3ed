"""What the command lines of the tools share."""

from __future__ import annotations

import argparse
from typing import NoReturn


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
