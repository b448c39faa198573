"""Checksums of what this code writes, verified where it is read, so that a flipped bit is named.

`write_shards` puts the XXH3 of each tensor into the metadata of a safetensors file. A file that
another program writes anew has none, and a file without them is read as ever. torch.save puts the
CRC-32 of each tensor into its archive. Text files of an export or a result do not count, since
people edit them. Nobody edits those of a run's checkpoint: its checksums.json has the XXH3 of each.
"""

import json
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from xxhash import xxh3_64_hexdigest

from .errors import UserError, first_words

CHECKSUMS = "checksums.json"
KEY = "xxh3_64"
ARCHIVES = {".pt", ".pth"}
REMEDY = "get it anew, or if you changed it, save it without its metadata"
Piece = tuple[Path, str, int, int, Callable[..., Any], Any]
"""A file, the name of a part of it, where that starts, its bytes, the hash, and its value."""


def checksum(tensor: torch.Tensor) -> str:
    """The XXH3 of the bytes of a contiguous tensor on the host."""
    return xxh3_64_hexdigest(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def metadata(sums: Mapping[str, Future[str]]) -> dict[str, str]:
    """The metadata of a safetensors file whose tensors have these checksums."""
    return {"format": "pt", KEY: json.dumps({name: sum.result() for name, sum in sums.items()})}


def write_text_checksums(folder: Path) -> None:
    """Writes the checksums.json of a run's checkpoint whose other files are complete."""
    files = [f for f in sorted(folder.rglob("*")) if f.suffix not in ARCHIVES | {".safetensors"}]
    sums = {
        file.relative_to(folder).as_posix(): xxh3_64_hexdigest(file.read_bytes())
        for file in filter(Path.is_file, files)
    }
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


class VerifiedFile:
    """A safetensors file, open for reading. `get_tensor` raises a UserError for a tensor that has
    another checksum than when it was written."""

    def __init__(self, file: Path) -> None:
        self._file, self._open = file, safe_open(file, framework="pt")
        self._sums = json.loads((self._open.metadata() or {}).get(KEY, "{}"))
        self.keys, self.get_slice = self._open.keys, self._open.get_slice

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self._open.get_tensor(name)
        if name in self._sums and checksum(tensor) != self._sums[name]:
            raise UserError(f"{self._file} is damaged (the checksum of {name} is wrong); {REMEDY}")
        return tensor


@contextmanager
def verified_meanwhile(files: Iterable[Path]) -> Iterator[None]:
    """Verifies files in other threads while they are read.

    There is no option for it, since nobody waits. XXH3 takes 16 GB/s on one core of an AMD EPYC
    (CRC-32 3.1, SHA-256 1.4), so 33 GB take 2 s of a core. LOAD

    Raises:
        UserError: names a file and what in it is damaged.
    """
    with ThreadPoolExecutor(1) as one:
        damage = one.submit(find_damage, files)
        try:
            yield
        finally:  # reading may have failed because of the damage
            if damage.result():
                raise UserError(f"{damage.result()}; {REMEDY}")


def find_damage(files: Iterable[Path]) -> str | None:
    """Names a file, and what in it has another checksum; None if there is none."""
    with ThreadPoolExecutor() as pool:
        for file in filter(Path.is_file, files):
            try:
                pieces = list(_pieces(file))
                same = zip(pieces, pool.map(_is_same, pieces), strict=True)
                changed = next((piece for piece, whole in same if not whole), None)
            except Exception as error:  # a damaged header gives errors of any class
                return f"{file} is damaged ({first_words(error)})"
            if changed:
                return f"{changed[0]} is damaged (the checksum of {changed[1]} is wrong)"
    return None


def _pieces(file: Path) -> Iterator[Piece]:
    """The parts of a file of tensors, or the files in a checksums.json, that have checksums."""
    with file.open("rb") as content:
        if file.name == CHECKSUMS:
            for name, value in json.load(content).items():
                if (text := file.parent / name).is_file():
                    yield text, name, 0, text.stat().st_size, xxh3_64_hexdigest, value
        elif file.suffix == ".safetensors":
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
            for name, value in json.loads(header.get("__metadata__", {}).get(KEY, "{}")).items():
                begin, end = header[name]["data_offsets"]
                yield file, name, 8 + length + begin, end - begin, xxh3_64_hexdigest, value
        elif file.suffix in ARCHIVES:
            for part in zipfile.ZipFile(content).infolist():  # torch.save does not compress
                content.seek(part.header_offset + 26)  # two lengths of what precedes the data
                start = part.header_offset + 30 + sum(struct.unpack("<HH", content.read(4)))
                yield file, part.filename, start, part.file_size, zlib.crc32, part.CRC


def _is_same(piece: Piece) -> bool:
    file, _, start, size, hashed, value = piece
    with (
        file.open("rb") as content,
        mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as whole,
        memoryview(whole)[start : start + size] as part,
    ):
        return hashed(part) == value
