"""The purposes of random draws: each has its own stream of keys under the run's seed.

A value, once used, belongs to its purpose: changing one would change what a run draws.
"""

from __future__ import annotations

import enum


class Stream(enum.IntEnum):
    """What is folded into the seed first, so that no two purposes share a key."""

    TRAINING = 1
    EVALUATION = 2
    REPLAY = 3
    CHAT = 4  # tools.chat, which is no part of a run
