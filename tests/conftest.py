"""Eight CPU devices for every test, strict arithmetic and shapes, and warnings of our own code as errors.

Arrays of different ranks or dtypes are never combined implicitly, and the shapes in the signatures of xpo_jax.algorithm
are checked at every call.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a model hub
os.environ["COLUMNS"] = "100"  # tables are as wide wherever the tests run
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # nor write into the user's cache

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("xpo_jax.algorithm", "beartype.beartype")

pytest_plugins = ["shared_fixtures"]
