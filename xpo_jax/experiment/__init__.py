"""One run on disk: how it starts, what it records, and how it resumes.

Read setup (from the config to the parts), session (around the loop) and resume; then run_directory, config_changes,
verdict_journal and environment. bucket_mirror keeps a run in a bucket.
"""
