"""Prompts and pairs: from files to batches that are a function of the step.

Each prompt carries its row, because judges, logs and errors need it.
Read prompts.py first, then its parts in this order:

prompts.py        the factory of the config's `data` group, `load_prompts`: from sources to prompts
prompt_sets.py    the prompts of one source, in memory or streamed
split.py          which prompts are held out, where they are split off from those of training
sources.py        files, globs, data sets, your own, concatenated or mixed -> rows
formats.py        one file -> rows
folders.py        folders that are one data set
compression.py    .gz, .zst, .bz2, .xz
indexed_lines.py  a file of lines of any size, with random access
transforms.py     a row -> a prompt, or the field that excludes it
templates.py      a row and a template -> text or messages
conversations.py  the formats of conversations -> messages
turns.py          one turn -> a message
chat_templates.py messages -> tokens
preferences.py    the formats of preference data -> records of a pairs log
validate.py       checks of columns and texts
rows.py           Row, Prompt and the errors about them
streaming.py      the prompts of a source too large for memory
batches.py        prompts -> batches, with random access by step
pairs_log.py      the log of judged pairs, and its reader
offline_pairs.py  the factory of the `offline` group, `load_pairs`: logged pairs -> prompts with their responses
answer_files.py   answers made elsewhere, matched to held-out prompts
"""
