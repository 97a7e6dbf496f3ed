"""Several settings over several seeds; the command is `python -m tools.sweep`.

Read spec (the file that describes a sweep), then schedule (which run comes when) and table (intervals over seeds).
"""
