"""Offline DPO: learn from the verdicts of a run that is over, and ask the judge in evaluations alone.

    python -m xpo_jax.main --config=configs/paraphrase.py
    python -m xpo_jax.main --config=configs/offline_dpo.py:runs/paraphrase/pairs.jsonl

The argument is pairs.jsonl of a run of the embedded model, or a glob such as "runs/paraphrase/pairs*.jsonl" for a run
of several processes. Without one it is the worked example's. docs/pairs.md says what to change for another model.

Nothing here was tuned: but for what stands below, all is as in configs/paraphrase.py.
"""

from ml_collections import ConfigDict

from xpo_jax.config.loader import load


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: a path or glob of pairs logs."""
    config = load(__file__.replace("offline_dpo.py", "paraphrase.py")).unlock()
    config.run_dir = "runs/offline_dpo"
    config.offline = ConfigDict(
        {"pairs": "runs/paraphrase/pairs.jsonl" if arg is None else arg},
        type_safe=False,  # or a list of them
    )
    # The bonus is for exploring, and nothing explores here.
    config.loss.alpha = 0.0
    return config
