"""Offline DPO: learn from the recorded verdicts of a finished run; only evaluations query the judge.

    python -m xpo_jax.main --config=configs/paraphrase.py
    python -m xpo_jax.main --config=configs/offline_dpo.py:runs/paraphrase/pairs.jsonl

The argument is the pairs.jsonl of a run of the embedded model, a glob such as "runs/paraphrase/pairs*.jsonl" for a run
of several processes, or preference data from elsewhere (prompt, chosen, rejected); the default is the pairs.jsonl of
configs/paraphrase.py. docs/pairs.md explains what to change for another model.

Nothing here has been tuned: apart from what follows, everything is as in configs/paraphrase.py.
"""

from ml_collections import ConfigDict

from xpo_jax.config.loader import load


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config that learns from the pairs logs at the path or glob `arg`."""
    config = load(__file__.replace("offline_dpo.py", "paraphrase.py")).unlock()
    config.run_dir = "runs/offline_dpo"
    config.offline = ConfigDict(
        {"pairs": "runs/paraphrase/pairs.jsonl" if arg is None else arg},
        type_safe=False,  # a list of paths is allowed as well
    )
    # The bonus is for exploration, and nothing is sampled here.
    config.loss.alpha = 0.0
    return config
