"""Inject every fault that a run must survive; `python -m tools.faults`.

Read cases, checkpoint_cases and config_cases (the faults), then inject (how one is injected) and tiny_run (the run
that it hits).
"""
