"""Large pages on Linux for what compiled programs hold for a moment.

On a CPU, XLA takes that memory from malloc in every call and gives it back, and the kernel hands it out and clears it
page by page, 4 KiB at a time: about a fifth of a step, see docs/performance.md. glibc asks for pages of 2 MiB if
GLIBC_TUNABLES says so when a process starts, and no later. So the process starts itself again, once, in its place.

Left out on purpose: kernels that give large pages to all (nothing to do) or to nobody (nothing helps), other systems.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb=1"


def helps(environ: Mapping[str, str], setting: Path = SETTING) -> bool:
    """Whether the kernel gives large pages to who asks, and nobody has set GLIBC_TUNABLES (empty: never mind them)."""
    try:
        return "GLIBC_TUNABLES" not in environ and "[madvise]" in setting.read_text()
    except OSError:  # not Linux
        return False


def restart() -> None:
    """Start this process again with large pages, if that helps; same command line, same process id."""
    if helps(os.environ):
        os.environ["GLIBC_TUNABLES"] = TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
