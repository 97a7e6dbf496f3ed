"""Eight CPU devices for every test, strict numerics, and warnings of our own code as errors."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a model hub
os.environ["COLUMNS"] = "100"  # tables are as wide wherever the tests run
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # nor write into the user's cache

import jax
import pytest
from fakes import write_rows, write_tokenizer

jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer with one token per byte, of fakes.write_tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """The current directory, with good.jsonl of two prompts in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "good.jsonl", [{"text": "Guten Morgen."}, {"text": "Ja."}])
    return tmp_path
