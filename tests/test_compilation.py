"""Several compilers at once; where compiled programs are cached, and what happens where they cannot be."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from xpo_jax.runtime import compilation

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def options():
    """Return JAX's settings, which are restored after the test."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    compilation_cache.reset_cache()
    yield before
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_folder_is_in_the_users_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = tmp_path / "home" / ".cache" / "xpo_jax" / "compiled"
    assert compilation.cache_folder({}).parent == at_home
    assert (
        compilation.cache_folder({"XDG_CACHE_HOME": "somewhere"}).parent == at_home
    )  # a relative path is ignored
    elsewhere = compilation.cache_folder({"XDG_CACHE_HOME": str(tmp_path)})
    assert elsewhere.parent == tmp_path / "xpo_jax" / "compiled"


def test_each_kind_of_processor_has_its_own_folder(monkeypatch):
    here = compilation.cache_folder({})
    assert here == compilation.cache_folder({})
    cpuinfo_with = lambda flags: (
        lambda self: f"processor\t: 0\nmodel name\t: A\ncpu MHz\t: 2\nflags\t: {flags}\n" * 2
    )
    folders = set()
    for flags in ("fma avx2", "fma avx2 avx512f"):
        monkeypatch.setattr(compilation.Path, "read_text", cpuinfo_with(flags))
        folders.add(compilation.cache_folder({}).name)
    assert len(folders) == 2
    # the last one by hand, for another MHz: what changes by the minute is left out
    monkeypatch.setattr(compilation.platform, "processor", lambda: "x")
    by_hand = hashlib.sha256(b"x\nflags\t: fma avx2 avx512f\nmodel name\t: A").hexdigest()[:12]
    assert compilation.cache_folder({}).name.endswith(f"-{by_hand}")


def test_what_was_compiled_is_read_by_the_next_run(tmp_path, monkeypatch, options):
    monkeypatch.setenv("HOME", str(tmp_path))
    compilation.enable_cache({})
    folder = compilation.cache_folder({})
    x = jnp.arange(3.0)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))

    def cached_files():
        return sorted(path.name for path in folder.glob("jit_a_program_of_this_test-*-cache"))

    def run():
        def a_program_of_this_test(x):
            return jnp.sin(x) * 2

        events.clear()
        jax.jit(a_program_of_this_test)(x)
        return [event for event in events if event in ("cache_hits", "cache_misses")]

    assert run() == ["cache_misses"]
    assert len(cached_files()) == 1
    assert run() == ["cache_hits"]
    assert len(cached_files()) == 1


def test_a_home_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch, options, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").write_text("a file where the folder should be")
    compilation.enable_cache({})
    err = capsys.readouterr().err
    assert err.startswith("xpo_jax: compiled programs are not cached (") and err.count("\n") == 1
    assert "JAX_COMPILATION_CACHE_DIR" in err
    assert {name: getattr(jax.config, name) for name in OPTIONS} == options


def test_jaxs_own_variable_is_all_that_counts(tmp_path, monkeypatch, options, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", str(tmp_path / "other")):
        compilation.enable_cache({"JAX_COMPILATION_CACHE_DIR": value})
    assert {name: getattr(jax.config, name) for name in OPTIONS} == options
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


# ---- several compilers at once -----------------------------------------------------------------


class _Lowered:
    """A traced program whose compiler does `work`."""

    def __init__(self, work):
        self.compile = work


def _program(name, work, monkeypatch):
    program = compilation.Program(name, jax.make_mesh((1,), ("x",)), lambda x: x)
    monkeypatch.setattr(program, "lower", lambda *args: _Lowered(work))
    return name, lambda: program.compile()


def test_compilers_work_at_once_and_labels_come_in_order(monkeypatch):
    monkeypatch.setattr(compilation.os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=60)  # passed only by two compilers at the same time
    programs = [_program(name, both.wait, monkeypatch) for name in ("first", "second")]
    assert list(compilation.compile_all(programs)) == ["first", "second"]


def test_a_gpu_compiles_one_program_at_a_time(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    alone, entered = threading.Lock(), []

    def work():
        assert alone.acquire(blocking=False), "two compilers at once"
        entered.append(time.sleep(0.05))
        alone.release()

    list(compilation.compile_all([_program(str(i), work, monkeypatch) for i in range(4)]))
    assert len(entered) == 4


def test_an_error_of_a_compiler_is_raised_and_most_of_what_follows_is_dropped(monkeypatch):
    monkeypatch.setattr(compilation.os, "cpu_count", lambda: 1)
    traced, compiled = threading.Event(), []

    def fail():
        traced.wait(60)
        raise ValueError("the second one fails")

    def slow():
        compiled.append(time.sleep(0.05))

    programs = [_program("first", lambda: None, monkeypatch), _program("second", fail, monkeypatch)]
    programs += [_program(f"slow {i}", slow, monkeypatch) for i in range(40)]
    labels = []
    with pytest.raises(ValueError, match="the second one fails"):
        for label in compilation.compile_all([*programs, ("compiles by itself", traced.set)]):
            labels.append(label)
    assert labels == ["first"]
    time.sleep(0.2)
    assert len(compiled) < 20


def test_programs_are_traced_in_this_thread_under_its_configuration():
    seen = []

    def double(x):
        seen.append((threading.current_thread(), jax.config.jax_default_matmul_precision))
        return 2 * x

    program = compilation.Program("double", jax.make_mesh((1,), ("x",)), double)
    x = jnp.arange(3.0)
    with jax.default_matmul_precision("highest"):
        assert list(compilation.compile_all([("double", lambda: program.compile(x))])) == ["double"]
    assert seen == [(threading.current_thread(), "highest")]
    assert program(x).tolist() == [0, 2, 4]
    assert isinstance(program.compile(x), jax.stages.Compiled)  # elsewhere it is compiled at once


def test_the_count_of_compilations_is_that_of_all_threads():
    counter = compilation.CompilationCounter()
    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(
                lambda: [
                    counter._on_event("/jax/core/compile/backend_compile_duration", 0.0) for _ in range(2000)
                ]
            )
    assert counter.count == 16_000
