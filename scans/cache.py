"""Preprocessed cases on disk: a folder each, which is whole or absent, and mapped when it is used.

An entry is found by the contents of the case's files and by the settings, not by paths or times, so
a data set that was moved, copied or touched keeps its cache. cases.py decides what to write.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import Volume
from scans.files import lock, reading, sync_folder, to_json
from scans.layouts import Case
from scans.nifti import GZIP

FORMAT = 7  # of entries; those of another format are not used
ARRAYS = ("image", "labels", "foreground_voxels")  # of a volume


class Entry(NamedTuple):
    """A preprocessed case on disk; its files are opened each time they are used.

    Kept open, those of a few hundred cases would be more than a process may open.
    """

    folder: Path
    id: str
    modality: str
    labelled: np.ndarray

    def read_volume(self) -> Volume:
        with reading(self.folder):
            files = [self.folder / f"{name}.npy" for name in ARRAYS]
            image, labels, foreground = (np.load(file, mmap_mode="r") for file in files)
        return Volume(self.id, self.modality, image, labels, foreground, self.labelled)

    def read_target(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """The labels on the scan's own grid, and its spacing in mm."""
        with reading(self.folder), np.load(self.folder / "target.npz") as arrays:
            return arrays["labels"], tuple(arrays["spacing"].tolist())


def write_entry(
    folder: Path,
    volume: Volume,
    target: np.ndarray,
    spacing: Sequence[float],
    warnings: Sequence[str],
) -> None:
    """Write a case so that `folder` is whole or absent.

    Of two copies of a scan, which share an entry, the one that comes second yields.
    """
    made = folder.with_name(f".{uuid.uuid4().hex}")
    made.mkdir()  # with the umask's rights, because colleagues may share a cache
    for name in ARRAYS:
        np.save(made / f"{name}.npy", getattr(volume, name))
    np.savez_compressed(made / "target.npz", labels=target, spacing=spacing)
    metadata = {
        "counts": volume.counts.tolist(),
        "warnings": list(warnings),
        "image_crc": zlib.crc32(np.ascontiguousarray(volume.image).data),
    }
    (made / "entry.json").write_bytes(to_json(metadata))
    for path in made.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        made.rename(folder)
    except OSError:
        shutil.rmtree(made)
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


@contextlib.contextmanager
def only_writer(cache: Path) -> Iterator[None]:
    """Wait until no other process writes to a cache, so that none makes an entry twice."""
    with lock(cache / "lock") as held:
        if held:
            for left in cache.glob(".*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield
            return
    print(f"{cache}: waiting for another process that preprocesses scans", file=sys.stderr)
    with lock(cache / "lock", wait=True):
        yield


def entry_name(case: Case, organs: Sequence[str], *settings: Any) -> str:
    """A name that changes with the contents of the case's files and with the settings.

    Raises OSError if a file cannot be opened.
    """
    stamps = [(size_and_crc(path), labels) for path, labels in case.label_files(organs).items()]
    key = (FORMAT, size_and_crc(case.image), stamps, case.modality, *organs, *settings)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]


def size_and_crc(path: Path) -> tuple[int, int]:
    """The size and CRC-32 of a file; of a .gz, the CRC-32 and length of what it unpacks to.

    These stand in the last 8 bytes of a .gz.
    """
    with path.open("rb") as file:
        if file.read(2) == GZIP and file.seek(0, os.SEEK_END) > 8:
            size = file.tell()
            file.seek(-8, os.SEEK_END)
            return size, int.from_bytes(file.read(), "little")
        file.seek(0)
        crc = 0
        while chunk := file.read(2**20):  # piece by piece, because a volume may be large
            crc = zlib.crc32(chunk, crc)
        return file.tell(), crc
