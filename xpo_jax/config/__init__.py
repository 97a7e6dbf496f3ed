"""Configs: from a file and the command line to checked keyword arguments.

Read settings (the groups and their fields), then loader (files), overrides (fields from the command line), schema
(groups against factories) and annotations (types).
"""
