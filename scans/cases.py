"""A case: a scan with its labels, read, checked, put on the model's grid and kept in a cache."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import NORMALIZATION, Volume, make_volume, resample_labels, to_model_grid
from federated import noting
from scans.cache import entry_name, only_writer, read_target, read_volume, write_entry
from scans.files import DataError, read_json, reading
from scans.layouts import Case
from scans.machine import in_parallel, is_out_of_memory
from scans.nifti import Scan, read_nifti
from scans.values import judge_labels, judge_organs, judge_values


class PreparedCase(NamedTuple):
    """A case ready for an experiment."""

    id: str
    modality: str  # "ct" or "mri"
    counts: np.ndarray  # (1 + organs,) voxels by label
    labelled: np.ndarray  # (1 + organs,) bool: what the case's data set labels; background always
    read_volume: Callable[[], Volume]  # on the model's grid, to train on
    # Labels on the scan's own grid, on which the case is scored, and that grid's spacing in mm.
    read_target: Callable[[], tuple[np.ndarray, tuple[float, ...]]]
    contents: str = ""  # changes with its files; empty for phantoms
    image_crc: int = 0  # of the volume's image, by which copies are found; 0 for phantoms
    warnings: Sequence[str] = ()  # what may be wrong with it


class Volumes(Sequence):
    """The volumes of some cases, each read when it is asked for."""

    def __init__(self, cases: Sequence[PreparedCase]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.cases[index].read_volume()


def read_case(
    case: Case, organs: Sequence[str], ct_window: tuple[float, float] = NORMALIZATION["ct"]
) -> tuple[Scan | None, np.ndarray, list[str], list[str]]:
    """Read a scan and its labels (uint8: 0 background, then the organs from 1; both canonical).

    Returns (scan, labels, errors, warnings): errors make the case unusable, and each names its
    file; warnings say what may be wrong. Organs that the case's data set does not label stay 0, all
    of them for a case without label files.
    """
    errors: list[str] = []
    warnings: list[str] = []
    scan, labels, drawn = None, np.zeros(0, dtype=np.uint8), [0] * (len(organs) + 1)
    try:
        scan = read_nifti(case.image)
        labels = np.zeros(scan.voxels.shape, dtype=np.uint8)
        warnings += scan.warnings
        warnings += judge_values(case, scan, ct_window)
    except (DataError, MemoryError) as error:
        errors.append(_explain(case.image, error))
    for path, wanted in case.label_files(organs).items():
        try:
            mask = read_nifti(path)
            if scan is not None:
                warnings += judge_labels(case, scan, path, mask)
                for label, values in wanted:
                    hit = np.isin(np.rint(mask.voxels), values) if values else mask.voxels > 0.5
                    labels[hit] = label
                    drawn[label] += np.count_nonzero(hit)
        except (DataError, MemoryError) as error:
            errors.append(_explain(path, error))
    if scan is not None:
        warnings += judge_organs(case, scan, labels, organs, drawn)
    return scan, labels, errors, warnings


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    return f"{path}: too large for this machine's memory ({error})"


def read_usable(
    case: Case, organs: Sequence[str], ct_window: tuple[float, float] = NORMALIZATION["ct"]
) -> tuple[Scan, np.ndarray]:
    """A scan, with all warnings of its case, and its labels; raises DataError for a bad case."""
    scan, labels, errors, warnings = read_case(case, organs, ct_window)
    if errors or scan is None:
        raise DataError("\n".join(errors))
    return scan._replace(warnings=warnings), labels


def load_cases(
    cases: Sequence[Case],
    organs: Sequence[str],
    spacing: float,
    cache: Path,
    skip_bad: bool = False,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> tuple[dict[Path, PreparedCase], list[str]]:
    """Load cases, several at a time; return them by scan file, and what was left out and why.

    A case is preprocessed once, and mapped from disk when it is used. Raises DataError for a case
    that cannot be used, unless skip_bad leaves it out.
    """
    settings = organs, spacing, ct_window
    names = in_parallel(lambda case: entry_name(case, *settings), cases, "finding scans")
    folders = {case.image: cache / name for case, name in zip(cases, names, strict=True)}
    complete = all(folder.exists() for folder in folders.values())
    errors: list[str] = []
    prepared: dict[Path, PreparedCase] = {}
    making = in_parallel(
        lambda case: preprocess(case, *settings, folders[case.image]), cases, "reading scans"
    )
    # Closed first: its threads have ended before another process may write.
    with contextlib.nullcontext() if complete else only_writer(cache), contextlib.closing(making):
        for case, error in zip(cases, making, strict=True):
            if not error:
                prepared[case.image] = open_entry(folders[case.image], case, organs)
            elif skip_bad:
                errors.append(error)
            else:
                raise DataError(f"{error}\n(--skip-bad leaves such cases out)")
    return prepared, errors


def preprocess(
    case: Case, organs: Sequence[str], spacing: float, ct_window: tuple[float, float], folder: Path
) -> str:
    """Write a case's entry, unless it exists; return what keeps it from being used, or ""."""
    try:
        if not folder.exists():
            scan, target = read_usable(case, organs, ct_window)
            image = to_model_grid(scan.voxels, scan.spacing, case.modality, spacing, ct_window)
            one_hot = (torch.from_numpy(target == n).float() for n in range(len(organs) + 1))
            labels = resample_labels(one_hot, image.shape)
            labelled = labelled_organs(case, organs)
            volume = make_volume(case.id, case.modality, image, labels, labelled)
            with noting(f"writing {folder}, for {case.image}"):  # a full disk's error names no file
                write_entry(folder, volume, scan, target)
    except DataError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _explain(case.image, error)
    return ""


def open_entry(folder: Path, case: Case, organs: Sequence[str]) -> PreparedCase:
    labelled = labelled_organs(case, organs)
    with reading(folder / "entry.json"):
        metadata = read_json(folder / "entry.json")
        return PreparedCase(
            id=case.id,
            modality=case.modality,
            counts=np.array(metadata["counts"]),
            labelled=labelled,
            read_volume=functools.partial(read_volume, folder, case.id, case.modality, labelled),
            read_target=functools.partial(read_target, folder),
            contents=folder.name,
            image_crc=metadata["image_crc"],
            warnings=metadata["warnings"],
        )


def labelled_organs(case: Case, organs: Sequence[str]) -> np.ndarray:
    """(1 + organs,) bool: background, and the organs that the case's data set labels."""
    return np.array([True] + [organ in case.masks for organ in organs])
