"""Model families, one file each: its config, its NNX module, its Hugging Face names and its sharding rules.

Read family and registry, through which the rest of the project reaches a family, then qwen2, which builds on layers
and attention_kernels; hf/ reads and writes the folders that models come in.
"""
