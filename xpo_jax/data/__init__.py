"""Prompts: from files to batches.

indexed_lines.py      a file of lines of any size, random access
formats.py    a file -> rows
sources.py    files, globs, data sets, your own, joined or mixed -> rows
templates.py  a row and a template -> text or messages
validate.py   what a row, a text and a conversation must be
transforms.py      a row -> a prompt, or what leaves it out
streaming.py    the prompts of a source that is too large to be held
prompts.py    all of this in order: `load_prompts`, the factory of the config's `data` group
offline_pairs.py   a log of judged pairs -> prompts that bring their answers along: `load_pairs`, of the `offline` group
batches.py   prompts -> batches, random access by step
"""
