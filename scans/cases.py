"""A case: a scan with its labels, read, checked, on the model's grid, and kept in a cache."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import (
    NORMALIZATION,
    VOXELS_PER_ORGAN,
    Volume,
    make_volume,
    resample_labels,
    to_model_grid,
)
from scans.cache import Entry, entry_name, only_writer, write_entry
from scans.files import DataError, read_json, reading
from scans.layouts import Case
from scans.machine import in_parallel, is_out_of_memory
from scans.nifti import Scan, corners_apart, read_nifti
from scans.values import judge_labels, judge_values


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


# ------------------------------------------------------------------------------- read and checked


def read_case(
    case: Case, organs: Sequence[str]
) -> tuple[Scan | None, np.ndarray, list[str], list[str]]:
    """Read a scan and its labels (uint8: 0 background, then the organs from 1; both canonical).

    Returns (scan, labels, errors, warnings): all errors, of which each names its file, and all that
    may be wrong with the case. With an error it cannot be used. Organs that the case's data set
    does not label stay 0, all of them for a case without label files.
    """
    errors: list[str] = []
    scan = _read(case.image, errors)
    warnings = list(scan.warnings) if scan else []
    if scan:
        impossible, unlikely = judge_values(case.modality, scan)
        errors += [f"{case.image}: {impossible}"] if impossible else []
        warnings += unlikely
    labels = np.zeros(scan.voxels.shape if scan else 0, dtype=np.uint8)
    for path, wanted in case.label_files(organs).items():
        mask = _read(path, errors)
        if mask is None or scan is None:
            continue
        name = "its label map" if case.values else f"its mask {path.name}"
        warnings += [f"{name}: {w}" for w in mask.warnings if w not in scan.warnings]
        if mask.voxels.shape != scan.voxels.shape:
            errors.append(f"{path}: has {mask.voxels.shape} voxels, its scan {labels.shape}")
        elif corners_apart(scan.affine, mask.affine, labels.shape):
            errors.append(f"{path}: lies at another place than its scan, by their affines")
        else:
            warnings += [f"{name} {warning}" for warning in judge_labels(case, mask.voxels)]
            for label, values in wanted:
                hit = np.isin(np.rint(mask.voxels), values) if values else mask.voxels > 0.5
                labels[hit] = label
    return scan, labels, errors, warnings


def read_usable(case: Case, organs: Sequence[str]) -> tuple[Scan, np.ndarray]:
    """Scan and labels of read_case; raises DataError for what keeps the case from being used.

    The scan's warnings are those of its labels too.
    """
    scan, labels, errors, warnings = read_case(case, organs)
    if errors or scan is None:
        raise DataError("\n".join(errors))
    return scan._replace(warnings=warnings), labels


def _read(path: Path, errors: list[str]) -> Scan | None:
    """Read a file; if that fails, append the reason to `errors` and return None."""
    try:
        return read_nifti(path)
    except DataError as error:
        errors.append(str(error))
        return None


# ------------------------------------------------------------------ on the grid, and in the cache


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
    names = {case.image: name_entry(case, organs, spacing, ct_window) for case in cases}

    def load(case: Case) -> PreparedCase | DataError:
        name = names[case.image]
        try:
            if not (name and (cache / name).exists()):
                name = preprocess(case, organs, spacing, cache, ct_window)
            return open_entry(cache / name, case, organs)
        except DataError as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return DataError(f"{case.image}: too large for this machine's memory ({error})")

    errors: list[str] = []
    prepared: dict[Path, PreparedCase] = {}
    complete = all(name and (cache / name).exists() for name in names.values())
    with (
        contextlib.nullcontext() if complete else only_writer(cache),
        # Closed first: its threads have ended before another process may write.
        contextlib.closing(in_parallel(load, cases, "reading scans")) as loading,
    ):
        for case, loaded in zip(cases, loading, strict=True):
            if isinstance(loaded, PreparedCase):
                prepared[case.image] = loaded
            elif skip_bad:
                errors.append(str(loaded))
            else:
                raise DataError(f"{loaded}\n(--skip-bad leaves such cases out)")
    return prepared, errors


def name_entry(
    case: Case, organs: Sequence[str], spacing: float, ct_window: tuple[float, float]
) -> str:
    """The name of a case's entry in a cache; "" if a file of it cannot be opened."""
    window = ct_window if case.modality == "ct" else NORMALIZATION["ct"]
    settings = spacing, {**NORMALIZATION, "ct": window}, VOXELS_PER_ORGAN
    try:
        return entry_name(case, organs, *settings)
    except OSError:
        return ""


def preprocess(
    case: Case,
    organs: Sequence[str],
    spacing: float,
    cache: Path,
    ct_window: tuple[float, float] = NORMALIZATION["ct"],
) -> str:
    """Read a case, resample it to cubic voxels of `spacing` mm, normalize it, write its entry.

    Returns the entry's name. Raises DataError, naming the file, for a case that cannot be used.
    """
    scan, target = read_usable(case, organs)
    image = to_model_grid(scan.voxels, scan.spacing, case.modality, spacing, ct_window)
    one_hot = (torch.from_numpy(target == label).float() for label in range(len(organs) + 1))
    labels = resample_labels(one_hot, image.shape)
    labelled = labelled_organs(case, organs)
    volume = make_volume(case.id, case.modality, image, labels, labelled)
    name = name_entry(case, organs, spacing, ct_window)
    write_entry(cache / name, volume, target, scan.spacing, scan.warnings)
    return name


def open_entry(folder: Path, case: Case, organs: Sequence[str]) -> PreparedCase:
    labelled = labelled_organs(case, organs)
    entry = Entry(folder, case.id, case.modality, labelled)
    metadata = read_json(folder / "entry.json")
    with reading(folder / "entry.json"):
        counts, crc, warnings = (metadata[key] for key in ("counts", "image_crc", "warnings"))
    return PreparedCase(
        id=case.id,
        modality=case.modality,
        counts=np.array(counts),
        labelled=labelled,
        read_volume=entry.read_volume,
        read_target=entry.read_target,
        contents=folder.name,
        image_crc=crc,
        warnings=warnings,
    )


def labelled_organs(case: Case, organs: Sequence[str]) -> np.ndarray:
    """(1 + organs,) bool: background, and the organs that the case's data set labels."""
    return np.array([True] + [organ in case.masks for organ in organs])
