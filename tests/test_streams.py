"""Output for people on consoles that are closed, gone, full, slow or ASCII."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xpo_jax.io import streams

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def console(monkeypatch, descriptor, name="stdout", encoding="utf-8", errors="strict"):
    """Let a descriptor be standard output (or standard error), as Python opens it, and protect it."""
    with open(descriptor, "w", encoding=encoding, errors=errors) as stream:
        monkeypatch.setattr(sys, name, stream)
        with streams.protected(0.0):
            yield
        with contextlib.suppress(OSError):
            stream.flush()


def read_all(descriptor):
    """Return what a pipe holds."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 2**22).decode()
    return ""


def test_protected_ascii_console_shows_escapes_and_json_stays_json(monkeypatch, tmp_path):
    path = tmp_path / "log"
    with console(monkeypatch, os.open(path, os.O_WRONLY | os.O_CREAT), encoding="ascii"):
        print("möglich \ud800")
        streams.print_json({"run_dir": "runs/möglich"})
    lines = path.read_text("ascii").splitlines()
    assert lines[0] == r"m\xf6glich \ud800" and json.loads(lines[1]) == {"run_dir": "runs/möglich"}


def test_protected_gone_reader_is_reported_once_and_written_to_no_more(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with console(monkeypatch, writer):
        for _ in range(3):
            print("a line", flush=True)
        os.write(writer, b"past Python, to /dev/null\n")
    err = capsys.readouterr().err
    assert err.startswith("xpo_jax: standard output is gone (Broken pipe); ") and err.count("\n") == 1


def test_protected_full_disk_drops_what_exceeds_the_limit(monkeypatch):
    monkeypatch.setattr(streams, "HELD_BYTES", 100)
    with console(monkeypatch, os.open("/dev/full", os.O_WRONLY)):
        for _ in range(100):
            print("a line of text", flush=True)


def test_protected_slow_reader_gets_everything_later(monkeypatch):
    """Hold back what a full pipe does not take, and write it once the reader continues."""
    monkeypatch.setattr(streams, "_PAUSE_SECONDS", 0.01)
    reader, writer = os.pipe()
    text = "x" * 99
    with console(monkeypatch, writer):
        for _ in range(2000):  # 200 kB; the pipe holds 64
            print(text)
        first = read_all(reader)
        print(text)
        second = read_all(reader)
        print(text)
        third = read_all(reader)
        print(text, flush=True)
    assert first + second + third + read_all(reader) == (text + "\n") * 2003
    os.close(reader)


def test_protected_slow_reader_gets_the_number_of_missing_bytes(monkeypatch):
    monkeypatch.setattr(streams, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(streams, "HELD_BYTES", 10)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    with console(monkeypatch, writer):
        print("more than ten bytes")
        read_all(reader)
    assert read_all(reader) == "xpo_jax: 20 bytes of output are missing here\n"
    os.close(reader)


def test_protected_stream_that_is_no_console_stays(monkeypatch):
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    with streams.protected():
        assert sys.stdout is memory
    assert sys.stdout is memory


def test_protected_output_serves_what_expects_a_text_stream(monkeypatch, tmp_path):
    path = tmp_path / "log"
    with console(monkeypatch, os.open(path, os.O_WRONLY | os.O_CREAT), encoding="latin-1"):
        out = sys.stdout
        assert (out.encoding, out.isatty(), out.writable(), out.closed) == ("latin-1", False, True, False)
        out.buffer.write(b"bytes\n")
        subprocess.run(["echo", "a child"], stdout=out, check=True)
        out.writelines(["ä\n"])
    assert path.read_bytes() == b"bytes\na child\n\xe4\n"


def test_protected_closed_descriptors_are_given_to_no_file():
    """Without standard streams, a log of the run must not get the number to which C++ libraries print."""
    code = """
import os, sys
from xpo_jax.io import streams
with streams.protected():
    print("lost", flush=True)
    print("lost", file=sys.stderr)
    opened = os.open(os.devnull, os.O_RDONLY)
    streams.write_past_buffers("lost")
sys.exit(opened <= 2)
"""
    shell = f"exec {sys.executable} -c '{code}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], cwd=ROOT, timeout=60).returncode == 0


def test_protected_descriptor_that_user_code_closes_goes_to_no_other_file(monkeypatch, tmp_path):
    """The file that is opened next gets the number; what is printed must not end up in it, nor be lost."""
    path, other = tmp_path / "log", tmp_path / "pairs.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with console(monkeypatch, descriptor):
        os.dup2(os.open(other, os.O_WRONLY | os.O_CREAT), descriptor)
        print("a line", flush=True)
        os.write(descriptor, b"a pair\n")
    assert path.read_text() == "a line\n" and other.read_text() == "a pair\n"


def test_reopen_closed_gives_the_number_back_to_the_console(monkeypatch, tmp_path):
    """So that what a subprocess prints after a judge has closed the stream reaches the console, and no log."""
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with console(monkeypatch, descriptor):
        os.close(descriptor)
        streams.reopen_closed()
        subprocess.run(["echo", "a child"], stdout=descriptor, check=True)
        print("a line", flush=True)
    assert path.read_text() == "a child\na line\n"


def test_protected_reader_that_is_gone_leaves_a_file_with_its_number_alone(monkeypatch, capsys, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with console(monkeypatch, writer):
        os.dup2(os.open(tmp_path / "pairs.jsonl", os.O_WRONLY | os.O_CREAT), writer)
        print("a line", flush=True)
        os.write(writer, b"a pair\n")
    assert (tmp_path / "pairs.jsonl").read_text() == "a pair\n"
    assert "standard output is gone" in capsys.readouterr().err


def test_write_past_buffers_to_a_full_pipe_returns():
    code = """
import os
from xpo_jax.io import streams
reader, writer = os.pipe()
os.dup2(writer, 2)
streams.write_past_buffers("x" * 10**6)
streams.write_past_buffers("x" * 10**6, 0.01)
os.close(reader)
streams.write_past_buffers("x")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_protected_missing_stream_takes_text(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    with streams.protected():
        assert getattr(sys, stream).write("lost") == 4
    assert getattr(sys, stream) is None
