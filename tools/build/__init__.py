"""What makes the files in the repository: the embedded model and the golden values of tests.

Read embedded_model with embedded_tokenizer and embedded_card; random_model; golden_model, golden_judge, golden_reward.
"""
