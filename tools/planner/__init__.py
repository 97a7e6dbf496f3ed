"""Memory and speed from shapes alone, without devices; the command is `python -m tools.plan`.

Read shapes, estimate (bytes) with saved (of the backward pass) and program_code, work (operations), then fit (does it
fit, and what to change) and hardware (what devices offer). These formulas take milliseconds, so that many changes can
be tried. What the accelerator's own compiler allocates takes minutes (--compile): read topology, programs, hlo,
traffic, compiled, findings, cycles, then compile_report.
"""
