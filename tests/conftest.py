"""Eight CPU devices for every test, strict numerics, and warnings of our own code as errors."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a model hub
os.environ["COLUMNS"] = "100"  # tables are as wide wherever the tests run
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # nor write into the user's cache

import jax

jax.config.update("jax_numpy_rank_promotion", "allow")

pytest_plugins = ["shared_fixtures"]
