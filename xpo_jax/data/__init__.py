"""Prompts: from files to batches.

sources.py    files -> rows
templates.py  a row and a template -> text or messages
validate.py   what a row, a text and a conversation must be
filters.py    which prompts are left out
prompts.py    all of this in order: `load_prompts`, the factory of the config's `data` group
pipeline.py   prompts -> batches, random access by step
"""
