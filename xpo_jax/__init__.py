"""Exploratory Preference Optimization: a language model learns online from a judge of pairs of answers.

Read values (what flows), train (the loop), then algorithm (sampling, the losses, the update), judges and data; main is
the command, experiment sets a run up, and the other rooms serve these.
"""
