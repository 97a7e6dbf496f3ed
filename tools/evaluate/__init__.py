"""Compare two models, or two files of answers, with a judge; `python -m tools.evaluate`.

Read __main__ (the command, and two models), then answers (two files).
"""
