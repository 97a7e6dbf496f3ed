"""Memory and speed from shapes alone, without devices; the command is `python -m tools.plan`.

Read estimate (bytes), work (operations), then fit (does it fit, and what to change) and hardware (what devices offer).
It is not replaced by XLA's memory_analysis of ahead-of-time compiled programs, because that takes minutes per
candidate change and the accelerator's compiler, where these formulas take milliseconds; the tests compare the two.
"""
