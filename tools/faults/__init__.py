"""Inject every fault that a run must survive; `python -m tools.faults`.

Read cases, checkpoint_cases, config_cases and user_cases (the faults), then plans (where one strikes, and how that is
proven), inject (how it is injected) and tiny_run (the run that it hits).
"""
