"""Cases on the model's grid, and batches of patches drawn from them.

A case is one scan with its labels: datasets.py finds it, cases.py reads it. Here it is resampled to
cubic voxels and normalized by its modality; cache.py keeps it on disk for the next time.

    from datasets import ORGANS, find_cases
    from data import load_cases
    cases = find_cases("Totalsegmentator_dataset_v201", "ct")
    volumes, left_out = load_cases(cases, ORGANS, spacing=2.0)  # {scan file: Volume}, reasons
"""

import contextlib
import functools
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache import CachedVolume, cache_key, write_entry
from cases import read_usable, split_duplicates
from config import is_out_of_memory
from datasets import Case, DataError
from nifti import Scan, resample_image, resample_labels
from resources import grid_voxels, in_parallel, peak_bytes

NORMALIZATION = {
    "ct": (-160.0, 240.0),  # window in HU: soft tissue
    "mri": (0.5, 99.5),  # percentiles
}
ORGAN_SHARE = 0.5  # of the patches is centred on a voxel of an organ, every organ as often
VOXELS_PER_ORGAN = 1000  # candidates that a volume remembers for that


# ----------------------------------------------------------------------------------------- volumes


class Volume(NamedTuple):
    """A case on the model's grid, ready for training."""

    id: str
    modality: str
    image: np.ndarray  # (D, H, W) float32, normalized
    labels: np.ndarray  # (D, H, W) uint8: 0 background, then the organs from 1
    foreground_voxels: np.ndarray  # (n, 4) int32: organ and voxel, to centre patches on
    labelled: np.ndarray  # (1 + organs,) bool: what the case's data set labels; background always
    case: Case | None = None  # where it came from; None for what was made, not read
    target: bytes = b""  # see read_target; empty for what has no other grid than the model's

    @property
    def counts(self) -> np.ndarray:
        """(1 + organs,) voxels by label."""
        return np.bincount(self.labels.ravel(), minlength=len(self.labelled))


def load_case(case: Case, organs: Sequence[str], spacing: float) -> Volume:
    """Read a case, resample it to cubic voxels of `spacing` mm, normalize it.

    Raises DataError, naming the file, for what keeps it from being used.
    """
    scan, target = read_usable(case, organs)
    image = to_model_grid(scan, case.modality, spacing)
    one_hot = (torch.from_numpy(target == label).float() for label in range(len(organs) + 1))
    labels = resample_labels(one_hot, image.shape)
    labelled = labelled_organs(case, organs)
    volume = make_volume(case.id, case.modality, image, labels, labelled, case)
    packed = io.BytesIO()  # most voxels are background: a hundredth of the array
    np.savez_compressed(packed, labels=target, spacing=scan.spacing)
    return volume._replace(target=packed.getvalue())


def read_target(
    volume: Volume | CachedVolume, spacing: float
) -> tuple[np.ndarray, tuple[float, ...]]:
    """The labels of a case on its scan's own grid, on which it is scored, and that grid's spacing.

    What was made, not read, has no other grid than the model's, of `spacing` mm.
    """
    if not volume.target:
        return volume.labels, (spacing,) * 3
    with np.load(io.BytesIO(volume.target)) as arrays:
        return arrays["labels"], tuple(arrays["spacing"].tolist())


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
    reading = in_parallel(load, cases, "reading scans", peak_bytes(cases, spacing))
    for case, loaded in zip(cases, reading, strict=True):
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
    make = functools.partial(load_case, case, organs, spacing)
    if cache is None:
        return make()
    folder, labelled = _entry(cache, case, organs, spacing), labelled_organs(case, organs)
    if folder.exists():
        try:
            return CachedVolume(folder, case, labelled, make)
        except (OSError, ValueError, KeyError):  # damaged
            shutil.rmtree(folder, ignore_errors=True)
    write_entry(folder, make())
    return CachedVolume(folder, case, labelled, make)


def _entry(cache: Path, case: Case, organs: Sequence[str], spacing: float) -> Path:
    return cache / cache_key(case, organs, (spacing, NORMALIZATION, VOXELS_PER_ORGAN))


def cache_bytes(cases: Sequence[Case], organs: Sequence[str], spacing: float) -> int:
    """What entries for these cases will take on disk, by their headers, a little more than less."""
    total = 0
    for case in cases:
        scan, volume = grid_voxels(case, spacing)
        total += 5 * volume + scan // 50  # float32 and uint8; the target, at most
        total += 16 * VOXELS_PER_ORGAN * len(organs) + 4096
    return total


def check_disk(cases: Sequence[Case], organs: Sequence[str], spacing: float, cache: Path) -> str:
    """What the cache will take beyond the entries that it has, for printing; "" for nothing.

    Raises DataError if the disk does not hold it.
    """
    missing = []
    for case in cases:
        with contextlib.suppress(DataError):  # reading will say it
            if not _entry(cache, case, organs, spacing).exists():
                missing.append(case)
    if not missing:
        return ""
    disk = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free, wanted = shutil.disk_usage(disk).free, cache_bytes(missing, organs, spacing)
    what = f"{len(missing)} preprocessed scans take {wanted / 1e9:.3g} GB in {cache}"
    if wanted > free:
        raise DataError(f"{what}, {free / 1e9:.3g} GB are free; name another --cache or --no-cache")
    return f"{what}; {free / 1e9:.3g} GB are free"


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

    size = (batch_size, patch, patch, patch)
    for _ in range(steps):
        # Filled in place, by NumPy on this thread alone: every copy costs pages of new memory, and
        # PyTorch's threads would wait for cores that are training.
        images, labels, labelled = np.empty(size, np.float32), np.empty(size, np.int64), []
        for image, label in zip(images, labels, strict=True):
            volume = volumes[draw(len(volumes))]
            labelled.append(volume.labelled)
            try:
                _draw_patch(volume, draw, image, label)
            except (OSError, ValueError) as error:
                raise DataError(f"case {volume.id}: {error}") from error
        known = torch.from_numpy(np.stack(labelled))
        yield torch.from_numpy(images[:, None]), torch.from_numpy(labels), known


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


def _draw_patch(
    volume: Volume, draw: Callable[[int], int], image: np.ndarray, labels: np.ndarray
) -> None:
    """Fill an image and its labels, (P, P, P) each, with a patch of a volume."""
    whole, whole_labels, foreground = volume.image, volume.labels, volume.foreground_voxels
    patch, shape = len(image), whole.shape
    starts = [draw(max(n - patch, 0) + 1) for n in shape]
    organs = np.unique(foreground[:, 0])
    if len(organs) and draw(1000) < 1000 * ORGAN_SHARE:
        rows = np.flatnonzero(foreground[:, 0] == organs[draw(len(organs))])
        centre = foreground[rows[draw(len(rows))], 1:].tolist()
        starts = [
            min(max(c - patch // 2, 0), max(n - patch, 0))
            for c, n in zip(centre, shape, strict=True)
        ]
    window = tuple(slice(start, start + patch) for start in starts)
    found = whole[window]
    if found.shape != image.shape:
        image[:], labels[:] = found.min(), 0
    margins = [(patch - n) // 2 for n in found.shape]
    inside = tuple(slice(m, m + n) for m, n in zip(margins, found.shape, strict=True))
    image[inside], labels[inside] = found, whole_labels[window]
    if not np.isfinite((image.min(), image.max())).all():  # either is NaN if any voxel is
        raise ValueError("its preprocessed image has values that are NaN or infinite")
