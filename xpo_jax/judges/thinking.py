"""What a judge reads of an answer that a model has thought about first, as Qwen3 does between <think> and </think>.

Only the judge's copy changes (`judging.hide_thinking`): the tokens that the policy learns from, the pairs log and the
tables of the evaluation stay complete.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def without_thinking(text: str) -> str:
    """Return an answer without its <think>...</think> blocks, and without blank space at both ends.

    A block that is never closed ends with the text: such an answer stopped while the model was thinking. Before a
    </think> that nothing opened, all is thinking: some chat templates open the block in the prompt.
    """
    return _BLOCK.sub("", text).rpartition("</think>")[2].strip()
