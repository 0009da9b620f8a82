"""Whether voxels are what they are said to be: Hounsfield units, an MRI signal, labels.

Impossible values make a case unusable; unlikely ones cause a warning.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import NORMALIZATION
from scans.files import DataError, listed
from scans.layouts import Case
from scans.nifti import Scan, corners_apart
from scans.organs import ORGANS

SAMPLE = 10_000  # voxels by which a scan's values are judged
FEWEST_VALUES = 32  # different ones among them; a label map has fewer
SMALLEST = 20  # mm along an axis
ROUNDING = 0.1  # of a label; a scale factor leaves 0.025


def judge_values(
    case: Case, scan: Scan, ct_window: tuple[float, float] = NORMALIZATION["ct"]
) -> list[str]:
    """Warn of unlikely values of a scan; raise DataError for values that it cannot have."""
    values, unlikely = sample(scan.voxels), []
    span = f"values {scan.voxels.min():g} … {scan.voxels.max():g}"
    problem = _find_impossible(case.modality, values, span, ct_window)
    if problem:
        raise DataError(f"{case.image}: {problem}")
    extent = [n * mm for n, mm in zip(scan.voxels.shape, scan.spacing, strict=True)]
    if min(extent) < SMALLEST:
        size = " × ".join(f"{mm:.3g}" for mm in extent)
        unlikely.append(f"is {size} mm large, less than a body; are its voxel sizes right?")
    if case.modality == "ct" and not has_air(values):
        unlikely.append("has values without air (near −1000 HU), which is right for a crop only")
    return unlikely


def _find_impossible(
    modality: str, values: np.ndarray, span: str, ct_window: tuple[float, float]
) -> str:
    """What makes a sample of a scan useless, or "", by shares: single voxels are often off."""
    distinct, ends = len(np.unique(values)), np.percentile(values, NORMALIZATION["mri"])
    if distinct == 1 or (modality == "mri" and ends[0] == ends[1]):
        return f"almost every voxel is {ends[0]:g}, so normalization makes all of them 0"
    if distinct < min(FEWEST_VALUES, len(values)):
        return f"has only {distinct} different values, like a label map"
    if modality == "mri":
        hint = "with air near −1000 and fat near −100; give the scan as CT"
        return f"{span} are Hounsfield units, {hint}" if is_ct(values) else ""
    if not may_be_hounsfield(values):
        hint = "in which air is near −1000 and soft tissue at 0 to 100"
        return f"{span} are not Hounsfield units, {hint}; apply their slope and intercept"
    if np.ptp(values.clip(*ct_window)) == 0:
        low, high = ct_window
        return f"the CT window {low:g} … {high:g} HU makes almost every voxel the same"
    return ""


def sample(voxels: np.ndarray) -> np.ndarray:
    """About ten thousand of a scan's voxels, at a stride that meets every row, column and slice."""
    stride = max(1, voxels.size // SAMPLE)
    while math.gcd(stride, voxels.size) > 1:
        stride += 1
    return voxels.ravel()[::stride]


def has_air(values: np.ndarray) -> bool:
    """Whether there is air or lung among Hounsfield units; below −1200 is padding."""
    return bool(((values > -1200) & (values < -300)).mean() > 0.005)


def may_be_hounsfield(values: np.ndarray) -> bool:
    """Whether a sample of a CT is plausible."""
    tissue, far = values[values > -200], values[values < -5000]
    if len(tissue) <= 0.005 * len(values):  # HU − 1024
        return False
    if len(far) > 0.05 * len(values) and np.ptp(np.percentile(far, (25, 75))) > 1:
        return False  # HU × 10: air has noise, padding has none
    if (tissue > 600).mean() > 0.2 or np.median(tissue) > 300:  # HU + 1024, HU × 10
        return False
    if has_air(values):
        return True
    # A crop without air: its lowest values are fat, or only a few voxels. Many voxels at the lowest
    # value would be air stored as 0, so these would not be Hounsfield units.
    inside = values[values > -1200]
    low, organs, high = np.percentile(inside, (0.5, 95, 99.5))
    heap = (inside < low + 0.05 * (high - low)).mean()
    return bool(organs > 40 and (heap < 0.08 or (inside < -50).mean() > 0.01))


def is_ct(values: np.ndarray) -> bool:
    """Whether a sample of an MRI has a CT's shares of air, fat and tissue.

    A phase, which is noise in air, has as many high as low values; a CT has far fewer high ones.
    """
    ranges = (-1100, -850), (-200, -30), (0, 100)
    air, fat, tissue = (((low < values) & (values < high)).mean() for low, high in ranges)
    high = (values > 850).mean()
    return bool(min(air, fat, tissue) > 0.01 and air > 4 * high and may_be_hounsfield(values))


def judge_labels(case: Case, scan: Scan, path: Path, mask: Scan) -> list[str]:
    """Warn of what is unlikely about a label file; raise DataError if it cannot be its scan's."""
    shapes, name = (mask.voxels.shape, scan.voxels.shape), case.image.name
    rounded = np.rint(mask.voxels)
    if shapes[0] != shapes[1]:
        raise DataError(f"{path}: has {shapes[0]} voxels, its scan {name} {shapes[1]}")
    if corners_apart(scan.affine, mask.affine, shapes[0]):
        raise DataError(f"{path}: lies at another place than its scan {name}, by their affines")
    if case.values and abs(mask.voxels - rounded).max() > ROUNDING:
        what = "has values between whole numbers: resampled linearly? Take nearest neighbours"
        raise DataError(f"{path}: {what}")
    unlikely = [warning for warning in mask.warnings if warning not in scan.warnings]
    known = case.values or (0, 1)
    odd = np.unique(rounded[~np.isin(rounded, known)]).astype(int).tolist()
    if odd:
        count = "they count as background" if case.values else "values above 0.5 count as organ"
        unlikely.append(f"has labels that the data set does not list: {listed(odd)}; {count}")
    name = "its label map" if case.values else f"its mask {path.name}"
    return [f"{name}: {warning}" for warning in unlikely]


def judge_organs(
    case: Case, scan: Scan, labels: np.ndarray, organs: Sequence[str], drawn: Sequence[int]
) -> list[str]:
    """Warn of organs that others overlap, and of those of a CT in air; drawn: voxels by label."""
    unlikely = []
    for label, organ in enumerate(organs, start=1):
        values = scan.voxels[labels == label]
        if 2 * len(values) < drawn[label]:
            unlikely.append(f"masks overlap and later ones count: most of the {organ} is covered")
        if case.modality == "ct" and organ in ORGANS and len(values) and np.median(values) < -200:
            unlikely.append(f"most of the {organ} is air (below −200 HU); are the labels its own?")
    return unlikely
