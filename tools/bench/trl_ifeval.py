"""TRL's OnlineDPOTrainer on what configs/ifeval.py trains, for docs/ifeval.md to compare with.

    trl/bin/python -m tools.bench.trl_ifeval MODEL OUT --steps=40

MODEL is the folder that `python -m tools.ifeval --convert` prints. It runs in an environment of its own, which
docs/ifeval.md makes, in the root of the repository, and imports only the prompts and the checkers of this project.
Both candidates are the policy's, as TRL draws them; the reward is the judge's score. OUT then holds the trained model,
for `python -m tools.ifeval MODEL OUT`. The last line is JSON: the seconds of training, and the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from tools.ifeval import prompts
from tools.ifeval.checks import grade, score

NEARNESS_WEIGHT = 0.5  # as judge.nearness_weight in configs/ifeval.py


def reward(completions: list[Any], rules: list[str], **_: Any) -> list[float]:
    """Return the score that tools.ifeval.judge gives each answer; `rules` is its row's instructions as JSON."""
    scores = []
    for completion, rule in zip(completions, map(json.loads, rules), strict=True):
        graded = grade(rule["instruction_id_list"], rule["kwargs"], completion[0]["content"])
        scores.append(score(graded, NEARNESS_WEIGHT))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.trl_ifeval", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # here, so that --help needs none of them
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    rows = prompts.train()
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows],
            "rules": [
                json.dumps({name: row[name] for name in ("instruction_id_list", "kwargs")}) for row in rows
            ],
        }
    )
    # What configs/ifeval.py sets, where TRL has it.
    args = OnlineDPOConfig(
        output_dir=f"{options.out}/trainer",
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        beta=0.1,
        max_new_tokens=64,
        temperature=0.7,
        missing_eos_penalty=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = OnlineDPOTrainer(
        model=policy,
        ref_model=reference,
        reward_funcs=reward,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    begun = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begun
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)
    print(json.dumps({"seconds": round(seconds, 1), "pairs": options.steps * options.batch_size}))


if __name__ == "__main__":
    main()
