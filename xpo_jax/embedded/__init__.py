"""The default that needs no network: a tiny German paraphraser of Qwen2.5's architecture, its tokenizer,
its prompts, and the grammar that all three were made from. See MODEL_CARD.md beside this file."""
