"""Eight simulated CPU devices for every test, and no use of model hubs or of the user's cache.

pyproject.toml turns warnings of the package into errors; test_strictness.py checks promotions of ranks and dtypes.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a model hub
os.environ["COLUMNS"] = "100"  # so that tables have the same width everywhere
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # no test writes into the user's cache

pytest_plugins = ["shared_fixtures"]
