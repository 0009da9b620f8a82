"""Cases on the model's grid, their cache, and batches of patches drawn from them.

A case is one scan with its labels: datasets.py finds it, cases.py reads it. Here it is resampled to
cubic voxels, normalized by its modality, and kept on disk for the next time.

    from datasets import ORGANS, find_cases
    from data import load_cases
    cases = find_cases("Totalsegmentator_dataset_v201", "ct")
    volumes, left_out = load_cases(cases, ORGANS, spacing=2.0)  # {scan file: Volume}, reasons
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cases import read_usable, split_duplicates
from config import is_out_of_memory
from datasets import Case, DataError
from nifti import Scan, resample_image, resample_labels

NORMALIZATION = {
    "ct": (-160.0, 240.0),  # window in HU: soft tissue
    "mri": (0.5, 99.5),  # percentiles
}
ORGAN_SHARE = 0.5  # of the patches is centred on a voxel of an organ, every organ as often
VOXELS_PER_ORGAN = 1000  # candidates that a volume remembers for that
ARRAYS = ("image", "labels", "foreground_voxels")  # of a volume, a file each in the cache
CACHE_FORMAT = 3  # another number, and nothing of an older cache is used


# -------------------------------------------------------------------------- volumes and their cache


class Volume(NamedTuple):
    """A case on the model's grid, ready for training."""

    id: str
    modality: str
    image: np.ndarray  # (D, H, W) float32, normalized
    labels: np.ndarray  # (D, H, W) uint8: 0 background, then the organs from 1
    foreground_voxels: np.ndarray  # (n, 4) int32: organ and voxel, to centre patches on
    labelled: np.ndarray  # (1 + organs,) bool: what the case's data set labels; background always
    case: Case | None = None  # where it came from; None for what was made, not read

    @property
    def counts(self) -> np.ndarray:
        """(1 + organs,) voxels by label."""
        return np.bincount(self.labels.ravel(), minlength=len(self.labelled))


class CachedVolume:
    """A Volume whose arrays stay on disk, mapped into memory for as long as they are in use.

    What is used for the first time is compared with its checksum; a damaged entry is made anew.
    """

    def __init__(self, folder: Path, case: Case, organs: Sequence[str], spacing: float) -> None:
        self.id, self.modality, self.case = case.id, case.modality, case
        self.labelled = labelled_organs(case, organs)
        self.folder, self._preprocessing = folder, (case, organs, spacing)
        entry = json.loads((folder / "entry.json").read_text())
        self.counts, self._checksums = np.array(entry["counts"]), entry["checksums"]

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in ARRAYS:
            raise AttributeError(name)
        path = self.folder / f"{name}.npy"
        if name in self._checksums:
            if not path.is_file() or zlib.crc32(path.read_bytes()) != self._checksums[name]:
                tqdm.write(f"{path}: is damaged; {self.case.image} is read again", file=sys.stderr)
                shutil.rmtree(self.folder)
                _write_cache(self.folder, load_case(*self._preprocessing))
            del self._checksums[name]
        return np.load(path, mmap_mode="r")


def load_case(case: Case, organs: Sequence[str], spacing: float) -> Volume:
    """Read a case, resample it to cubic voxels of `spacing` mm, normalize it.

    Raises DataError, naming the file, for what keeps it from being used.
    """
    scan, target = read_usable(case, organs)
    image = to_model_grid(scan, case.modality, spacing)
    one_hot = (torch.from_numpy(target == label).float() for label in range(len(organs) + 1))
    labels = resample_labels(one_hot, image.shape)
    labelled = labelled_organs(case, organs)
    return make_volume(case.id, case.modality, image, labels, labelled, case)


def read_target(
    volume: Volume | CachedVolume, organs: Sequence[str], spacing: float
) -> tuple[np.ndarray, tuple[float, ...]]:
    """The labels of a case on its scan's own grid, on which it is scored, and that grid's spacing.

    What was made, not read, has no other grid than the model's, of `spacing` mm.
    """
    if volume.case is None:
        return volume.labels, (spacing,) * 3
    scan, labels = read_usable(volume.case, organs)
    return labels, scan.spacing


