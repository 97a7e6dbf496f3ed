"""The packaged configs: `--config=paraphrase` names one, and your own config can start from xpo_jax.configs.paraphrase.

A wheel has them in this folder. A clone has them in configs/, beside the package.
"""

from pathlib import Path

if not Path(__file__).with_name("paraphrase.py").exists():  # a clone
    __path__.append(str(Path(__file__).parents[2] / "configs"))
