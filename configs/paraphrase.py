"""The worked example: a German paraphraser in standard mode (change words and structure; keep meaning,
tone and length), taught by a judge that rewards distance in letters behind a gate for meaning.

    python -m xpo_jax.main --config=configs/paraphrase.py

Without an argument it runs the embedded model and prompts, on any machine, without network. Every field is
the keyword argument of the same name of the factory that its group names; a comment says why its value.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: None for the embedded model."""
    if arg is not None:
        raise ValueError(f"configs/paraphrase.py takes no argument yet, found {arg!r}")
    config = ConfigDict()
    config.run_dir = "runs/paraphrase"
    config.seed = 0
    config.steps = 240  # four epochs: as many as fit into five minutes on two cores
    config.batch_size = 64
    # Updates in a row that may be skipped because a number was not finite, before the run gives up.
    config.max_skipped = 5

    # xpo_jax/data/prompts.py: load_prompts
    config.data = ConfigDict(
        {
            "train": "embedded:train",  # or a path, a list of paths, a glob: jsonl
            "held_out": "embedded:held_out",
            "template": ({"role": "user", "content": "<pphr_input>{input}</pphr_input>"},),
            "column": None,  # instead of a template: the column that holds a text or a conversation
            "take": None,  # only the first so many training rows
            "shuffle": True,
            # Drops rows whose last user content is longer than 0.9 x max_new_tokens: their paraphrase would
            # be cut off. Not needed here, where no sentence is that long.
            "filter_length": False,
            "max_prompt_tokens": 40,
            "buckets": (32, 40),  # the longest embedded prompt has 34 tokens, nearly all are below 32
            "on_long": "error",  # or "drop", with a count
        }
    )

    # xpo_jax/settings.py: Model
    config.model = ConfigDict({"path": "embedded", "reference": None, "dtype": "auto"})

    # xpo_jax/sharding.py: make_mesh. -1 fills up with the devices that there are.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    # xpo_jax/distributed.py: start. tools/launch has a page for each way to start many processes.
    config.distributed = ConfigDict(
        {
            "mode": "auto",  # joins a TPU pod, a Slurm step or an MPI job where it is part of one
            "coordinator": None,  # or "host:port" of process 0, where no scheduler tells,
            "num_processes": None,  # with these two
            "process_id": None,
            "timeout_seconds": 300,  # for all processes to appear
        }
    )

    # xpo_jax/sampler.py: Sampling
    config.sampling = ConfigDict(
        {
            "max_new_tokens": 32,  # the longest embedded answer has 27
            # Mistakes are rarer than at 1.0 (4 % of answers are invalid instead of 12 %), variety is the same.
            "temperature": 0.8,
            # Truncation limits what can be explored; log-probabilities are of the full distribution.
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    )

    # xpo_jax/judges/paraphrase.py: paraphrase
    config.judge = ConfigDict(
        {
            "name": "paraphrase",
            # "embedded" knows the grammar and is exact; "general" is for any other text.
            "gate": "embedded",
            "distance_weight": 0.6,
            "start_weight": 0.3,  # the beginning is what a reader sees first, and what models copy first
            "length_weight": 0.1,
            # A narrow win says little about what to do elsewhere, and most wins are narrow: verdicts that are
            # soft at this scale carry less noise. Win rates count a narrow win as a win all the same.
            "softness": 0.1,
            "input_tag": "pphr_input",
            "output_tag": "pphr_output",
            # Limits of the general gate, without effect on the embedded one.
            "min_kept": 0.3,
            "min_similarity": 0.3,
            "max_similarity": 1.0,
            "min_length_ratio": 0.6,
            "max_length_ratio": 1.7,
        }
    )

    # xpo_jax/settings.py: Loss
    config.loss = ConfigDict(
        {
            "second": "reference",  # "policy" with alpha 0 is online DPO
            "kind": "sigmoid",
            # Low beta lets the policy go far from the reference in few steps; invalid answers cost it.
            "beta": 0.1,
            # The bonus stays a small part of the loss: with hard verdicts it has no floor of its own.
            "alpha": 1e-4,
            "bonus_clip": 500.0,
            "entropy_weight": 0.0,
            "unfinished_loses": True,
        }
    )

    # xpo_jax/update.py: make_optimizer
    config.optimizer = ConfigDict(
        {
            "learning_rate": 5e-4,  # a 1.6 M parameter model; a 0.5 B one wants 5e-7
            "schedule": "linear",
            "warmup_steps": 10,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
        }
    )

    # xpo_jax/settings.py: Layout. None of this changes what is learned.
    config.layout = ConfigDict(
        {
            "micro_batch_size": 64,
            "response_buckets": (24, 32),
            "chunk_tokens": 4096,
            "remat": False,
        }
    )

    # xpo_jax/settings.py: Evaluation
    config.evaluation = ConfigDict({"prompts": 1000, "reference_samples": 4, "every_steps": 0})

    # xpo_jax/settings.py: Logging
    config.logging = ConfigDict({"table_every_steps": 20, "tensorboard": True})
    return config
