"""Judges, one file each. A judge sees text and rows, never tensors; see values.Comparison and Verdict.

`JUDGES` gives the names that a config may use for ours; yours is named as package.module:Name.
"""

from xpo_jax.judges.paraphrase import paraphrase

JUDGES = {"paraphrase": paraphrase}
