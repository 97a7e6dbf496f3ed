"""Several settings over several seeds; the command is `python -m tools.sweep`.

Read spec (the file that describes a sweep), then schedule (which run comes when) and table (intervals over seeds).
It is not replaced by Optuna or W&B sweeps, because those search for one best value and report it on the runs that it
was chosen on: here each arm is tuned on seeds of its own, compared on others in pairs, resumed, and checked up front.
"""
