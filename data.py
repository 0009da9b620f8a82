"""Cases from folders as they were downloaded, and batches of patches from cases.

A case is one scan with its labels. `find_cases` lists those of a folder, `load_case` reads one onto
the model's grid: closest canonical orientation, cubic voxels, intensities normalized by modality.
Arrays have the axes of canonical NIfTI files: right, anterior, superior.

    from data import find_cases, load_case
    cases = find_cases("Totalsegmentator_dataset_v201", "ct")
    volume = load_case(cases[0], organs=["liver", "spleen"], spacing=2.0)
"""

import csv
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import Tensor
from torch.nn import functional as F

ORGANS = ("liver", "kidneys", "spleen", "pancreas", "gallbladder")
CT_WINDOW = (-160.0, 240.0)  # HU: soft tissue
MRI_PERCENTILES = (0.5, 99.5)
ORGAN_SHARE = 0.5  # of the patches is centred on a voxel of an organ, every organ as often
CENTRES_PER_ORGAN = 1000  # candidate voxels that a volume remembers for that

TOTALSEGMENTATOR_MASKS = {
    "liver": ["liver"],
    "kidneys": ["kidney_left", "kidney_right"],
    "spleen": ["spleen"],
    "pancreas": ["pancreas"],
    "gallbladder": ["gallbladder"],
}
ORGAN_OF_NAME = {
    **{organ: organ for organ in ORGANS},
    **dict.fromkeys(["gall bladder"], "gallbladder"),
    **dict.fromkeys(
        ["kidney", "kidney left", "left kidney", "kidney right", "right kidney"], "kidneys"
    ),
}


class DataError(ValueError):
    """Something about a folder or a file that its owner can mend; the message says how."""


class Case(NamedTuple):
    """One scan as it lies on disk."""

    folder: str  # the hospital's folder; ids are unique within it only
    id: str
    modality: str  # "ct" or "mri"
    split: str  # "train", "val" or "test" where the data set says so, else ""
    image: Path
    # organ → the files that hold it, each with the label values that mean it; no values: any > 0.5
    masks: dict[str, list[tuple[Path, tuple[int, ...]]]]


class Volume(NamedTuple):
    """A case on the model's grid, ready for training, with its labels as they were drawn too."""

    id: str
    image: np.ndarray  # (D, H, W) float32, normalized
    labels: np.ndarray  # (D, H, W) uint8: 0 background, then the organs from 1
    centres: np.ndarray  # (n, 4) int32: organ and voxel, for patches centred on organs
    truth: np.ndarray  # labels on the scan's own grid, canonical orientation
    spacing: tuple[float, ...]  # mm, of truth's voxels


# ---------------------------------------------------------------------------------- finding cases


def find_cases(folder: str | Path, modality: str | None = None) -> list[Case]:
    """List the cases of a folder in TotalSegmentator's or nnU-Net's raw layout, sorted by id.

    modality "ct" or "mri" keeps those cases only. Raises DataError if the folder is missing or
    holds no such case; scans and masks are not opened yet.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    nnunet = (root / "dataset.json").is_file()
    cases = _find_nnunet(root) if nnunet else _find_totalsegmentator(root)
    if not cases:
        raise DataError(
            f"{root}: no case found; expected sNNNN/ct.nii.gz or sNNNN/mri.nii.gz "
            "(TotalSegmentator), or dataset.json with imagesTr/ and labelsTr/ (nnU-Net raw)"
        )
    chosen = [case for case in cases if modality in (None, case.modality)]
    if not chosen:
        there = cases[0].modality
        raise DataError(f"{root}: holds {there.upper()} scans only; give it with --{there}")
    return chosen


def _find_totalsegmentator(root: Path) -> list[Case]:
    splits = {}
    if (root / "meta.csv").is_file():
        with open(root / "meta.csv", encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=";")
            splits = {row.get("image_id"): row.get("split") or "" for row in rows}
    labelled = {
        organ: names
        for organ, names in TOTALSEGMENTATOR_MASKS.items()
        if any(root.glob(f"*/segmentations/{name}.nii.gz") for name in names)
    }
    cases = []
    for scan in sorted([*root.glob("*/ct.nii.gz"), *root.glob("*/mri.nii.gz")]):
        masks = {
            organ: [(scan.parent / "segmentations" / f"{name}.nii.gz", ()) for name in names]
            for organ, names in labelled.items()
        }
        id_, modality = scan.parent.name, scan.name.removesuffix(".nii.gz")
        cases.append(Case(root.name, id_, modality, splits.get(id_, ""), scan, masks))
    return cases


def _find_nnunet(root: Path) -> list[Case]:
    file = root / "dataset.json"
    try:
        dataset = json.loads(file.read_text(encoding="utf-8"))
        channels = [str(name).lower() for name in dataset["channel_names"].values()]
        values: dict[str, tuple[int, ...]] = {}
        for name, value in dataset["labels"].items():
            organ = ORGAN_OF_NAME.get(name.lower().replace("_", " "))
            if organ:
                values[organ] = values.get(organ, ()) + tuple(np.atleast_1d(value).tolist())
        ending = str(dataset["file_ending"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: expected nnU-Net's channel_names, labels and file_ending "
            f"({type(error).__name__}: {error})"
        ) from error
    if len(channels) != 1:
        raise DataError(
            f"{file}: has {len(channels)} channels; expected one, CT or an MRI sequence"
        )
    modality = "ct" if channels[0] == "ct" else "mri"
    cases = []
    for scan in sorted((root / "imagesTr").glob(f"[!.]*_0000{ending}")):
        id_ = scan.name.removesuffix(f"_0000{ending}")
        masks = {
            o: [(root / "labelsTr" / f"{id_}{ending}", values[o])] for o in ORGANS if o in values
        }
        cases.append(Case(root.name, id_, modality, "", scan, masks))
    return cases


def check_organs(folders: dict[str, list[Case]], organs: Sequence[str]) -> None:
    """Raise DataError, saying what to do, unless every folder labels all of `organs`."""
    labelled = {name: set.union(*(set(c.masks) for c in cases)) for name, cases in folders.items()}
    if all(set(organs) <= organs_there for organs_there in labelled.values()):
        return
    lists = [
        f"{name}: {', '.join(o for o in ORGANS if o in there) or 'none'}"
        for name, there in labelled.items()
    ]
    common = [o for o in ORGANS if all(o in there for there in labelled.values())]
    advice = f"--organs {' '.join(common)}" if common else "folders that share an organ"
    raise DataError(
        f"not every folder labels {', '.join(organs)} ({'; '.join(lists)}); use {advice}"
    )


def split_cases(cases: list[Case], seed: int, test_elsewhere: bool) -> dict[str, list[Case]]:
    """Divide one folder's cases into "train", "val" and "test", by its own split where it has one.

    Other cases are put in an order that depends on seed and id alone; a fifth of them goes to test
    (none with test_elsewhere) and a tenth of the training cases to validation, at least one of each
    once there are three. Where a folder has a test split of its own but no validation split, the
    validation cases are carved out of the training cases.
    """
    order = sorted(cases, key=lambda c: hashlib.sha256(f"{seed}/{c.id}".encode()).digest())
    parts = {split: [c for c in order if c.split == split] for split in ("train", "val", "test")}
    train = parts["train"] + [c for c in order if c.split not in parts]
    if test_elsewhere:
        parts["test"] = []
    elif not parts["test"]:
        n_test = max(len(train) // 5, int(len(train) >= 3))
        parts["test"], train = train[:n_test], train[n_test:]
    if not parts["val"]:
        n_val = max(len(train) // 10, int(len(train) >= 3))
        parts["val"], train = train[:n_val], train[n_val:]
    return {**parts, "train": train}


# ---------------------------------------------------------------------------------- reading cases


def load_case(case: Case, organs: Sequence[str], spacing: float) -> Volume:
    """Read a case, orient it, resample it to cubic voxels of `spacing` mm, normalize it.

    Raises DataError, naming the file, for what cannot be read or does not fit together.
    """
    scan, voxel_mm = _read(case.image)
    truth = np.zeros(scan.shape, dtype=np.uint8)
    opened: dict[Path, np.ndarray] = {}
    for label, organ in enumerate(organs, start=1):
        for path, values in case.masks[organ]:
            if path not in opened:
                opened = {path: _read(path)[0]}  # one file at a time in memory
            mask = opened[path]
            if mask.shape != scan.shape:
                raise DataError(
                    f"{path}: has {mask.shape} voxels, its scan {case.image.name} {scan.shape}; "
                    "they must lie on one grid"
                )
            truth[np.isin(np.rint(mask), values) if values else mask > 0.5] = label
    size = tuple(
        max(1, round(n * mm / spacing)) for n, mm in zip(scan.shape, voxel_mm, strict=True)
    )
    image = _resample(torch.from_numpy(scan), size).numpy()
    one_hot = (torch.from_numpy(truth == label).float() for label in range(len(organs) + 1))
    labels = resample_labels(one_hot, size)
    return make_volume(case.id, normalize(image, case.modality), labels, truth, voxel_mm)


def make_volume(id_: str, image, labels, truth, spacing: tuple[float, ...]) -> Volume:
    """Put a volume together, with a fixed choice of voxels on which patches may be centred."""
    rng = np.random.default_rng(0)
    centres = [np.empty((0, 4), dtype=np.int32)]
    for label in np.unique(labels[labels > 0]):
        voxels = np.argwhere(labels == label).astype(np.int32)
        if len(voxels) > CENTRES_PER_ORGAN:
            voxels = voxels[rng.choice(len(voxels), CENTRES_PER_ORGAN, replace=False)]
        centres.append(np.insert(voxels, 0, label, axis=1))
    return Volume(id_, image, labels, np.concatenate(centres), truth, spacing)


def normalize(image: np.ndarray, modality: str) -> np.ndarray:
    """Clip a CT (HU) to a soft-tissue window, an MRI to its percentiles; then mean 0, deviation 1.

    The statistics are the scan's own, so none of another scan's ever enters.
    """
    low, high = CT_WINDOW if modality == "ct" else np.percentile(image, MRI_PERCENTILES)
    image = image.clip(low, high)
    return ((image - image.mean()) / max(float(image.std()), 1e-6)).astype(np.float32)


def resample_labels(scores: Iterator[Tensor] | Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Interpolate one score map (D, H, W) a class linearly to `size`; return the best class, uint8.

    With one-hot labels as scores it resamples a label map, with logits it brings a prediction back
    to a scan's grid. Only one class is held at the new size beside the best so far.
    """
    best, labels = None, None
    for label, score in enumerate(scores):
        score = _resample(score, size)
        if best is None:
            best, labels = score, torch.zeros(size, dtype=torch.uint8, device=score.device)
        else:
            better = score > best
            best = torch.where(better, score, best)
            labels[better] = label
    return labels.cpu().numpy()


def _resample(volume: Tensor, size: tuple[int, ...]) -> Tensor:
    """Trilinear (D, H, W) → size over the same extent, voxels taken as cells with a centre."""
    if tuple(volume.shape) == tuple(size):
        return volume
    return F.interpolate(volume[None, None], size=size, mode="trilinear")[0, 0]


def _read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read a NIfTI file in closest canonical orientation: voxels as float32, their size in mm."""
    if not path.is_file():
        raise DataError(f"{path}: missing; every scan needs its labels beside it")
    try:
        nifti = nibabel.funcs.squeeze_image(nibabel.load(path))
        if nifti.ndim != 3:
            raise DataError(f"{path}: has shape {nifti.shape}; expected one 3D volume")
        nifti = nibabel.as_closest_canonical(nifti)
        voxels = nifti.get_fdata(dtype=np.float32, caching="unchanged")
    except (
        OSError,
        EOFError,
        zlib.error,
        ImageFileError,
        nibabel.spatialimages.HeaderDataError,
    ) as e:
        raise DataError(f"{path}: cannot be read ({e}); download or export it again") from e
    voxel_mm = tuple(float(mm) for mm in nifti.header.get_zooms())
    if not all(math.isfinite(mm) and mm > 0 for mm in voxel_mm):
        raise DataError(f"{path}: voxel size {voxel_mm} mm; expected positive numbers")
    if not np.isfinite(voxels).all():
        raise DataError(f"{path}: holds voxels that are NaN or infinite")
    return np.ascontiguousarray(voxels), voxel_mm


# ----------------------------------------------------------------------------------------- patches


def patches(
    volumes: Sequence[Volume], patch: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` random batches: images (B, 1, P, P, P) float32, labels (B, P, P, P) int64.

    Cases are drawn with equal chance, with replacement. A volume smaller than the patch is padded
    with the lowest intensity in the patch and background. All draws come from `generator`.
    """

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(steps):
        batch = []
        for _ in range(batch_size):
            volume = volumes[draw(len(volumes))]
            starts = [draw(max(n - patch, 0) + 1) for n in volume.labels.shape]
            organs = np.unique(volume.centres[:, 0])
            if len(organs) and draw(1000) < 1000 * ORGAN_SHARE:
                rows = np.flatnonzero(volume.centres[:, 0] == organs[draw(len(organs))])
                centre = volume.centres[rows[draw(len(rows))], 1:]
                starts = [
                    min(max(int(c) - patch // 2, 0), max(n - patch, 0))
                    for c, n in zip(centre, volume.labels.shape, strict=True)
                ]
            batch.append(_crop(volume, starts, patch))
        images, labels = zip(*batch, strict=True)
        yield torch.stack(images)[:, None], torch.stack(labels).long()


def _crop(volume: Volume, starts: list[int], patch: int) -> tuple[Tensor, Tensor]:
    window = tuple(slice(start, start + patch) for start in starts)
    image, labels = volume.image[window], volume.labels[window]
    if image.shape != (patch,) * 3:
        before = [(patch - n) // 2 for n in image.shape]
        margins = [(b, patch - n - b) for b, n in zip(before, image.shape, strict=True)]
        image = np.pad(image, margins, constant_values=image.min())
        labels = np.pad(labels, margins)
    return torch.tensor(image), torch.tensor(labels)
