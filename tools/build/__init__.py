"""Builders of generated files in the repository: the embedded model, and the golden values of tests.

Each is a command, `python -m tools.build.NAME`, and states what it writes; the golden builders need torch.
Read embedded_model first, then in this order:

embedded_model.py      prompts, tokenizer, model and model card under xpo_jax/embedded
embedded_tokenizer.py  the tokenizer and shape of that model
embedded_card.py       its measurements and model card
random_model.py        a model of a real size with random weights
golden_model.py        logits of transformers for tiny models
golden_judge.py        label probabilities of transformers for the LLM judge
golden_reward.py       scores of transformers for the reward model
"""
