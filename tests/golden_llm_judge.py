"""The LLM judge with its golden model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from xpo_jax.judges.llm import LLMJudge, llm
from xpo_jax.judges.paraphrase import paraphrase
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime.sharding import make_mesh

LLM_JUDGE_MODEL = Path(__file__).parent / "golden" / "llm_judge"


LLM_JUDGE = {
    "path": str(LLM_JUDGE_MODEL),
    "template": json.loads((LLM_JUDGE_MODEL / "cases.json").read_text(encoding="utf-8"))[0]["template"],
    "labels": ("A", "B"),
    "batch_size": 4,
    "buckets": (128, 192),
    "on_long": "error",
    "rules": None,
    "chat_template_arguments": None,
}


def build_llm_judge(**changes: Any) -> LLMJudge:
    return llm(**{**LLM_JUDGE, **changes}, rule_judge=paraphrase)


def attach_llm_judge(
    judge: LLMJudge, mesh: tuple[int, int, int] = (2, 2, 2), tokenizer: Any = None
) -> LLMJudge:
    """Attach the judge as setup.py does, beside a policy of another folder or, with a tokenizer, of its own."""
    judge.attach(
        mesh=make_mesh(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
        folder=Path("another") if tokenizer is None else LLM_JUDGE_MODEL,
        model_config=model_folder.read_config(LLM_JUDGE_MODEL),
        tokenizer=tokenizer,
        dtype=np.float32,
    )
    return judge
