"""Break runs in every way that they must survive; `python -m tools.faults`.

Read cases and config_cases (the faults), then inject (how one is planted) and tiny_run (the run that is broken).
"""
