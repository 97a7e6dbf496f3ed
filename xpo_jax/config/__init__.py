"""Configs: from a file and the command line to checked keyword arguments.

Read settings (the groups and their fields), then loader (files and overrides) and schema (types and suggestions).
"""