def to_model_grid(scan: Scan, modality: str, spacing: float) -> np.ndarray:
    """A scan as the model sees it: cubic voxels of `spacing` mm, normalized, float32."""
    return normalize(resample_image(scan.voxels, scan.spacing, spacing), modality)


def normalize(image: np.ndarray, modality: str) -> np.ndarray:
    """Clip a CT (HU) to a soft-tissue window, an MRI to its percentiles; then mean 0, deviation 1.

    The statistics are the scan's own, so none of another scan's ever enters.
    """
    low, high = NORMALIZATION[modality]
    if modality == "mri":
        low, high = np.percentile(image, (low, high))
    image = image.clip(low, high)
    return ((image - image.mean()) / max(float(image.std()), 1e-6)).astype(np.float32)


def make_volume(
    id_: str,
    modality: str,
    image: np.ndarray,
    labels: np.ndarray,
    labelled: np.ndarray,
    case: Case | None = None,
) -> Volume:
    """Put a volume together, with a fixed choice of voxels on which patches may be centred."""
    rng = np.random.default_rng(0)
    chosen = [np.empty((0, 4), dtype=np.int32)]
    for label in np.unique(labels[labels > 0]):
        voxels = np.argwhere(labels == label).astype(np.int32)
        if len(voxels) > VOXELS_PER_ORGAN:
            voxels = voxels[rng.choice(len(voxels), VOXELS_PER_ORGAN, replace=False)]
        chosen.append(np.insert(voxels, 0, label, axis=1))
    return Volume(id_, modality, image, labels, np.concatenate(chosen), labelled, case)


def labelled_organs(case: Case, organs: Sequence[str]) -> np.ndarray:
    """(1 + organs,) bool: background, and the organs that the case's data set labels."""
    return np.array([True] + [organ in case.masks for organ in organs])


def load_cases(
    cases: Sequence[Case],
    organs: Sequence[str],
    spacing: float,
    cache: Path | None = None,
    skip_bad: bool = False,
) -> tuple[dict[Path, Volume | CachedVolume], list[str]]:
    """Load cases, several at a time; return volumes by scan file, and what was left out and why.

    With a cache folder a case is preprocessed once, and mapped from disk when it is used. Raises
    DataError for a case that cannot be used, unless skip_bad leaves it out.
    """

    def load(case: Case) -> Volume | CachedVolume | DataError:
        try:
            return _load(case, organs, spacing, cache)
        except DataError as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return DataError(f"{case.image}: too large for this machine's memory ({error})")

    cases, repeated = split_duplicates(cases)
    errors: list[Any] = list(repeated)
    volumes: dict[Path, Volume | CachedVolume] = {}
    for case, loaded in zip(cases, in_parallel(load, cases, "reading scans"), strict=True):
        if isinstance(loaded, DataError):
            errors.append(loaded)
        else:
            volumes[case.image] = loaded
        if errors and not skip_bad:
            raise DataError(f"{errors[0]}\n(--skip-bad leaves such cases out)")
    return volumes, list(map(str, errors))


def _load(
    case: Case, organs: Sequence[str], spacing: float, cache: Path | None
) -> Volume | CachedVolume:
    """Load one case, by way of the cache if there is one."""
    if cache is None:
        return load_case(case, organs, spacing)
    folder = cache / _cache_key(case, organs, spacing)
    try:
        return CachedVolume(folder, case, organs, spacing)
    except (OSError, ValueError, KeyError):  # not there yet, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        _write_cache(folder, load_case(case, organs, spacing))
        return CachedVolume(folder, case, organs, spacing)


