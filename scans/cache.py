"""Preprocessed cases on disk: a folder each, which is whole or absent, and mapped when it is used.

An entry is found by what the case's files hold and by the settings, not by paths or times, so that
a data set which was moved, copied or touched keeps its cache. cases.py writes and opens entries.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError

from data import NORMALIZATION, VOXELS_PER_ORGAN, Volume
from scans.files import DataError, temporary_folder
from scans.layouts import Case
from scans.nifti import GZIP, grid_voxels, read_header

FILES = ("image.npy", "labels.npy", "foreground_voxels.npy", "target.npz")  # beside entry.json
FORMAT = 6  # of entries; those of another format are not used


# ------------------------------------------------------------------------------------------ entries


class DamagedError(DataError):
    """An entry that is not as it was written, which says nothing against its case."""

    def __init__(self, folder: Path, why: object) -> None:
        super().__init__(f"{folder}: is damaged ({why}); delete the folder, and it is made again")


class CachedVolume:
    """A data.Volume whose arrays stay on disk, mapped into memory for as long as they are in use.

    Raises DamagedError where a file has another size than when it was written, or, when it is used
    for the first time, another checksum.
    """

    def __init__(self, folder: Path, id_: str, modality: str, labelled: np.ndarray) -> None:
        self.folder, self.id, self.modality, self.labelled = folder, id_, modality, labelled
        self._sizes: dict[str, int] = {}
        self._unchecked: dict[str, int] = {}  # CRC-32 of the files that have not been used yet
        try:
            entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
            if entry.pop("checksum") != _checksum(entry):
                raise ValueError("entry.json has another checksum")
            self.notes, self.image_crc = entry["notes"], entry["files"]["image.npy"][1]
            self.counts = np.array(entry["counts"], dtype=np.int64)
            if self.counts.shape != labelled.shape:
                raise ValueError("entry.json has counts of other labels")
            for name in FILES:
                self._sizes[name], self._unchecked[name] = entry["files"][name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(folder, error) from error
        for name in FILES:
            self._find(name)

    @property
    def image(self) -> np.ndarray:
        return self._map("image.npy")

    @property
    def labels(self) -> np.ndarray:
        return self._map("labels.npy")

    @property
    def foreground_voxels(self) -> np.ndarray:
        return self._map("foreground_voxels.npy")

    def read_target(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """The labels on the scan's own grid, and its spacing in mm."""
        return unpack_target(self._checked("target.npz").read_bytes())

    def _map(self, name: str) -> np.ndarray:
        path = self._checked(name)
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:  # it has been spoilt since its first use
            raise DamagedError(self.folder, f"{name}: {error}") from error

    def _checked(self, name: str) -> Path:
        """The path of a file of the entry, compared with its checksum if this is its first use."""
        path = self._find(name)
        if name in self._unchecked:
            if _crc(path) != self._unchecked[name]:
                raise DamagedError(self.folder, f"{name} has another checksum")
            self._unchecked.pop(name, None)  # a thread beside this one may have been faster
        return path

    def _find(self, name: str) -> Path:
        """The path of a file of the entry, which has the size that it was written with."""
        path, size = self.folder / name, self._sizes[name]
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedError(self.folder, f"{name} should have {size} bytes")
        return path


