"""Judges, one file each. A judge sees text and rows, never the run's tensors; see values.Comparison and Verdict.

Most are plain Python on the host. `llm` runs a model of its own on the devices; see values.DeviceJudge.

`JUDGES` gives the names that a config may use for ours; yours is named as package.module:Name.
"""

from collections.abc import Callable
from typing import Any

from xpo_jax.judges.llm import llm
from xpo_jax.judges.openai import openai
from xpo_jax.judges.paraphrase import paraphrase

JUDGES: dict[str, Callable[..., Any]] = {"paraphrase": paraphrase, "llm": llm, "openai": openai}
