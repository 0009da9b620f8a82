"""Data sets of full size for full_size.py: phantoms on the grids that real scans have.

What is in a voxel does not matter there; shapes, spacings, files and layouts do. CT volumes have 11
million voxels on average. TotalSegmentator's should have about 9: its zip has 23.6 GB for 1,228
cases, and a case of it, s0009, 2.1 bytes a voxel, the masks of all classes included.
"""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import torch

from data import resample_labels
from scans.layouts import find_cases
from scans.organs import AMOS, ORGANS, match
from scans.phantom import SIZE, SPACING, make_phantom

GRIDS: dict[str, tuple] = {  # of each data set: modality, voxels and mm along R, A and S
    "ct": (
        ("ct", (122, 122, 185), (1.5, 1.5, 1.5)),
        ("ct", (220, 170, 150), (1.5, 1.5, 1.5)),
        ("ct", (240, 190, 200), (1.5, 1.5, 1.5)),
        ("ct", (250, 250, 110), (1.5, 1.5, 1.5)),
        ("ct", (250, 200, 280), (1.5, 1.5, 1.5)),
        ("ct", (330, 330, 250), (1.5, 1.5, 1.5)),
    ),
    "mri": (
        ("mri", (320, 260, 72), (1.19, 1.19, 3.5)),  # axial slices
        ("mri", (256, 208, 36), (1.4, 1.4, 7.7)),
        ("mri", (384, 40, 384), (1.0, 6.0, 1.0)),  # coronal
        ("mri", (14, 384, 384), (4.4, 0.9, 0.9)),  # sagittal
    ),
    "amos22": (  # the first one is the median of the data set in nnU-Net's plans for it
        ("ct", (512, 512, 103), (0.713, 0.713, 5.0)),
        ("ct", (512, 512, 120), (0.82, 0.82, 5.0)),
        ("ct", (640, 640, 140), (0.64, 0.64, 3.0)),
        ("mri", (320, 260, 72), (1.19, 1.19, 3.0)),
    ),
}


def write(folder: Path, cases: dict[str, int], shrink: int = 1) -> None:
    """Write so many cases of each data set of GRIDS into folders of their names.

    Cases on the same grid are of one phantom, and differ in every value of the scan. shrink: by
    what the voxels along an axis are divided, for a taste. Folders that are there stay as they are.
    """
    cases = {name: n for name, n in cases.items() if not (folder / name).exists()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, n in cases.items():
            write_case = _write_amos if name == "amos22" else _write_totalsegmentator
            for first, (modality, shape, spacing) in enumerate(GRIDS[name]):
                size, mm = [max(k // shrink, 2) for k in shape], np.multiply(spacing, shrink)
                case = modality, mm, *enlarge(modality, first, size, mm)
                write_one = functools.partial(write_case, folder / name, *case)
                list(pool.map(write_one, range(first, n, len(GRIDS[name]))))


def enlarge(
    modality: str, index: int, shape: Sequence[int], spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """A phantom in the middle of a grid, at its true size: image (int16, with noise), labels."""
    weights = []  # of linear interpolation along an axis; beyond the phantom goes on as it ends
    for n, mm in zip(shape, spacing, strict=True):
        at = ((np.arange(n) - (n - 1) / 2) * mm / SPACING + (SIZE - 1) / 2).clip(0, SIZE - 1)
        hats = 1 - abs(at[:, None] - np.arange(SIZE))
        weights.append(hats.clip(0).astype(np.float32))

    def resample(volume: np.ndarray) -> np.ndarray:
        return np.einsum("xi,yj,zk,ijk->xyz", *weights, volume, optimize=True)

    image, labels = make_phantom(0, modality, index)
    one_hot = ((labels == n).astype(np.float32) for n in range(len(ORGANS) + 1))
    scores = (torch.from_numpy(resample(mask)) for mask in one_hot)
    image = resample(image)
    image += 10 * np.random.default_rng(index).standard_normal(image.shape, dtype=np.float32)
    return image.astype(np.int16), resample_labels(scores, image.shape)


def _write_totalsegmentator(
    root: Path, modality: str, mm: np.ndarray, image: np.ndarray, labels: np.ndarray, index: int
) -> None:
    case, middle = root / f"s{index:04d}", len(labels) // 2
    _save(case / f"{modality}.nii.gz", image + np.int16(index), mm)
    for label, organ in enumerate(ORGANS, start=1):
        names = ["kidney_left", "kidney_right"] if organ == "kidneys" else [organ]
        halves = [slice(middle), slice(middle, None)] if len(names) == 2 else [slice(None)]
        for name, half in zip(names, halves, strict=True):
            mask = np.zeros_like(labels)
            mask[half] = labels[half] == label
            _save(case / "segmentations" / f"{name}.nii.gz", mask, mm)


def _write_amos(
    root: Path, modality: str, mm: np.ndarray, image: np.ndarray, labels: np.ndarray, index: int
) -> None:
    name = f"amos_{index + (501 if modality == 'mri' else 1):04d}.nii.gz"
    by_name = {name: number for number, name in AMOS.items()}
    numbers = [by_name[match([organ], by_name)[organ][0]] for organ in ORGANS]
    _save(root / "imagesTr" / name, image + np.int16(index), mm)
    _save(root / "labelsTr" / name, np.array([0, *numbers], np.uint8)[labels], mm)


def _save(path: Path, array: np.ndarray, mm: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*mm, 1.0])), path)


def link_half(folder: Path, half: Path) -> None:
    """Fill a folder with links to the first half of the cases of each data set in another one."""
    for name in GRIDS:
        cases = find_cases(folder / name)
        for case in cases[: len(cases) // 2]:
            for file in case.files():
                link = half / file.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
