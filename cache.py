"""Preprocessed cases on disk: a folder each, which is whole or absent, and mapped when it is used.

An entry is found by what the case's files hold and by the settings, not by paths or times, so that
a data set which was moved, copied or touched keeps its cache. data.py writes and uses the entries:

    from datasets import ORGANS, find_cases
    from cache import fingerprint
    print(fingerprint(find_cases("Totalsegmentator_dataset_v201")[0], ORGANS))  # path, size, CRC-32
"""

import functools
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.filebasedimages import ImageFileError
from tqdm import tqdm

from datasets import Case, DataError
from nifti import GZIP, read_header

FILES = {  # of an entry, by what they hold of a volume
    "image": "image.npy",
    "labels": "labels.npy",
    "foreground_voxels": "foreground_voxels.npy",
    "target": "target.npz",
}
FORMAT = 4  # another number, and nothing of an older cache is used


class CachedVolume:
    """A data.Volume whose arrays stay on disk, mapped into memory for as long as they are in use.

    What is used for the first time is compared with its checksum; a damaged entry is made anew, by
    `make`. Raises OSError, ValueError or KeyError for a folder that holds no entry.
    """

    def __init__(
        self, folder: Path, case: Case, labelled: np.ndarray, make: Callable[[], Any]
    ) -> None:
        self.id, self.modality, self.case, self.labelled = case.id, case.modality, case, labelled
        self.folder, self._make = folder, make
        entry = json.loads((folder / "entry.json").read_text())
        self.counts, self._checksums = np.array(entry["counts"]), entry["checksums"]

    def __getattr__(self, name: str) -> Any:
        if name not in FILES:
            raise AttributeError(name)
        path = self.folder / FILES[name]
        if name in self._checksums:
            if not path.is_file() or _crc(path) != self._checksums[name]:
                tqdm.write(f"{path}: is damaged; {self.case.image} is read again", file=sys.stderr)
                volume = self._make()
                shutil.rmtree(self.folder, ignore_errors=True)
                write_entry(self.folder, volume)
                self._checksums.clear()
            self._checksums.pop(name, None)
        return path.read_bytes() if name == "target" else np.load(path, mmap_mode="r")


def write_entry(folder: Path, volume: Any) -> None:
    """Write a data.Volume under a temporary name and rename it, so that `folder` is never half.

    If it is there by then, another process or a case of the same content has written the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="tmp-"))
    try:
        for name in ("image", "labels", "foreground_voxels"):
            np.save(temporary / FILES[name], getattr(volume, name))
        (temporary / FILES["target"]).write_bytes(volume.target)
        checksums = {n: _crc(temporary / file) for n, file in FILES.items()}
        entry = {"counts": volume.counts.tolist(), "checksums": checksums}
        (temporary / "entry.json").write_text(json.dumps(entry))
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_key(case: Case, organs: Sequence[str], settings: Sequence) -> str:
    """A name that changes with what the case's files hold and with the settings."""
    files = case.files(organs)
    contents = [stamp[1:] for stamp in fingerprint(case, organs)]
    masks = [[(files.index(path), v) for path, v in case.masks.get(o, ())] for o in organs]
    about = (FORMAT, contents, masks, case.modality, *organs, *settings)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def fingerprint(case: Case, organs: Sequence[str]) -> list[tuple[str, int, int]]:
    """Path, size and CRC-32 of the content of each file of a case that is there.

    Raises DataError for one that cannot be opened.
    """
    stamps = []
    for path in (path for path in case.files(organs) if path.is_file()):
        stat = path.stat()
        try:
            crc = _content_crc(path, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); check its permissions") from error
        stamps.append((str(path.resolve()), stat.st_size, crc))
    return stamps


@functools.cache  # a file is looked at once, unless its size or time says that it is another
def _content_crc(path: Path, size: int, time: int) -> int:
    """The CRC-32 of a file; of a .gz the one in its last 8 bytes, which covers what it unpacks to.

    A .gz may be of several members, of which each has its own: then the length beside the CRC is
    not that of the volume, and the file is taken as it is.
    """
    with path.open("rb") as file:
        if file.read(2) == GZIP and size > 8:
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
