"""The tools for users: `python -m xpo_jax.tools.plan`, or `xpo-plan` where the package is installed.

A wheel has them in this folder. A clone has them in tools/, beside the tools for developers, and `python -m tools.plan`
runs the same file there; so they import one another relatively. cli.py is what they share.
"""

from pathlib import Path

if not Path(__file__).with_name("cli.py").exists():  # a clone
    __path__.append(str(Path(__file__).parents[2] / "tools"))
