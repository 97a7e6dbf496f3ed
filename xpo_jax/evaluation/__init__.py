"""Held-out evaluation: the policy against the reference, and what the numbers are worth.

Read evaluator, then statistics (intervals, and win rates at equal lengths).
"""
