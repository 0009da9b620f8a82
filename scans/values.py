"""Whether voxels are what they are said to be: Hounsfield units, an MRI signal, labels.

What is impossible keeps a case from being used; what is unlikely is warned of.
"""

import math
from pathlib import Path

import numpy as np

from data import NORMALIZATION
from scans.files import DataError, listed
from scans.layouts import Case
from scans.nifti import Scan, corners_apart

SAMPLE = 10_000  # voxels by which a scan's values are judged
FEWEST_VALUES = 32  # different ones among them; a label map has fewer
SMALLEST = 20  # mm along an axis


def judge_values(case: Case, scan: Scan) -> list[str]:
    """Warn of unlikely values of a scan; raise DataError for values that it cannot have."""
    low, high = float(scan.voxels.min()), float(scan.voxels.max())
    values, mri, problem = sample(scan.voxels), case.modality == "mri", ""
    distinct = len(np.unique(values))
    if low == high:
        problem = f"every voxel is {low:g}"
    elif mri and np.ptp(np.percentile(values, NORMALIZATION["mri"])) == 0:
        most = np.median(values)
        problem = f"almost every voxel is {most:g}, so normalization makes all of them 0"
    elif distinct < min(FEWEST_VALUES, len(values)):
        problem = f"has {distinct} different values only, as a label map"
    elif not mri and (low < -8192 or high > 65535 or not may_be_hounsfield(values)):
        problem = (
            f"values {low:g} … {high:g} are not Hounsfield units, in which air is near −1000 and "
            "soft tissue at 0 to 100; apply their slope and intercept"
        )
    elif mri and max(-low, high) > 1e7:
        problem = f"values {low:g} … {high:g} are not an MRI signal"
    if problem:
        raise DataError(f"{case.image}: {problem}")
    unlikely = []
    extent = [n * mm for n, mm in zip(scan.voxels.shape, scan.spacing, strict=True)]
    if min(extent) < SMALLEST:
        size = " × ".join(f"{mm:.3g}" for mm in extent)
        unlikely.append(f"is {size} mm large, less than a body; are its voxel sizes right?")
    if not mri and not has_air(values):
        unlikely.append("has values without air (near −1000 HU), which is right for a crop only")
    return unlikely


def sample(voxels: np.ndarray) -> np.ndarray:
    """Some ten thousand of a scan's voxels, at a stride that meets every row, column and slice."""
    stride = max(1, voxels.size // SAMPLE)
    while math.gcd(stride, voxels.size) > 1:
        stride += 1
    return voxels.ravel()[::stride]


def has_air(values: np.ndarray) -> bool:
    """Whether there is air or lung among Hounsfield units; −2000 and less is padding."""
    return bool(((values > -1200) & (values < -300)).mean() > 0.005)


def may_be_hounsfield(values: np.ndarray) -> bool:
    """Whether a sample of a CT is plausible, by shares: single voxels are off in many a scan."""
    tissue = values[values > -200]
    if len(tissue) <= 0.005 * len(values):  # HU − 1024
        return False
    if (tissue > 600).mean() > 0.2 or np.median(tissue) > 300:  # HU + 1024, HU × 10
        return False
    if has_air(values):
        return True
    # A crop: what is not padding ends where tissue does, and if fat is not what is lowest in it,
    # nothing else lies there in a heap, as air does that is 0.
    inside = values[values > -1200]
    low, organs, high = np.percentile(inside, (0.5, 95, 99.5))
    heap = (inside < low + 0.05 * (high - low)).mean()
    return bool(organs > 40 and (heap < 0.08 or (inside < -50).mean() > 0.01))


def judge_labels(case: Case, scan: Scan, path: Path, mask: Scan) -> list[str]:
    """Warn of what is unlikely about a label file; raise DataError if it is not on its scan."""
    shapes, name = (mask.voxels.shape, scan.voxels.shape), case.image.name
    if shapes[0] != shapes[1]:
        raise DataError(f"{path}: has {shapes[0]} voxels, its scan {name} {shapes[1]}")
    if corners_apart(scan.affine, mask.affine, shapes[0]):
        raise DataError(f"{path}: lies at another place than its scan {name}, by their affines")
    unlikely = [warning for warning in mask.warnings if warning not in scan.warnings]
    known = case.values or (0, 1)
    odd = [int(value) for value in np.unique(np.rint(mask.voxels)) if value not in known]
    if odd:
        count = "they count as background" if case.values else "values above 0.5 count as organ"
        unlikely.append(f"has labels that the data set does not list: {listed(odd)}; {count}")
    name = "its label map" if case.values else f"its mask {path.name}"
    return [f"{name}: {warning}" for warning in unlikely]
