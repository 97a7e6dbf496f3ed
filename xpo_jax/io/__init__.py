"""Files and paths: atomic writes, errors that name the file, local and remote paths.

Read files, then paths.
"""
