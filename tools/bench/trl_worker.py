"""TRL's XPOTrainer as tools.bench compares with it: one step for each line on standard input.

It runs in an environment of its own (the extra `peer`) and imports nothing of this project. Its judge is a tiny
sequence-classification model, which takes next to no time. A logits processor makes responses end at prescribed
lengths. After each step it prints a line of JSON with the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.xpo import XPOConfig, XPOTrainer

END = 0  # as in tools/bench/workload.py


class Ending(LogitsProcessor):
    """Allows only the end token where a row is to end, and every other token elsewhere."""

    def __init__(self, lengths: list[int], prompt_tokens: int):
        self.last, self.prompt = torch.tensor(lengths) - 1, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.last == input_ids.shape[1] - self.prompt
        allowed = (torch.arange(scores.shape[1]) == END)[None] == ends[:, None]
        return scores.masked_fill(~allowed, -torch.inf)


class Steps(TrainerCallback):
    """Waits for a line before each step, and prints the seconds of the step after it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begun = 0.0

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
            return result

        return call

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.seconds, self.begun = {}, time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        print(json.dumps({"step": time.perf_counter() - self.begun, **self.seconds}), flush=True)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the token ids."""
    words = {str(number): number for number in range(vocabulary)}
    word_level = Tokenizer(models.WordLevel(words, unk_token=str(END)))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token=str(END), eos_token=str(END), padding_side="left"
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32) for _ in range(2)
    )
    words = tokenizer(policy.config.vocab_size)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_labels": 1, "pad_token_id": END}
    judge = Qwen2ForSequenceClassification(Qwen2Config(vocab_size=policy.config.vocab_size, **small, **heads))
    prompts, lengths = spec["prompts"], spec["lengths"]
    B = len(prompts)
    options = {"max_new_tokens": spec["new"], "temperature": 1.0, "missing_eos_penalty": None}
    if lengths is None:
        options["generation_kwargs"] = {"eos_token_id": None}  # no end token: all responses have this length
    args = XPOConfig(
        output_dir=spec["scratch"],
        per_device_train_batch_size=B,
        max_steps=spec["steps"],
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # TRL is faster without it, because generation can then use its cache
        logging_steps=10**9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    texts = [" ".join(map(str, row)) for row in prompts] * spec["steps"]
    steps = Steps()
    trainer = XPOTrainer(
        model=policy,
        ref_model=reference,
        reward_funcs=judge,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=words,
        reward_processing_classes=words,
        callbacks=[steps],
    )
    if lengths is not None:
        for model, ends in zip((policy, reference), lengths, strict=True):
            processors = LogitsProcessorList([Ending(ends, len(prompts[0]))])
            generate = model.generate
            model.generate = lambda *a, g=generate, p=processors, **k: g(*a, logits_processor=p, **k)
    trainer._generate_completions = steps.timed("generation", trainer._generate_completions)
    trainer._compute_rewards = steps.timed("judge", trainer._compute_rewards)
    trainer.train()


if __name__ == "__main__":
    main()
