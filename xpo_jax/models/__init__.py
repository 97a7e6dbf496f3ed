"""Model families, one file each. A family is its config, its NNX module, its Hugging Face names and
its sharding rules; the rest of the project reaches it through `FAMILIES`."""
