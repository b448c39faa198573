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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from xxhash import xxh3_64_hexdigest

from .errors import UserError, as_user_error, first_words

CHECKSUMS = "checksums.json"
KEY = "xxh3_64"  # in the metadata, a JSON object of names and hexadecimal digits
ARCHIVES = {".pt", ".pth"}
REMEDY = "get it anew, or if you changed it, save it without its metadata"


def checksum(tensor: torch.Tensor) -> str:
    """The XXH3 of the bytes of a contiguous tensor on the host."""
    return xxh3_64_hexdigest(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def write_text_checksums(folder: Path) -> None:
    """Writes the checksums.json of a run's checkpoint whose other files are complete."""
    files = {f for f in folder.rglob("*") if f.is_file() and f.suffix != ".safetensors"}
    texts = sorted(file for file in files if file.suffix not in ARCHIVES)
    sums = {f.relative_to(folder).as_posix(): xxh3_64_hexdigest(f.read_bytes()) for f in texts}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


class VerifiedFile:
    """A safetensors file, open for reading. `get_tensor` raises a UserError for a damaged one."""

    def __init__(self, file: Path) -> None:
        self._file, self._open = file, safe_open(file, framework="pt")
        with as_user_error(f"the checksums in {file} cannot be read", REMEDY):
            self._sums = dict(json.loads((self._open.metadata() or {}).get(KEY, "{}")))
        self.keys, self.get_slice = self._open.keys, self._open.get_slice

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self._open.get_tensor(name)
        if name in self._sums and checksum(tensor) != self._sums[name]:
            raise UserError(f"{self._file} is damaged (the checksum of {name} is wrong); {REMEDY}")
        return tensor


@contextmanager
def verified_meanwhile(files: Iterable[Path]) -> Iterator[None]:
    """Verifies files in other threads while they are read. Raises a UserError that names damage.

    There is no option for it, since it takes no time that was seen: a load of 4.5 GB took 14.6 s
    without it and 15.2 s with it, on two threads of one core of an AMD EPYC with the files in the
    page cache, and loads differed by 1.6 s. There XXH3 takes 16 GB/s, CRC-32 3.1 (so that the load
    took 16.8 s) and SHA-256 1.4.
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
                same = zip(pieces, pool.map(lambda piece: _is_same(*piece), pieces), strict=True)
                changed = next((piece for piece, whole in same if not whole), None)
            except Exception as error:  # a damaged header gives errors of any class
                return f"{file} is damaged ({first_words(error)})"
            if changed:
                return f"{changed[0]} is damaged (the checksum of {changed[1]} is wrong)"
    return None


def _pieces(file: Path) -> Iterator[tuple[Path, str, int, int, str | int]]:
    """The file, name, start, bytes, and XXH3 or CRC-32 of each tensor in a file, or of each file in
    a checksums.json."""
    with file.open("rb") as content:
        if file.name == CHECKSUMS:
            sums = dict(json.load(content))
            for text in file.parent.rglob("*"):  # none outside, whatever names a stranger wrote
                if value := text.is_file() and sums.get(text.relative_to(file.parent).as_posix()):
                    yield text, text.name, 0, text.stat().st_size, value
        elif file.suffix == ".safetensors":
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
            for name, value in json.loads(header.get("__metadata__", {}).get(KEY, "{}")).items():
                begin, end = header[name]["data_offsets"]
                yield file, name, 8 + length + begin, end - begin, value
        elif file.suffix in ARCHIVES:
            for part in zipfile.ZipFile(content).infolist():  # torch.save does not compress
                content.seek(part.header_offset + 26)  # two lengths of what precedes the data
                start = part.header_offset + 30 + sum(struct.unpack("<HH", content.read(4)))
                yield file, part.filename, start, part.file_size, part.CRC


def _is_same(file: Path, name: str, start: int, size: int, value: str | int) -> bool:
    hashed = zlib.crc32 if isinstance(value, int) else xxh3_64_hexdigest
    with file.open("rb") as content:  # an empty file cannot be mapped
        whole = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    return hashed(memoryview(whole)[start : start + size]) == value
