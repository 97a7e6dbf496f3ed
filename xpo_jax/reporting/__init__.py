"""What people read: metrics, tables, the summary, the report and the model card.

Read metrics and writers (during a run), summary (at its start and end), then run_reader, report and html (after it),
and model_card.
"""
