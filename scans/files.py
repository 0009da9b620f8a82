"""Files that are whole or absent, locks, and the error for what their owner can mend."""

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows: there is no lock
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".fedgin-tmp"  # the program's own folder beside what it writes


class DataError(ValueError):
    """Something about a folder or a file that its owner can mend; the message says how."""


@contextlib.contextmanager
def blaming(path: Path, advice: str) -> Iterator[None]:
    """Turn whatever a file of another form leads to into a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: is not as this program left it ({what}); {advice}") from error


# ------------------------------------------------------------------------------------------ folders


def names_in(folder: Path) -> list[str]:
    """What is in a folder, links to nowhere included, sorted; nothing in one that is not there.

    Not by glob: versions of Python differ in which links it follows. Raises DataError for a folder
    that cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return []
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")


# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A new folder with a name that nobody else has, in a folder of the program's own."""
    own, made = beside / TEMPORARY, None
    while made is None:
        if own.is_file():
            raise DataError(f"{own}: is no folder of this program; move it away")
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # a thread just removed it
            own.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=own))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are at work there
            own.rmdir()


@contextlib.contextmanager
def writing(path: Path, root: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write `path` to, which is whole and on the disk at the end, or left as it was.

    Until then it lies in `root`, the folder that the lock of its writer is in (default: its own).
    """
    with temporary_folder(root or path.parent) as folder:
        with open(folder / "file", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (folder / "file").replace(path)


def write(path: Path, content: bytes, root: Path | None = None) -> None:
    """Write a file whole or not at all, on the disk when this returns; root: see writing."""
    with writing(path, root) as file:
        file.write(content)


def check_writable(folder: Path) -> None:
    """Raise DataError for a folder that cannot be made or written to."""
    parent = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    if not os.access(parent, os.W_OK):
        raise DataError(f"{parent}: cannot be written; choose another --out")


# -------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, which the system frees if this process dies; yield whether it is held.

    It is not where another process holds it, unless this one is to wait. What an earlier holder has
    left half-written in the folder, which is made if need be, is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if not _try_lock(file, wait):
            yield False
            return
        shutil.rmtree(path.parent / TEMPORARY, ignore_errors=True)
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        try:
            yield True
        finally:
            file.truncate(0)


def _try_lock(file: Any, wait: bool) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return False
    _warn_of_no_locks(str(Path(file.name).parent))
    return True


@functools.cache  # a folder is warned of once
def _warn_of_no_locks(folder: str) -> None:
    print(f"{folder}: no locks here, so no other process may share this folder", file=sys.stderr)


def holder(path: Path) -> str:
    """Which other process holds a lock file; empty if none does."""
    if not path.exists() or fcntl is None:
        return ""
    with open(path, encoding="utf-8") as file:
        name = file.read()
        if name:  # looking at a lock is holding it for a moment, so only where somebody has been
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return name if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else ""
    return ""


# ----------------------------------------------------------------------------------------- contents


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def checksum(path: Path) -> str:
    return sha256(path.read_bytes())


def to_json(content: Mapping) -> bytes:
    return json.dumps(content, indent=1).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Raises DataError for a file that is missing, or that is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return content


def write_pt(path: Path, content: Mapping[str, Any]) -> None:
    with writing(path) as file:
        torch.save(content, file)


def read_pt(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors and plain values; opening it runs no code.

    Raises DataError for a file that is damaged, by a single bit even, or something else.
    """
    try:
        if not path.is_file():
            raise ValueError("no file")
        with zipfile.ZipFile(path) as archive:
            # torch.load checks no checksum, and what an attribute calls a folder it takes as empty.
            called_folders = [info.filename for info in archive.infolist() if info.external_attr]
            damaged = archive.testzip() or "".join(called_folders)
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("no dict")
    except Exception as error:  # PyTorch and zipfile have many for a file that is not their own
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path}: cannot be read ({what[0]})") from error
    return content


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names of files may be no UTF-8


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> bytes:
    """Rows as CSV; columns: all that a row has, by default. None and NaN are empty cells."""
    rows, text = list(rows), io.StringIO()
    columns = columns or list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        )
    return to_bytes(text.getvalue())


def write_rows(
    path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write rows as CSV; see to_csv."""
    write(path, to_csv(rows, columns))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of write_rows; raises DataError for one that is cut off."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    if not text.endswith("\n"):
        raise DataError(f"{path}: is cut off")
    return list(csv.DictReader(io.StringIO(text, newline="")))
