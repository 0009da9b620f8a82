"""A case: a scan with its labels, read, checked, on the model's grid, and kept in a cache."""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError

from data import NORMALIZATION, Volume, make_volume, resample_labels, to_model_grid
from scans.cache import (
    CachedVolume,
    DamagedError,
    entry_folder,
    fingerprint,
    pack_target,
    unpack_target,
    write_entry,
)
from scans.files import DataError, lock
from scans.layouts import Case
from scans.machine import in_parallel, is_out_of_memory
from scans.nifti import Problem, Scan, corners_apart, grid_voxels, read_nifti

PEAK = 24  # bytes that preprocess takes for each voxel of the two grids: 14 to 23 were measured
SAMPLE = 10_000  # voxels by which a scan's values are judged
FEWEST_VALUES = 32  # different ones among them; a label map has fewer
SMALLEST = 20  # mm along an axis


class PreparedCase(NamedTuple):
    """A case ready for an experiment."""

    volume: Volume  # on the model's grid, to train on; or a CachedVolume, which has all that it has
    # Labels on the scan's own grid, on which the case is scored, and that grid's spacing in mm.
    read_target: Callable[[], tuple[np.ndarray, tuple[float, ...]]]
    files: list[tuple[int, int]]  # size and CRC-32 of each file that it was read from
    problems: Sequence[Problem] = ()  # which do not keep it from being used
    image_crc: int = 0  # of volume.image, by which copies are found; 0 for phantoms


# ------------------------------------------------------------------------------- read and checked


def read_case(
    case: Case, organs: Sequence[str]
) -> tuple[Scan | None, np.ndarray | None, list[Problem]]:
    """Read a scan and its labels (uint8: 0 background, then the organs from 1; both canonical).

    Returns (scan, labels, problems) with every problem there is; scan or labels are None if one of
    them keeps the case from being used. Organs that the case's data set does not label stay 0, all
    of them for a case without label files.
    """
    problems: list[Problem] = []
    if case.problem:
        problems.append(Problem(case.image, case.problem))
    scan = _read(case.image, problems)
    labels = None
    if scan:
        problems += _scan_problems(case, scan)
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
    if not all(problem.usable for problem in problems):
        return scan, None, problems
    return scan, labels, problems


def read_usable(case: Case, organs: Sequence[str]) -> tuple[Scan, np.ndarray]:
    """Scan and labels of read_case; raises DataError for what keeps the case from being used.

    The scan's problems are those of its labels too.
    """
    scan, labels, problems = read_case(case, organs)
    if scan is None or labels is None:
        raise DataError("\n".join(str(problem) for problem in problems if not problem.usable))
    return scan._replace(problems=problems), labels


def _read(path: Path, problems: list[Problem]) -> Scan | None:
    """A file, and with `problems` those of it that another file of the case does not have too."""
    try:
        scan = read_nifti(path)
    except ImageFileError as error:
        problems.append(Problem(path, str(error)))
        return None
    known = {problem.what for problem in problems}
    problems += [problem for problem in scan.problems if problem.what not in known]
    return scan


def _scan_problems(case: Case, scan: Scan) -> list[Problem]:
    """What a scan of the modality cannot be, and what it hardly is."""
    problems = []
    extent = [n * mm for n, mm in zip(scan.voxels.shape, scan.spacing, strict=True)]
    if min(extent) < SMALLEST:
        what = f"is {' × '.join(f'{mm:.3g}' for mm in extent)} mm large, less than a body"
        problems.append(Problem(case.image, what, "are its voxel sizes right?", True))
    low, high = float(scan.voxels.min()), float(scan.voxels.max())
    values, what = sample(scan.voxels), ""
    distinct = len(np.unique(values))
    if low == high:
        what = f"every voxel is {low:g}"
    elif case.modality == "mri" and np.ptp(np.percentile(values, NORMALIZATION["mri"])) == 0:
        middle = np.median(values)
        what = f"almost every voxel is {middle:g}, so that normalization makes all of them 0"
    elif distinct < min(FEWEST_VALUES, len(values)):
        what = f"has {distinct} different values only, as a label map"
    elif case.modality == "ct" and (low < -8192 or high > 65535 or not may_be_hounsfield(values)):
        what = (
            f"values {low:g} … {high:g} are no Hounsfield units, in which air is near −1000 and "
            "soft tissue at 0 to 100: bring them there by their slope and intercept"
        )
    elif case.modality == "mri" and max(-low, high) > 1e7:
        what = f"values {low:g} … {high:g} are no MRI signal"
    if what:
        problems.append(Problem(case.image, what))
    elif case.modality == "ct" and not has_air(values):
        what = f"values {low:g} … {high:g} hold no air (near −1000 HU)"
        problems.append(Problem(case.image, what, "right for a crop only; it is used", True))
    return problems


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


