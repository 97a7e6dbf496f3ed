"""Judges: which of two answers is better. A judge sees text and rows, never the run's arrays.

Read contract.py (what a judge is), ask.py (how a run asks it), answers.py (how its answers are read), scoring.py
(answers scored one by one) and limits.py (failures and cost), then one judge per file, from paraphrase.py to
combine.py. Most run on the host; `llm` and `reasoning` (prompted_model.py) and `reward_model` run models on the devices
through device_model.py and device_sampler.py, `openai` asks a server through http_client.py, and `human` asks people,
whose comparisons human_board.py holds and human_server.py shows. voting.py pools several opinions.

`JUDGES` maps the names that a config may use to the built-in judges; a user's own is named as package.module:Name.
"""

from collections.abc import Callable
from typing import Any

from xpo_jax.judges.combine import combine
from xpo_jax.judges.human import Human
from xpo_jax.judges.llm import llm
from xpo_jax.judges.openai import openai
from xpo_jax.judges.paraphrase import paraphrase
from xpo_jax.judges.reasoning import reasoning
from xpo_jax.judges.reward import reward_function, reward_model

JUDGES: dict[str, Callable[..., Any]] = {
    "paraphrase": paraphrase,
    "llm": llm,
    "reasoning": reasoning,
    "openai": openai,
    "reward_model": reward_model,
    "reward_function": reward_function,
    "combine": combine,
    "human": Human,
}
