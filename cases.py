"""A case as it lies on disk: a scan and its labels, read, and every problem they have.

from datasets import ORGANS, find_cases
from cases import read_case
scan, labels, problems = read_case(find_cases("Totalsegmentator_dataset_v201")[0], ORGANS)
print(*problems, sep="\n")
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError

from datasets import KNOWN_BAD, Case, DataError
from nifti import Problem, Scan, corners_apart, read_nifti


def read_case(
    case: Case, organs: Sequence[str]
) -> tuple[Scan | None, np.ndarray | None, list[Problem]]:
    """Read a scan and its labels (uint8: 0 background, then the organs from 1; both canonical).

    Returns (scan, labels, problems) with every problem there is; scan or labels are None if one of
    them keeps the case from being used. Organs that the case's data set does not label stay 0.
    """
    problems: list[Problem] = []
    scan = _read(case.image, problems)
    labels = None
    if scan:
        problems += _value_problems(case, scan)
        labels = np.zeros(scan.voxels.shape, dtype=np.uint8)
    for path, wanted in case.label_files(organs).items():
        mask = _read(path, problems)
        if mask is None or scan is None or labels is None:
            continue
        if mask.voxels.shape != scan.voxels.shape:
            what = f"has {mask.voxels.shape} voxels, its scan {case.image.name} {labels.shape}"
            problems.append(Problem(path, what))
        elif corners_apart(scan.affine, mask.affine, labels.shape):
            what = f"lies at another place than its scan {case.image.name}, by their affines"
            problems.append(Problem(path, what))
        else:
            problems += _label_problems(case, path, mask.voxels)
            for label, values in wanted:
                hit = np.isin(np.rint(mask.voxels), values) if values else mask.voxels > 0.5
                labels[hit] = label
    if (case.layout, case.id) in KNOWN_BAD:
        what = f"{case.id} {KNOWN_BAD[case.layout, case.id]}"
        problems.append(Problem(case.image, what, "it is used if nothing else is wrong", True))
    if not all(problem.usable for problem in problems):
        return scan, None, problems
    if labels is not None and not labels.any():
        problems.append(Problem(case.image, "has no organ at all", "it is all background", True))
    return scan, labels, problems


def read_usable(case: Case, organs: Sequence[str]) -> tuple[Scan, np.ndarray]:
    """Scan and labels of read_case; raises DataError for what keeps the case from being used."""
    scan, labels, problems = read_case(case, organs)
    if scan is None or labels is None:
        raise DataError("\n".join(str(problem) for problem in problems if not problem.usable))
    return scan, labels


def _read(path: Path, problems: list[Problem]) -> Scan | None:
    try:
        scan = read_nifti(path)
    except ImageFileError as error:
        problems.append(Problem(path, str(error)))
        return None
    problems += scan.problems
    return scan


def _value_problems(case: Case, scan: Scan) -> list[Problem]:
    """Voxel values that the modality cannot have."""
    low, high = float(scan.voxels.min()), float(scan.voxels.max())
    what = ""
    if low == high:
        what = f"every voxel is {low:g}"
    elif case.modality == "ct" and (low < -8192 or high > 65535):
        what = f"values {low:g} … {high:g} are no Hounsfield units"
    elif case.modality == "ct" and low >= 0:
        what = f"values {low:g} … {high:g} are no Hounsfield units, in which air is near −1000"
    elif case.modality == "mri" and max(-low, high) > 1e7:
        what = f"values {low:g} … {high:g} are no MRI signal"
    return [Problem(case.image, what)] if what else []


def _label_problems(case: Case, path: Path, mask: np.ndarray) -> list[Problem]:
    """Values of a mask that its data set does not list."""
    known = case.values or (0, 1)
    odd = [int(value) for value in np.unique(np.rint(mask)) if value not in known]
    if not odd:
        return []
    listed = ", ".join(map(str, odd[:5])) + (" …" if len(odd) > 5 else "")
    what = f"has labels that the data set does not list: {listed}"
    count = "they count as background" if case.values else "values above 0.5 count as organ"
    return [Problem(path, what, count, True)]


def split_duplicates(cases: Sequence[Case]) -> tuple[list[Case], list[Problem]]:
    """The first case of each folder and id, and a problem for each of the others."""
    first: dict[tuple[str, str], Case] = {}
    problems = []
    for case in cases:
        if first.setdefault((case.folder, case.id), case) is not case:
            what = f"the id {case.id} stands in this folder twice"
            problems.append(Problem(case.image, what, "only the first one can be used"))
    return list(first.values()), problems
