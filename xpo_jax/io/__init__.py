"""Files, paths and texts: atomic writes, strict JSON, local and remote paths, one-line errors.

Read text, then files, then paths.
"""
