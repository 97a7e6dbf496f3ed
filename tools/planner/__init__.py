"""Memory and speed from shapes alone, without devices; the command is `python -m tools.plan`.

Read estimate (bytes and operations), then fit (does it fit, and what to change) and hardware (what devices offer).
"""
