"""Compressed files of lines or text: decompressed once into a temporary file, which gives random access to its rows.

The temporary file is where Python puts such files (TMPDIR), and is removed with the rows that are read from it.

Left out on purpose: archives of several files, and parquet, which compresses its own columns.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from xpo_jax.data.indexed_lines import CHUNK
from xpo_jax.data.rows import Row, Rows, SourceError
from xpo_jax.io.text import error_line, shorten


def _zstandard(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".zst": _zstandard,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
SUFFIXES = tuple(_OPENERS)


class Decompressed:
    """The rows of a compressed file; `identity` is that of the file itself."""

    def __init__(self, name: str, path: Path, read: Callable[[str, Path], Rows]):
        """Decompress the file and read the result.

        Args:
          name, path: as for `formats.read`.
          read: reads the decompressed file.

        Raises:
          SourceError: the file is damaged, or not of the format that its extension names; or raised by `read`.
          OSError: the file cannot be opened.
        """
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        self.identity: tuple[Mapping[str, Any], ...] = (
            {"file": name, "bytes": size, "sha256": digest.hexdigest()},
        )
        self._folder = tempfile.TemporaryDirectory(prefix="xpo_jax_")  # removed with this object
        content = Path(self._folder.name) / path.stem
        try:
            with _OPENERS[path.suffix.lower()](path) as source, open(content, "wb") as target:
                while chunk := source.read(CHUNK):
                    target.write(chunk)
        except Exception as error:  # each format has its own
            reason = shorten(error_line(error), 200)
            remedy = (
                f"free space in {tempfile.gettempdir()}, or set TMPDIR"
                if getattr(error, "errno", None)
                else "compress the file again"
            )
            raise SourceError(f"{name}: cannot be decompressed: {reason}; {remedy}") from None
        self._rows = read(name, content)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        return self._rows[index]
