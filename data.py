"""From arrays to batches: scans on the model's grid, and patches drawn from them.

A scan is resampled to cubic voxels and normalized by its modality; with its labels it makes a
Volume, from which patches are drawn. Needs only PyTorch and NumPy:

    import numpy as np
    from data import generator, make_volume, patches, to_model_grid
    scan = np.random.default_rng(0).normal(0, 100, (64, 64, 40)).astype(np.float32)  # HU
    image = to_model_grid(scan, spacing=(1, 1, 2.5), modality="ct", target_spacing=2.0)
    labels = (image > 1).astype(np.uint8)  # of one organ, beside the background 0
    volume = make_volume("s1", "ct", image, labels, labelled=np.array([True, True]))
    for images, targets, known in patches([volume], 16, 2, steps=3, generator=generator(42)):
        print(images.shape, targets.shape)  # (2, 1, 16, 16, 16) and (2, 16, 16, 16)
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NORMALIZATION = {
    "ct": (-160.0, 240.0),  # window in HU: soft tissue; another can be given
    "mri": (0.5, 99.5),  # percentiles
}
ORGAN_SHARE = 0.5  # of the patches are centred on an organ's voxel, all organs equally often
VOXELS_PER_ORGAN = 1000  # candidates for this that a volume keeps


# --------------------------------------------------------------------------------- the model's grid


def to_model_grid(
    voxels: np.ndarray,
    spacing: Sequence[float],
    modality: str,
    target_spacing: float,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> np.ndarray:
    """A scan (D, H, W) as the model sees it: cubic voxels of target_spacing mm, normalized."""
    return normalize(resample_image(voxels, spacing, target_spacing), modality, ct_window)


def normalize(
    image: np.ndarray, modality: str, ct_window: tuple[float, float] = NORMALIZATION["ct"]
) -> np.ndarray:
    """Clip a CT (HU) to a window, an MRI to its percentiles; then mean 0, standard deviation 1.

    The statistics are the scan's own, so other scans have no influence.
    """
    low, high = ct_window
    if modality == "mri":
        low, high = np.percentile(image, NORMALIZATION["mri"])
    image = image.clip(low, high)
    scale = max(float(image.std()), 1e-6 * max(-low, high)) or 1.0  # not the rounding of a constant
    return ((image - image.mean()) / scale).astype(np.float32)


def resample_image(voxels: np.ndarray, spacing: Sequence[float], target: float) -> np.ndarray:
    """Resample a volume (D, H, W) with voxels of `spacing` mm to cubic ones of `target` mm."""
    size = resampled_size(voxels.shape, spacing, target)
    return _resample(torch.from_numpy(voxels), size).numpy()


def resampled_size(
    shape: Sequence[int], spacing: Sequence[float], target: float
) -> tuple[int, ...]:
    """Cubic voxels of `target` mm that cover what `shape` voxels of `spacing` mm do; at least 1."""
    return tuple(max(1, round(n * mm / target)) for n, mm in zip(shape, spacing, strict=True))


def resample_labels(scores: Iterable[Tensor], size: Sequence[int]) -> np.ndarray:
    """Interpolate a score map (D, H, W) per class linearly to `size`; return the best class, uint8.

    With one-hot labels as scores it resamples a label map, with logits it brings a prediction back
    to a scan's grid. Only one class is held at the new size beside the best so far.
    """
    resampled = (_resample(score, size) for score in scores)
    best = next(resampled)
    labels = torch.zeros(tuple(size), dtype=torch.uint8, device=best.device)
    for label, score in enumerate(resampled, start=1):
        better = score > best
        best = torch.where(better, score, best)
        labels[better] = label
    return labels.cpu().numpy()


def _resample(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Trilinear (D, H, W) → size over the same extent, voxels taken as cells with a centre."""
    if tuple(volume.shape) == tuple(size):
        return volume
    return F.interpolate(volume[None, None], size=tuple(size), mode="trilinear")[0, 0]


# ------------------------------------------------------------------------------------------ volumes


class Volume(NamedTuple):
    """A case on the model's grid, ready for training."""

    id: str
    modality: str
    image: np.ndarray  # (D, H, W) float32, normalized
    labels: np.ndarray  # (D, H, W) uint8: 0 background, then the organs from 1
    foreground_voxels: np.ndarray  # (n, 4) int32: organ and voxel, to centre patches on
    labelled: np.ndarray  # (1 + organs,) bool: what the case's data set labels; background always

    @property
    def counts(self) -> np.ndarray:
        """(1 + organs,) voxels by label."""
        return np.bincount(self.labels.ravel(), minlength=len(self.labelled))


def make_volume(
    id_: str, modality: str, image: np.ndarray, labels: np.ndarray, labelled: np.ndarray
) -> Volume:
    """Put a volume together, with a fixed choice of voxels on which patches may be centred."""
    rng = np.random.default_rng(0)
    chosen = [np.empty((0, 4), dtype=np.int32)]
    for label in np.unique(labels[labels > 0]):
        voxels = np.argwhere(labels == label).astype(np.int32)
        if len(voxels) > VOXELS_PER_ORGAN:
            voxels = voxels[rng.choice(len(voxels), VOXELS_PER_ORGAN, replace=False)]
        chosen.append(np.insert(voxels, 0, label, axis=1))
    return Volume(id_, modality, image, labels, np.concatenate(chosen), labelled)


# ------------------------------------------------------------------------------------------ patches


def generator(*key: Any) -> torch.Generator:
    """Random numbers that depend only on the key: seed, round, hospital and purpose."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def patches(
    volumes: Sequence[Volume], patch: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `steps` random batches: images (B, 1, P, P, P) float32, labels (B, P, P, P) uint8.

    The third item is what each case's data set labels, (B, 1 + organs) bool. Cases are drawn with
    equal probability and replacement. A volume smaller than the patch is padded with the patch's
    lowest intensity and background. All draws come from `generator`. Raises FloatingPointError for
    images with values that are NaN or infinite; a note on any error names the case.
    """

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    size = (batch_size, patch, patch, patch)
    for _ in range(steps):
        # Filled in place, by NumPy on this thread alone: every copy costs pages of new memory, and
        # PyTorch's threads would wait for cores that are training.
        images, labels, labelled = np.empty(size, np.float32), np.empty(size, np.uint8), []
        for image, label in zip(images, labels, strict=True):
            volume = volumes[draw(len(volumes))]
            labelled.append(volume.labelled)
            try:
                _draw_patch(volume, draw, image, label)
            except Exception as error:
                error.add_note(f"case {volume.id}")
                raise
        known = torch.from_numpy(np.stack(labelled))
        yield torch.from_numpy(images[:, None]), torch.from_numpy(labels), known


def prefetch(batches: Iterator[tuple], pin: bool = False) -> Iterator[tuple]:
    """Yield the same batches, each drawn by a thread while the one before it is in use.

    pin puts them into page-locked memory, from which a GPU copies them while the CPU works.
    """

    def draw() -> tuple | None:
        batch = next(batches, None)
        if pin and batch is not None:
            batch = tuple(part.pin_memory() for part in batch)
        return batch

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(draw)
        batch = following.result()
        while batch is not None:
            following = thread.submit(draw)
            yield batch
            batch = following.result()


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
        raise FloatingPointError("its preprocessed image has values that are NaN or infinite")
