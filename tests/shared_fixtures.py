"""Fixtures of several test modules, and the order of the modules.

conftest.py loads this plugin after it has configured JAX.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fast_programs
import jax
import pytest
import tiny_run
from fake_models import write_tokenizer
from fakes import Counting

# The slowest modules, slowest first: a worker that starts one of them late ends long after the other.
LONGEST = (
    "test_mypy",
    "test_train",
    "test_distributed",
    "test_lora_runs",
    "test_resume",
    "test_plan",
    "test_sampler",
    "test_sample_efficiency",
    "test_mesh",
    "test_bench",
    "test_chat",
    "test_update",
    "test_sharding",
    "test_faults",
    "test_logps",
    "test_openai_judge",
    "test_bfloat16",
    "test_decoder",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slowest modules first; workers take the modules in this order."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Exclude what all tests import from garbage collection, which scanned it each time that JAX traced a program."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Return a tokenizer with one token per byte, of `fake_models.write_tokenizer`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """Make a temporary folder with good.jsonl, two prompts, the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_run.write_rows(tmp_path / "good.jsonl", [{"text": "Guten Morgen."}, {"text": "Ja."}])
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Keep a process that runs many modules from holding more programs than it can."""
    yield
    fast_programs.forget_programs()


@pytest.fixture
def full_optimization() -> Iterator[None]:
    """Let XLA optimize what a test compiles, as it does for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Compile each program once for all runs of this process; see fast_programs.py."""
    with fast_programs.shared_programs():
        yield


@pytest.fixture(scope="module")
def one_device(shared_programs: None) -> Iterator[None]:
    """Share programs, on one device and with one sequence length, for tests that depend on neither."""
    with tiny_run.one_device(), tiny_run.one_sequence_length():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and its prompts, for all runs of a module; see `tiny_run.tiny_config`."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_run.tiny_config(folder)
    return folder


STEPS = 6  # of the runs of `run`


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[..., tuple[int, str, str, int]]:
    """Run six steps in `folder / name`, saved after every second and evaluated after every third.

    Returns exit status, standard output, standard error, and the number of comparisons that the judge got.
    """

    def start(name: str, *flags: str, **changes: Any) -> tuple[int, str, str, int]:
        steps = {"steps": STEPS, "checkpoint__every_steps": 2, "evaluation__every_steps": 3}
        config = tiny_run.changed_config(folder, judge__name="fakes:Counting", **{**steps, **changes})
        Counting.comparisons = []
        return *tiny_run.run_name(folder, name, config, flags), len(Counting.comparisons)

    return start
