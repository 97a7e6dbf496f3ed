"""Hugging Face model folders: what is in one, whether it fits the model, and its weights.

Read model_folder (config, tokenizer, export), then tensors (names and shapes), weights (numbers on a mesh), hub.
"""
