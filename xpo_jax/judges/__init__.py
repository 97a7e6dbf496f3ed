"""Judges, one file each. A judge sees text and rows, never the run's tensors; see values.Comparison and Verdict.

Most are plain Python on the host. `llm` and `reward_model` run models of their own on the devices; see
values.DeviceJudge. `openai` asks a server.

`JUDGES` gives the names that a config may use for ours; yours is named as package.module:Name.
"""

from collections.abc import Callable
from typing import Any

from xpo_jax.judges.combine import combine
from xpo_jax.judges.llm import llm
from xpo_jax.judges.openai import openai
from xpo_jax.judges.paraphrase import paraphrase
from xpo_jax.judges.reward import reward_function, reward_model

JUDGES: dict[str, Callable[..., Any]] = {
    "paraphrase": paraphrase,
    "llm": llm,
    "openai": openai,
    "reward_model": reward_model,
    "reward_function": reward_function,
    "combine": combine,
}
