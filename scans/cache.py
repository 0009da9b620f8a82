"""Preprocessed cases on disk: one folder per case, whole or absent, mapped when it is used.

An entry is found by the contents of the case's files and by the settings, not by paths or times, so
a data set that was moved, copied or touched keeps its cache. cases.py decides what to write.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data import NORMALIZATION, VOXELS_PER_ORGAN, Volume
from scans.files import lock, reading, sync_folder, to_json
from scans.layouts import Case
from scans.nifti import GZIP, Scan

FORMAT = 7  # of entries; those of another format are not used
ARRAYS = ("image", "labels", "foreground_voxels")  # of a volume
MAKING = ".making-"  # prefix of the temporary folder in which an entry is made


def read_volume(folder: Path, id_: str, modality: str, labelled: np.ndarray) -> Volume:
    """Map the arrays of an entry, anew for each use.

    Kept open, the arrays of a few hundred cases would exceed the limit on open files.
    """
    with reading(folder):
        image, labels, voxels = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in ARRAYS]
    return Volume(id_, modality, image, labels, voxels, labelled)


def read_target(folder: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """The labels on the scan's own grid, and its spacing in mm."""
    with reading(folder), np.load(folder / "target.npz") as arrays:
        return arrays["labels"], tuple(arrays["spacing"].tolist())


def write_entry(folder: Path, volume: Volume, scan: Scan, target: np.ndarray) -> None:
    """Write a case so that `folder` is whole or absent; target: labels on the scan's own grid.

    Two copies of a scan share an entry: the first to be written stays, the other is discarded.
    """
    crc = zlib.crc32(np.ascontiguousarray(volume.image).data)
    metadata = {"counts": volume.counts.tolist(), "warnings": scan.warnings, "image_crc": crc}
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()  # with the umask's permissions, because colleagues may share a cache
        for name in ARRAYS:
            np.save(made / f"{name}.npy", getattr(volume, name))
        np.savez_compressed(made / "target.npz", labels=target, spacing=scan.spacing)
        (made / "entry.json").write_bytes(to_json(metadata))
        for path in made.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        sync_folder(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    sync_folder(folder.parent)


@contextlib.contextmanager
def only_writer(cache: Path) -> Iterator[None]:
    """Wait until no other process writes to a cache, so that none makes an entry twice."""
    if cache.is_dir() and not os.access(cache, os.W_OK):
        yield  # this user can read it, but not write to it
        return
    with lock(cache / "lock") as free:
        pass
    if not free:
        print(f"{cache}: waiting for another process that preprocesses scans", file=sys.stderr)
    with lock(cache / "lock", wait=True):
        for left in cache.glob(f"{MAKING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


def entry_name(
    case: Case, organs: Sequence[str], spacing: float, ct_window: tuple[float, float]
) -> str:
    """A name that changes with the contents of the case's files and with the settings."""
    labels = [(size_and_crc(path), wanted) for path, wanted in case.label_files(organs).items()]
    clipping = ct_window if case.modality == "ct" else NORMALIZATION["mri"]
    settings = FORMAT, case.modality, case.values, *organs, spacing, clipping, VOXELS_PER_ORGAN
    contents = repr((size_and_crc(case.image), labels, settings))
    return hashlib.sha256(contents.encode()).hexdigest()[:32]


def size_and_crc(path: Path) -> tuple[int, int]:
    """The size and CRC-32 of a file; zeros if it cannot be opened, because reading will say so.

    The last 8 bytes of a .gz hold the CRC-32 and length of its content, which are used instead. If
    the length is below the file's size, they describe only the last of several parts (bgzip), and
    the whole file is read.
    """
    if not (os.access(path, os.R_OK) and path.is_file()):  # opening a pipe would never end
        return 0, 0
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        if file.read(2) == GZIP and size > 8:
            file.seek(size - 8)
            if int.from_bytes((end := file.read())[4:], "little") >= size:
                return size, int.from_bytes(end, "little")
        file.seek(0)
        while chunk := file.read(2**20):  # piece by piece, because a volume may be large
            crc = zlib.crc32(chunk, crc)
    return size, crc
