"""Chat with a model, or answer a file of prompts; `python -m tools.chat`.

Read model (a model that answers conversations), then __main__ (the command).
"""
