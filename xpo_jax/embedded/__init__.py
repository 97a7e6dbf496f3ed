"""The default that needs no network: a tiny German paraphraser, its prompts, and the grammar that both come from.

model/ is a Hugging Face folder of Qwen2.5's architecture with its tokenizer, prompts/ holds the prompts, and german/
is the grammar; tools/build/embedded_model.py builds the first two. Read MODEL_CARD.md first.
"""
