"""Model families: configs, NNX modules, Hugging Face names and sharding rules.

Read family and registry, through which the rest of the project reaches a family, then decoder_config, decoder and
decoder_family, which Qwen2, Qwen3 and Llama share, and layers, rope and attention_kernels below them; hf/ reads and
writes the folders that models come in.
"""
