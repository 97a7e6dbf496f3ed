"""Checkpoints: a state saved in the background, verified before it is restored, and removed by rule.

Read checkpoint, then manifest (integrity), leaves (names and shapes), retention (which checkpoints are kept),
orbax_backend (how Orbax is configured) and weights_checksum.
"""
