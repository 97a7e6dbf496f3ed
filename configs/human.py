"""You are the judge: the embedded paraphraser learns from your choices, on a page in your browser.

    python -m pip install -e '.[human]'
    python -m xpo_jax.main --config=configs/human.py

or `make play`. The run prints the address of the page. Stop it whenever you like, and run the same command to resume:
no choice is lost, and none is asked twice. `--config.judging.max_queries=64` sets after how many choices it ends.

For your own model and prompts, change `model.path` and `data` as docs/data.md explains, and set `evaluation.judge` to a
judge of your own, or to None: then you judge the held-out answers as well, two for each of `evaluation.prompts` and
`evaluation.reference_samples`, at the start and at the end, so lower these. What follows differs from
configs/paraphrase.py.
"""

from ml_collections import ConfigDict

from xpo_jax.config.loader import load


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config; it takes no argument."""
    if arg is not None:
        raise ValueError(f"configs/human.py takes no argument, got {arg!r}; set config.model.path instead")
    config = load(__file__.replace("human.py", "paraphrase.py")).unlock()
    config.run_dir = "runs/human"
    config.batch_size = 8  # the policy learns after every eight choices
    config.steps = 64
    config.judging.max_queries = 512
    config.max_step_seconds = None  # a person may take a day

    # Held-out answers are measured by rules that nobody has to wait for, and that the policy was not trained to please.
    config.evaluation.judge = config.judge.copy_and_resolve_references()
    config.evaluation.prompts = 200
    # The page shows the latest of these win rates: training pairs of two samples of the policy have none.
    config.evaluation.every_steps = 8
    # xpo_jax/judges/human.py: Human
    config.judge = ConfigDict(
        {
            "name": "human",
            "port": 8123,  # on this machine; 0 takes a free one
            "votes": 1,  # people who choose on each comparison
            "votes_folder": "runs/human_votes",
        }
    )
    config.judging.steps_behind = 1  # the policy learns from eight choices during the next eight
    config.judging.max_failed_fraction = 1.0  # a skipped comparison has no verdict, and that is no failure

    # A choice costs more than an update. With 500 verdicts in rounds of eight this won most of what was tried, within
    # the noise; with 2,000 beyond it (docs/choosing.md, "How many verdicts can you afford?").
    config.replay.updates = 4
    config.loss.second_candidate = "policy"
    config.loss.bonus, config.loss.alpha = "bounded", 0.016
    config.optimizer.warmup_steps = 2  # as measured there; a fraction of the steps would be longer
    config.checkpoint.every_steps = 4
    config.logging.table_every_steps = 1
    return config
