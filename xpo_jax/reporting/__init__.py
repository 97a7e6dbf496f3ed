"""What people read: metrics, tables, the summary, the report and the model card.

Read metrics, console and writers (during a run), summary (at its start and end), then run_reader, report, charts, html
and templates/ (after it), and model_card.
"""
