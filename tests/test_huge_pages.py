"""Large pages: asked for once, where that helps, by a process that starts itself again."""

import subprocess
import sys
from pathlib import Path

import pytest

from xpo_jax import huge_pages


@pytest.mark.parametrize(
    ("told", "environ", "expected"),
    [
        ("always [madvise] never\n", {}, True),
        ("[always] madvise never\n", {}, False),
        ("always madvise [never]\n", {}, False),
        ("always [madvise] never\n", {"GLIBC_TUNABLES": ""}, False),
        ("always [madvise] never\n", {"GLIBC_TUNABLES": "glibc.malloc.check=3"}, False),
        (None, {}, False),
    ],
)
def test_where_it_helps(told, environ, expected, tmp_path):
    setting = tmp_path / "enabled"
    if told is not None:
        setting.write_text(told)
    assert huge_pages.helps(environ, setting) is expected


def test_the_same_command_starts_once_more_as_the_same_process(tmp_path):
    """The kernel's setting is a file of ours; the script counts its starts in another."""
    (tmp_path / "enabled").write_text("always [madvise] never")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from xpo_jax import huge_pages\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "with (folder / 'starts').open('a') as file:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], file=file)\n"
        "huge_pages.helps.__defaults__ = (folder / 'enabled',)\n"
        "huge_pages.restart()\n"
        "sys.exit(7)\n"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, str(script), "--config=a b", "--x"]
    process = subprocess.Popen(command, env={"PYTHONPATH": str(root)})
    assert process.wait(60) == 7
    first, second = (tmp_path / "starts").read_text().splitlines()
    assert first == f"{process.pid} None ['--config=a b', '--x']"
    assert second == f"{process.pid} glibc.malloc.hugetlb=1 ['--config=a b', '--x']"
