"""How fast a training step is, part by part; `python -m tools.bench`.

Read __main__, then parts (what is timed), workload and machine; trl_client and trl_worker run TRL beside it.
"""
