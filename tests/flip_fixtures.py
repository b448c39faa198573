"""A bit that flips on a disk."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip(file: Path, bit: int | None = None) -> None:
    """Flips a bit of the file; without its number, one of a tensor, or in the middle of a text."""
    content = bytearray(file.read_bytes())
    if bit is None and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            part = max(map(archive.read, archive.namelist()), key=len)
        bit = 8 * (content.index(part) + len(part) // 2)
    elif bit is None:
        bit = 8 * (len(content) - 1 if file.suffix == ".safetensors" else len(content) // 2)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@contextmanager
def flipped(file: Path, bit: int | None = None) -> Iterator[None]:
    """Flips a bit for a while."""
    before = file.read_bytes()
    flip(file, bit)
    yield
    file.write_bytes(before)
