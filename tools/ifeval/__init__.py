"""IFEval: instructions that a program can check, as a judge of one's own (configs/ifeval.py, `make real`)."""
