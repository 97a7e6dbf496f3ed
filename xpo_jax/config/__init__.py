"""Configs: from a file and the command line to checked keyword arguments.

Read settings (the groups and their fields), loader (files), packaged (files by name), overrides (fields from the
command line), then schema (groups against factories) and annotations (types); loss and evaluation have their groups.
"""