def write_entry(folder: Path, volume: Volume, target: bytes, notes: Sequence[tuple]) -> None:
    """Write a volume, its packed target and notes on it, so that `folder` is never half."""
    with temporary_folder(folder.parent) as made:
        np.save(made / "image.npy", volume.image)
        np.save(made / "labels.npy", volume.labels)
        np.save(made / "foreground_voxels.npy", volume.foreground_voxels)
        (made / "target.npz").write_bytes(target)
        files = {name: ((made / name).stat().st_size, _crc(made / name)) for name in FILES}
        entry = {"counts": volume.counts.tolist(), "files": files, "notes": notes}
        entry["checksum"] = _checksum(entry)
        (made / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # a case of the same content may have made it
                raise


def _checksum(entry: dict) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def pack_target(labels: np.ndarray, spacing: Sequence[float]) -> bytes:
    """Labels on a scan's own grid, and its spacing; they are mostly background, and pack well."""
    packed = io.BytesIO()
    np.savez_compressed(packed, labels=labels, spacing=spacing)
    return packed.getvalue()


def unpack_target(packed: bytes) -> tuple[np.ndarray, tuple[float, ...]]:
    with np.load(io.BytesIO(packed)) as arrays:
        return arrays["labels"], tuple(arrays["spacing"].tolist())


# --------------------------------------------------------------------------------------------- disk


def cache_bytes(cases: Sequence[Case], organs: Sequence[str], spacing: float) -> int:
    """What entries for these cases will take on disk, by their headers, a little more than less."""
    total = 0
    for case in cases:
        scan, volume = grid_voxels(case.image, spacing)
        total += 5 * volume + scan // 50  # float32 and uint8; the target, at most
        total += 16 * VOXELS_PER_ORGAN * len(organs) + 4096
    return total


def check_disk(
    cases: Sequence[Case],
    organs: Sequence[str],
    spacing: float,
    cache: Path,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> str:
    """What the cache will take beyond the entries that it has, for printing; "" for nothing.

    Raises DataError if the disk does not hold it.
    """
    missing = []
    for case in cases:
        with contextlib.suppress(DataError):  # reading will say it
            if not entry_folder(cache, case, organs, spacing, ct_window).exists():
                missing.append(case)
    if not missing:
        return ""
    disk = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free
    wanted = cache_bytes(missing, organs, spacing)
    what = f"{len(missing)} preprocessed scans take {wanted / 1e9:.3g} GB in {cache}"
    if wanted > free:
        raise DataError(f"{what}, {free / 1e9:.3g} GB are free; name another --cache or --no-cache")
    return f"{what}; {free / 1e9:.3g} GB are free"


# ------------------------------------------------------------------------------------ names of them


def entry_folder(
    cache: Path,
    case: Case,
    organs: Sequence[str],
    spacing: float,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> Path:
    """Where the entry of a case on a grid of `spacing` mm lies, or will lie."""
    normalization = NORMALIZATION
    if case.modality == "ct":
        normalization = {**NORMALIZATION, "ct": ct_window}
    return cache / cache_key(case, organs, (spacing, normalization, VOXELS_PER_ORGAN))


def cache_key(case: Case, organs: Sequence[str], settings: Sequence) -> str:
    """A name that changes with what the case's files hold and with the settings."""
    files = case.files(organs)
    contents = fingerprint(case, organs)
    masks = [[(files.index(path), v) for path, v in case.masks.get(o, ())] for o in organs]
    about = (FORMAT, contents, masks, case.modality, *organs, *settings)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def fingerprint(case: Case, organs: Sequence[str], anew: bool = False) -> list[tuple[int, int]]:
    """Size and CRC-32 of the content of each file of a case that is there.

    A file is looked at once, unless anew, or its size or time says that it is another. Raises
    DataError for one that cannot be opened.
    """
    stamps = []
    for path in (path for path in case.files(organs) if path.is_file()):
        stat = path.stat()
        try:
            crc = _content_crc(path) if anew else _known_crc(path, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); check its permissions") from error
        stamps.append((stat.st_size, crc))
    return stamps


@functools.cache
def _known_crc(path: Path, size: int, time: int) -> int:
    return _content_crc(path)


def _content_crc(path: Path) -> int:
    """The CRC-32 of a file; of a .gz the one in its last 8 bytes, which covers what it unpacks to.

    A .gz may be of several members, of which each has its own: then the length beside the CRC is
    not that of the volume, and the file is taken as it is.
    """
    with path.open("rb") as file:
        if file.read(2) == GZIP and file.seek(0, os.SEEK_END) > 8:
            file.seek(-8, os.SEEK_END)
            crc, length = struct.unpack("<II", file.read())
            if length == _unpacked_bytes(path) % 2**32:
                return crc
    return _crc(path)


def _crc(path: Path) -> int:
    """The CRC-32 of a file, piece by piece: memory for all of a volume costs more than the sum."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _unpacked_bytes(path: Path) -> int:
    """What a NIfTI file comes to by its header; -1 if it has none."""
    try:
        header = read_header(path)
    except ImageFileError:
        return -1
    voxels = math.prod(header.get_data_shape())
    return int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize
