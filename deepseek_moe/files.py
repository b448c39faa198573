"""Files and folders that are complete or absent, however many processes write them at a time.

Each is written under a private name beside its own, and renamed when it is complete. If a process
is killed, its unfinished folder stays until the next process writes the same folder.
"""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import RunError, UserError


def check_writable(name: str | Path, overwrite: bool = True) -> Path:
    """The path of a file that can be written.

    Raises:
        UserError: it cannot be written, or it exists and `overwrite` is False.
    """
    try:
        file = Path(name).expanduser()
        writable = os.access(file.absolute().parent, os.W_OK)
        writable &= file.is_file() or not file.exists()  # neither a folder nor a device
    except (OSError, RuntimeError, ValueError):  # no such user, name too long, ...
        writable = False
    if not writable:
        raise UserError(f"{name} cannot be written; give a file in a folder that exists")
    if not overwrite and file.exists():
        raise UserError(f"{name} is there already; choose another name, or add --overwrite")
    return file


def write_text(name: str | Path, text: str, overwrite: bool = False) -> Path:
    """Writes a file (UTF-8) that is complete or absent, and returns its path.

    Raises:
        UserError: it cannot be written, or it exists and `overwrite` is False.
    """
    return write_bytes(name, text.encode("utf-8"), overwrite)


def write_bytes(name: str | Path, content: bytes, overwrite: bool = False) -> Path:
    """`write_text` for what is no text."""
    file = check_writable(name, overwrite)
    try:
        write_aside(file, content, overwrite)
    except OSError as error:
        said = f"{name} cannot be written: {error.strerror}; choose another name"
        raise UserError(said) from error
    return file


try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK = ".being-written"  # a file in an unfinished folder, locked while its writer lives
UNFINISHED = ".partial"
_being_written: set[Path] = set()  # by this process, whose own locks would not stop it


def lock(file: IO[Any]) -> bool:
    """Locks a file that is open for writing, until it is closed or this process ends.

    Returns:
        False where the file system has no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # systems differ in which
        raise BlockingIOError(*error.args) from error
    except OSError:
        return False
    return True


def write_aside(file: Path, content: str | bytes, overwrite: bool = True) -> None:
    """Writes a file (text in UTF-8) that is complete as soon as it has its name.

    Raises:
        FileExistsError: it exists, and `overwrite` is False.
        OSError: it cannot be written. Nothing new is left.
    """
    file = file.resolve()  # a link stays a link, and its target is written
    aside = _private_name(file, ".tmp")
    try:
        with aside.open("xb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
        if overwrite:
            os.replace(aside, file)
        else:  # a rename would replace a file that another process has made meanwhile
            _rename_to_new(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def remove_unfinished(file: Path) -> None:
    """Removes what `write_aside` left of `file` when its process was killed. Nobody else may be
    writing the file."""
    for aside in file.parent.glob(f"{glob.escape(file.name[:40])}.*.tmp"):
        aside.unlink()


def _rename_to_new(aside: Path, file: Path) -> None:
    try:
        os.link(aside, file)  # fails if the name exists
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        file.open("x").close()
        try:
            os.replace(aside, file)
        except OSError:
            file.unlink()
            raise


def free_bytes_at(path: Path) -> int:
    """Bytes that are free on the disk of `path`, which need not exist yet."""
    path = path.resolve()  # a link's target may be on another disk
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def readable_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def refuse_occupied(folder: Path) -> None:
    """Refuses a `folder` that `complete_or_absent` must not or cannot replace by a rename.

    Raises:
        UserError: it is a file or not empty, a mounted file system, or the current folder (the
            user's shell would go on in a folder that is deleted).
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; give a new folder, or remove it first")
    if os.path.ismount(folder):
        raise UserError(f"{folder} is where a file system is mounted; give a new folder inside it")
    if folder.exists() and folder.samefile("."):
        raise UserError(f"{folder} is the current folder; give a new folder inside it")


def describe_differences(
    found: dict[str, Any], wanted: dict[str, Any], hashed: Collection[str]
) -> dict[str, str]:
    """The settings in which two commands differ, each with a phrase for a message. The values of
    those in `hashed` say nothing to a reader."""
    names = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    return {
        name: f"other {name.replace('_', ' ')}"
        if name in hashed
        else f"{name}: {found.get(name)} there, {wanted.get(name)} now"
        for name in names
    }


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A private folder to fill, which is renamed to `folder` (absent or empty) in the end.

    Raises:
        RunError: another process filled `folder` meanwhile. Its files stay.
        OSError: it cannot be written. Nothing new is left.
    """
    folder = folder.resolve()  # a link stays a link, and its target is filled
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    aside = _private_name(folder, UNFINISHED)
    _being_written.add(aside)
    try:
        aside.mkdir()
        if folder.exists():  # its owner may have made it private
            shutil.copymode(folder, aside)
        with (aside / f"{LOCK}.new").open("x") as owner:
            lock(owner)
            os.rename(owner.name, aside / LOCK)  # a file with this name has always been locked
            yield aside
            (aside / LOCK).unlink()
        try:
            os.replace(aside, folder)  # succeeds over an empty folder only
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise RunError(
                f"{folder} was written by another process meanwhile, and stays as that one left "
                "it; give another folder"
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _being_written.discard(aside)


def _private_name(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name[:40]}.{secrets.token_hex(6)}{ending}")


def _remove_leftovers(folder: Path) -> None:
    """Removes unfinished folders whose lock is open, because their process was killed."""
    names = f"{glob.escape(folder.name[:40])}.*{UNFINISHED}"
    for aside in set(folder.parent.glob(names)) - _being_written:
        with suppress(OSError), (aside / LOCK).open("r+") as owner:
            if lock(owner):
                shutil.rmtree(aside)
