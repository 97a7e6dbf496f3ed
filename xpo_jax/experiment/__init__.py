"""One run on disk: how it starts, what it records, and how it resumes.

Read setup (from the config to the components), startup (before the loop), session (between two steps),
judged_pairs with choosing, and step; then resume with run_recorder, verdict_journal and evaluation_cache; run_directory
with run_folder, config_changes and environment; descriptions; export. judge_factory makes the judge. bucket_mirror and
bucket_lease keep a run in a bucket.
"""
