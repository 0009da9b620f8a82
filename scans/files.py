"""Files that are whole or absent, what a folder is claimed for, locks, and users' errors."""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import pickle
import sys
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scans.machine import is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows: there is no lock
    fcntl = None  # type: ignore[assignment]

LISTED = 5  # names in a message, at most


class DataError(ValueError):
    """A problem with a folder or file that the user can fix; the message says how."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Re-raise any error inside the block as a DataError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DataError) or is_out_of_memory(error):
            raise
        message = (str(error).strip() or repr(error)).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({message})") from error


def names_in(folder: Path) -> dict[str, Path]:
    """{name: path} of what a folder holds, sorted, without hidden files; empty without a folder.

    Names are in Unicode's composed form (NFC), so that names that look alike are equal.
    """
    with reading(folder):
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
    shown = [name for name in names if not name.startswith(".") and name != "__MACOSX"]
    found = {unicodedata.normalize("NFC", name): folder / name for name in shown}
    if len(found) < len(shown):
        raise DataError(f"{folder}: holds two names that look alike in Unicode; rename one of them")
    return found


def listed(names: Iterable[Any], separator: str = ", ") -> str:
    """Names for a message, which counts those beyond the first few."""
    texts = list(map(str, names))
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return separator.join(texts[:LISTED]) + more


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, on the disk when this returns. A file has one writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # if a kill leaves it, the next write reuses it
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the message of a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk; until then a new one may be lost."""
    with contextlib.suppress(OSError):  # on Windows and on some network disks this is not possible
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def claim(path: Path, content: Mapping[str, Any]) -> None:
    """Write what a folder is used for; if the file exists, compare it (see check_same)."""
    if path.exists():
        check_same(path, read_json(path), content)
    else:
        write(path, to_json(content))


def check_same(path: Path, kept: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raise DataError, with both values of what differs, unless a file holds this content."""
    now = json.loads(to_json(content))
    differ = [key for key in {**kept, **now} if kept.get(key) != now.get(key)]
    if differ:
        values = [f"{key} {_shown(kept.get(key))}, now {_shown(now.get(key))}" for key in differ]
        what = f"was made with {listed(values, '; ')}"
        raise DataError(f"{path}: {what}. Give the same, or another --out")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, which the system frees if this process dies; yield whether it is held.

    If another process holds it, wait for it with `wait`, and yield False without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        held = True
        try:
            if fcntl is None:
                raise OSError("Windows")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:
            _warn_of_no_locks(path.parent)
        yield held


@functools.cache  # once per folder
def _warn_of_no_locks(folder: Path) -> None:
    print(f"{folder}: locks do not work here; let no other process use it", file=sys.stderr)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def to_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Raises DataError for a file that is missing, or that is not a JSON object."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        return content


def to_pt(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_pt(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors and plain values; opening it runs no code.

    Raises DataError for another kind of file, and for a damaged one, even by a single bit.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        # torch.load verifies no checksum, and reads entries flagged as directories as empty.
        if archive.testzip() or any(info.external_attr for info in archive.infolist()):
            raise ValueError("a part of it is damaged")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # which advises to open it all the same
            raise ValueError("it holds more than tensors and plain values") from error


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> bytes:
    """Rows as CSV; columns: all that a row has, by default. None and NaN are empty cells."""
    rows, text = list(rows), io.StringIO()
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in names] for row in rows]
    table = [["" if cell != cell else cell for cell in row] for row in cells]  # NaN is not itself
    csv.writer(text).writerows([names, *table])
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may not be UTF-8
