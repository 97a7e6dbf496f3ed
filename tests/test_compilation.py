"""Where compiled programs are cached between runs, and what happens where they cannot be."""

import hashlib

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
