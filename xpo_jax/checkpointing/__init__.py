"""Checkpoints: a state saved in the background, verified before it is restored, and removed by rule.

Read checkpoint, then orbax_backend (how Orbax is configured), manifest (integrity), retention, weights_checksum.
"""