# ------------------------------------------------------------------ on the grid, and in the cache


def load_cases(
    cases: Sequence[Case],
    organs: Sequence[str],
    spacing: float,
    cache: Path | None = None,
    skip_bad: bool = False,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> tuple[dict[Path, PreparedCase], list[str]]:
    """Load cases, several at a time; return them by scan file, and what was left out and why.

    With a cache folder a case is preprocessed once, and mapped from disk when it is used. Raises
    DataError for a case that cannot be used, unless skip_bad leaves it out, and for a damaged entry
    of the cache.
    """

    cases, repeated = split_duplicates(cases)
    errors = [str(problem) for problem in repeated]
    prepared: dict[Path, PreparedCase] = {}

    def load(case: Case) -> PreparedCase | DataError:
        return _try_to_load(case, organs, spacing, cache, ct_window)

    reading = in_parallel(load, cases, "reading scans", peak_bytes(cases, spacing))
    # One process at a time, so that another one on the same folders finds what this one has made.
    with lock(cache / "lock", wait=True) if cache else contextlib.nullcontext():
        for case, loaded in zip(cases, reading, strict=True):
            if isinstance(loaded, DataError):
                errors.append(str(loaded))
            else:
                prepared[case.image] = loaded
            if errors and not skip_bad:
                raise DataError(f"{errors[0]}\n(--skip-bad leaves such cases out)")
    return prepared, errors


def _try_to_load(case: Case, *settings: Any) -> PreparedCase | DataError:
    """load_case, or what keeps the case from being used."""
    try:
        return load_case(case, *settings)
    except DamagedError:  # the case itself is well
        raise
    except DataError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return DataError(f"{case.image}: too large for this machine's memory ({error})")


def load_case(
    case: Case,
    organs: Sequence[str],
    spacing: float,
    cache: Path | None = None,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> PreparedCase:
    """Preprocess a case, or open its entry in a cache, which is written if there is none.

    Raises DataError, naming the file, for what keeps it from being used.
    """
    if case.problem:
        raise DataError(str(Problem(case.image, case.problem)))
    stamps, files = fingerprint(case, organs), case.files(organs)
    folder = entry_folder(cache, case, organs, spacing, ct_window) if cache else None
    if folder is None or not folder.exists():
        made, target, problems = preprocess(case, organs, spacing, ct_window)
        if fingerprint(case, organs, anew=True) != stamps:
            what = "it or its labels were changed while they were read"
            raise DataError(f"{case.image}: {what}; the same command reads them again")
        if folder is None:
            read_target = functools.partial(unpack_target, target)
            return PreparedCase(made, read_target, stamps, problems, zlib.crc32(made.image.data))
        notes = [(files.index(p.file), p.what, p.consequence) for p in problems]
        write_entry(folder, made, target, notes)
    volume = CachedVolume(folder, case.id, case.modality, labelled_organs(case, organs))
    problems = [Problem(files[i], what, then, True) for i, what, then in volume.notes]
    crc = volume.image_crc
    return PreparedCase(volume, volume.read_target, stamps, problems, crc)  # type: ignore[arg-type]


def preprocess(
    case: Case,
    organs: Sequence[str],
    spacing: float,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> tuple[Volume, bytes, list[Problem]]:
    """Read a case, resample it to cubic voxels of `spacing` mm, normalize it.

    Second comes what it is scored on, its labels on the scan's own grid, packed; third what may be
    wrong with it.
    """
    scan, target = read_usable(case, organs)
    image = to_model_grid(scan.voxels, scan.spacing, case.modality, spacing, ct_window)
    one_hot = (torch.from_numpy(target == label).float() for label in range(len(organs) + 1))
    labels = resample_labels(one_hot, image.shape)
    volume = make_volume(case.id, case.modality, image, labels, labelled_organs(case, organs))
    return volume, pack_target(target, scan.spacing), scan.problems


def labelled_organs(case: Case, organs: Sequence[str]) -> np.ndarray:
    """(1 + organs,) bool: background, and the organs that the case's data set labels."""
    return np.array([True] + [organ in case.masks for organ in organs])


def peak_bytes(cases: Sequence[Case], spacing: float) -> int:
    """What reading the largest case takes; spacing: of the model's grid, infinite for none."""
    return max((PEAK * sum(grid_voxels(case.image, spacing)) for case in cases), default=0)
