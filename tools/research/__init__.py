"""A bandit on which the paper's claims can be checked; the command is `python -m tools.sample_efficiency`.

Read bandit, then bandit_figure.
"""
