"""Eight simulated CPU devices for every test, and no use of model hubs or of the user's cache.

pyproject.toml turns warnings of the package into errors; test_strictness.py checks promotions of ranks and dtypes.
Calls of the modules in CHECKED are checked against their annotations, shapes and dtypes included.
"""

import os
from importlib.metadata import version

import pytest
from jaxtyping import install_import_hook

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a model hub
os.environ["COLUMNS"] = "100"  # so that tables have the same width everywhere
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # no test writes into the user's cache
# Programs that run a few times compile faster so; the fixture full_optimization undoes it for one test.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# Before anything imports them. What they trace is checked once per compilation, what they do on the host at every call.
CHECKED = [
    f"xpo_jax.algorithm.{name}"
    for name in ("losses", "logps", "packing", "programs", "sampler", "sampling", "update")
]
install_import_hook(CHECKED, "type_checks.checked")

pytest_plugins = ["shared_fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    """Let `make test` compile in half the time, where XLA still has its older code generator for CPUs.

    The slow tests, the faults and the runs of the documents use the default one, as does every test from jax 0.11 on.
    """
    if config.option.markexpr == "not slow" and version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