def fingerprint(case: Case, organs: Sequence[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of last change of each file of a case that is there."""
    files = [path for path in case.files(organs) if path.is_file()]
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _cache_key(case: Case, organs: Sequence[str], spacing: float) -> str:
    """A name that changes with the case's files and with every setting of its preprocessing."""
    stamps = fingerprint(case, organs)
    masks = [[(str(path), values) for path, values in case.masks.get(o, ())] for o in organs]
    settings = (CACHE_FORMAT, *organs, spacing, case.modality, NORMALIZATION, VOXELS_PER_ORGAN)
    return hashlib.sha256(repr((stamps, masks, settings)).encode()).hexdigest()[:32]


def _write_cache(folder: Path, volume: Volume) -> None:
    """Write a volume under a temporary name and rename it, so that `folder` is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="tmp-"))
    try:
        checksums = {}
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(volume, name))
            checksums[name] = zlib.crc32((temporary / f"{name}.npy").read_bytes())
        entry = {"counts": volume.counts.tolist(), "checksums": checksums}
        (temporary / "entry.json").write_text(json.dumps(entry))
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another process has just written the same
            raise


def in_parallel(function: Callable, jobs: Sequence, what: str) -> Iterator[Any]:
    """function(job) of every job, in order, behind a progress bar; a thread a core works on them.

    Threads suffice: decompressing, NumPy and PyTorch let go of Python's lock while they compute.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(cores)
    try:
        results = pool.map(function, jobs)
        yield from tqdm(results, total=len(jobs), desc=what, unit="scan", leave=False)
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------- patches


def generator(*key: Any) -> torch.Generator:
    """Random numbers that depend on nothing but the key: seed, round, hospital and purpose."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def patches(
    volumes: Sequence[Volume], patch: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `steps` random batches: images (B, 1, P, P, P) float32, labels (B, P, P, P) int64.

    Third comes what each case's data set labels, (B, 1 + organs) bool. Cases are drawn with equal
    chance, with replacement. A volume smaller than the patch is padded with the lowest intensity in
    the patch and background. All draws come from `generator`.
    """

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(steps):
        batch = []
        for _ in range(batch_size):
            volume = volumes[draw(len(volumes))]
            try:
                batch.append((*_draw_patch(volume, patch, draw), torch.from_numpy(volume.labelled)))
            except (OSError, ValueError) as error:
                raise DataError(f"case {volume.id}: {error}") from error
        images, labels, labelled = map(torch.stack, zip(*batch, strict=True))
        yield images[:, None], labels.long(), labelled


def prefetch(batches: Iterator[tuple], pin: bool = False) -> Iterator[tuple]:
    """Yield the same batches, each drawn by a thread while the one before it is in use.

    pin puts them into page-locked memory, from where a GPU fetches them without being waited for.
    """

    def draw() -> tuple | None:
        batch = next(batches, None)
        return tuple(part.pin_memory() for part in batch) if pin and batch else batch

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(draw)
        while batch := following.result():
            following = thread.submit(draw)
            yield batch


def _draw_patch(volume: Volume, patch: int, draw: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    shape, foreground = volume.labels.shape, volume.foreground_voxels
    starts = [draw(max(n - patch, 0) + 1) for n in shape]
    organs = np.unique(foreground[:, 0])
    if len(organs) and draw(1000) < 1000 * ORGAN_SHARE:
        rows = np.flatnonzero(foreground[:, 0] == organs[draw(len(organs))])
        centre = foreground[rows[draw(len(rows))], 1:].tolist()
        starts = [
            min(max(c - patch // 2, 0), max(n - patch, 0))
            for c, n in zip(centre, shape, strict=True)
        ]
    image, labels = _crop(volume, starts, patch)
    if not torch.isfinite(image).all():
        raise ValueError("its preprocessed image has values that are NaN or infinite")
    return image, labels


def _crop(volume: Volume, starts: list[int], patch: int) -> tuple[Tensor, Tensor]:
    window = tuple(slice(start, start + patch) for start in starts)
    image, labels = volume.image[window], volume.labels[window]
    if image.shape != (patch,) * 3:
        before = [(patch - n) // 2 for n in image.shape]
        margins = [(b, patch - n - b) for b, n in zip(before, image.shape, strict=True)]
        image = np.pad(image, margins, constant_values=image.min())
        labels = np.pad(labels, margins)
    return torch.tensor(image), torch.tensor(labels)
