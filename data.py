"""Cases from folders as they were downloaded, and batches of patches from cases.

A case is one scan with its labels. `find_cases` lists those of a folder, `load_cases` reads them
onto the model's grid: closest canonical orientation, cubic voxels, intensities normalized by
modality. Arrays have the axes of canonical NIfTI files: right, anterior, superior.

    python data.py check DIR [DIR …]  # every trouble in some folders, in one pass

    from data import find_cases, load_cases
    cases = find_cases("Totalsegmentator_dataset_v201", "ct")
    volumes, left_out = load_cases(cases, organs=["liver", "spleen"], spacing=2.0)
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nibabel
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError, SpatialImage
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

ORGANS = ("liver", "kidneys", "spleen", "pancreas", "gallbladder")
NORMALIZATION = {
    "ct": (-160.0, 240.0),  # window in HU: soft tissue
    "mri": (0.5, 99.5),  # percentiles
}
ORGAN_SHARE = 0.5  # of the patches is centred on a voxel of an organ, every organ as often
CENTRES_PER_ORGAN = 1000  # candidate voxels that a volume remembers for that
CACHE_FORMAT = 1  # another number, and nothing of an older cache is used

TOTALSEGMENTATOR_MASKS = {
    "liver": ["liver"],
    "kidneys": ["kidney_left", "kidney_right"],
    "spleen": ["spleen"],
    "pancreas": ["pancreas"],
    "gallbladder": ["gallbladder"],
}
AMOS_SCANS = "amos_[0-9][0-9][0-9][0-9].nii.gz"
AMOS_LABELS = {  # by number: the names in its dataset.json are misspelt
    "liver": (6,),
    "kidneys": (2, 3),
    "spleen": (1,),
    "pancreas": (10,),
    "gallbladder": (4,),
}
ORGAN_OF_NAME = {
    **{organ: organ for organ in ORGANS},
    "gall bladder": "gallbladder",
    **dict.fromkeys(
        ["kidney", "kidney left", "left kidney", "kidney right", "right kidney"], "kidneys"
    ),
}
KNOWN_BAD = {
    ("totalsegmentator", "s0864"): "is corrupt or has impossible values in some releases",
    ("totalsegmentator", "s0001"): "is rotated against its labels in some releases",
    ("totalsegmentator", "s0044"): "is rotated against its labels in some releases",
    ("totalsegmentator", "s0067"): "is rotated against its labels in some releases",
    ("amos", "amos_0540"): "has a scale factor that puts its values into the millions",
}


class DataError(ValueError):
    """Something about a folder or a file that its owner can mend; the message says how."""


# organ → the files that hold it, each with the label values that mean it; no values: any > 0.5
Masks = dict[str, list[tuple[Path, tuple[int, ...]]]]


class Case(NamedTuple):
    """One scan as it lies on disk."""

    layout: str
    folder: str  # the hospital's folder; ids are unique within it only
    id: str
    modality: str  # "ct" or "mri"
    split: str  # "train", "val" or "test" where the data set says so, else ""
    image: Path
    masks: Masks
    values: tuple[int, ...] = ()  # all values that the data set lists; empty for binary masks


class Trouble(NamedTuple):
    """Something wrong with a file, and what becomes of its case."""

    file: Path
    what: str
    then: str = "the case cannot be used"
    usable: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.then}"


# ---------------------------------------------------------------------------------- finding cases


def find_cases(
    folder: str | Path, modality: str | None = None, layout: str | None = None
) -> list[Case]:
    """List the labelled cases of a folder as downloaded, sorted by id; no scan is opened yet.

    The layout is TotalSegmentator's (CT or MRI), AMOS22's or nnU-Net's raw one, and is seen from
    what is in the folder unless given. modality "ct" or "mri" keeps those cases only. Raises
    DataError if the folder is missing, looks like two layouts, or holds no such case.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    finders = {layout: LAYOUTS[layout]} if layout else LAYOUTS
    found = {name: cases for name, find in finders.items() if (cases := find(root))}
    if len(found) > 1:
        raise DataError(f"{root}: looks like {' and '.join(found)}; say which with --layout")
    if not found:
        raise DataError(
            f"{root}: no {layout or 'labelled'} case found; expected sNNNN/ct.nii.gz or "
            "sNNNN/mri.nii.gz (TotalSegmentator), imagesTr/amos_NNNN.nii.gz (AMOS22), or "
            "dataset.json with imagesTr/ and labelsTr/ (nnU-Net raw)"
        )
    [cases] = found.values()
    kept = [case for case in cases if modality in (None, case.modality)]
    if not kept:
        there = cases[0].modality
        raise DataError(f"{root}: holds {there.upper()} scans only; give it with --{there}")
    return kept


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
        id_, modality = scan.parent.name, scan.name.removesuffix(".nii.gz")
        masks: Masks = {
            organ: [(scan.parent / "segmentations" / f"{name}.nii.gz", ()) for name in names]
            for organ, names in labelled.items()
        }
        split = splits.get(id_, "")
        cases.append(Case("totalsegmentator", str(root), id_, modality, split, scan, masks))
    return cases


def _find_amos(root: Path) -> list[Case]:
    cases = []
    for part, split in (("Tr", "train"), ("Va", "val")):
        for scan in sorted(root.glob(f"images{part}/{AMOS_SCANS}")):
            id_ = scan.name.removesuffix(".nii.gz")
            label_file = root / f"labels{part}" / scan.name
            masks = {organ: [(label_file, values)] for organ, values in AMOS_LABELS.items()}
            modality = "mri" if int(id_[-4:]) > 500 else "ct"
            known = tuple(range(16))
            cases.append(Case("amos", str(root), id_, modality, split, scan, masks, known))
    return cases


def _find_nnunet(root: Path) -> list[Case]:
    file = root / "dataset.json"
    # AMOS22's dataset.json has another form.
    if not file.is_file() or any(root.glob(f"images*/{AMOS_SCANS}")):
        return []
    try:
        dataset = json.loads(file.read_text(encoding="utf-8"))
        channels = [str(name).lower() for name in dataset["channel_names"].values()]
        known: list[int] = []
        organs: dict[str, tuple[int, ...]] = {}
        for name, value in dataset["labels"].items():
            values = tuple(int(v) for v in np.atleast_1d(value))
            known += values
            organ = ORGAN_OF_NAME.get(name.lower().replace("_", " "))
            if organ:
                organs[organ] = organs.get(organ, ()) + values
        ending = str(dataset["file_ending"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    for scan in sorted((root / "imagesTr").glob("[!.]*")):
        if scan.name.endswith(f"_0000{ending}"):
            id_ = scan.name.removesuffix(f"_0000{ending}")
            label_file = root / "labelsTr" / f"{id_}{ending}"
            masks = {o: [(label_file, organs[o])] for o in ORGANS if o in organs}
            cases.append(Case("nnunet", str(root), id_, modality, "", scan, masks, tuple(known)))
    return cases


LAYOUTS = {
    "totalsegmentator": _find_totalsegmentator,
    "amos": _find_amos,
    "nnunet": _find_nnunet,
}


def check_organs(labelled: dict[str, set[str]], organs: Sequence[str], partial: bool) -> None:
    """Raise DataError unless every folder labels all organs (partial: one folder each of them).

    labelled: folder → the organs of which it has masks.
    """
    union = set().union(*labelled.values())
    common = union.intersection(*labelled.values())
    if set(organs) <= (union if partial else common):
        return
    lists = [
        f"{name}: {', '.join(organ for organ in ORGANS if organ in there) or 'none'}"
        for name, there in labelled.items()
    ]
    advice = []
    if union if partial else common:
        usable = [organ for organ in ORGANS if organ in (union if partial else common)]
        advice.append(f"--organs {' '.join(usable)}")
    if not partial and set(organs) <= union:
        advice.append("--partial-labels, and each hospital trains on the organs that it has")
    raise DataError(
        f"not {'one folder' if partial else 'every folder'} labels {', '.join(organs)} "
        f"({'; '.join(lists)}); use {' or '.join(advice) or 'folders that share an organ'}"
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


class Scan(NamedTuple):
    """A NIfTI volume in closest canonical orientation, and what leads back to its own."""

    voxels: np.ndarray  # (R, A, S) float32
    spacing: tuple[float, ...]  # mm
    affine: np.ndarray  # of voxels
    file: SpatialImage  # as it lies on disk
    troubles: list[Trouble]  # that do not keep it from being used


def read_nifti(path: Path) -> Scan:
    """Read a 3D NIfTI file; raises DataError, naming it, if it cannot be used."""

    def refuse(what: str) -> NoReturn:
        raise DataError(Trouble(path, what))

    if not path.is_file():
        refuse("missing")
    try:
        file = nibabel.load(path)
        with ImageOpener(path) as stream:  # as it is: load() mends a pixdim of 0
            pixdim = file.header_class.from_fileobj(stream, check=False)["pixdim"][1:4].tolist()
        if not all(math.isfinite(mm) and mm > 0 for mm in pixdim):
            refuse(f"voxel size {pixdim} mm is not positive")
        nifti = nibabel.funcs.squeeze_image(file)
        if nifti.ndim != 3:
            refuse(f"has shape {file.shape}; expected one 3D volume")
        troubles = _header_troubles(path, file)
        canonical = nibabel.as_closest_canonical(nifti)
        voxels = np.ascontiguousarray(canonical.get_fdata(dtype=np.float32, caching="unchanged"))
    except (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, KeyError) as error:
        refuse(f"cannot be read ({error}): truncated, corrupt or no NIfTI file")
    if not np.isfinite(voxels).all():
        refuse(f"has {int((~np.isfinite(voxels)).sum())} voxels that are NaN or infinite")
    spacing = tuple(voxel_sizes(canonical.affine).tolist())
    return Scan(voxels, spacing, canonical.affine, file, troubles)


def _header_troubles(path: Path, file: SpatialImage) -> list[Trouble]:
    troubles = []
    if file.ndim > 3:
        what = f"has shape {file.shape}"
        troubles.append(Trouble(path, what, "axes of length 1 are dropped", True))
    (sform, s_code), (qform, q_code) = file.get_sform(coded=True), file.get_qform(coded=True)
    if s_code > 0 and q_code > 0 and _corners_apart(sform, qform, file.shape[:3]):
        what = "its sform and qform put the volume at different places"
        troubles.append(Trouble(path, what, "the sform is used", True))
    return troubles


def _corners_apart(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put a corner of the volume more than half a voxel apart."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    distance = np.linalg.norm(((a - b) @ corners)[:3], axis=0).max()
    return bool(distance > 0.5 * np.linalg.norm(a[:3, :3], axis=0).min())


def read_case(case: Case, organs: Sequence[str]) -> tuple[Scan | None, np.ndarray | None, list]:
    """Read a scan and its labels (uint8: 0 background, then the organs from 1; both canonical).

    Returns (scan, labels, troubles) with every trouble there is; scan or labels are None if one of
    them keeps the case from being used. Organs that the case's data set does not label stay 0.
    """
    troubles: list[Trouble] = []
    scan = _try_read(case.image, troubles)
    labels = None
    if scan:
        troubles += _value_troubles(case, scan)
        labels = np.zeros(scan.voxels.shape, dtype=np.uint8)
    for path, wanted in _label_files(case, organs).items():
        mask = _try_read(path, troubles)
        if mask is None or scan is None or labels is None:
            continue
        if mask.voxels.shape != scan.voxels.shape:
            ours, theirs = mask.voxels.shape, f"its scan {case.image.name} {scan.voxels.shape}"
            troubles.append(Trouble(path, f"has {ours} voxels, {theirs}"))
        elif _corners_apart(scan.affine, mask.affine, scan.voxels.shape):
            what = f"lies at another place than its scan {case.image.name}, by their affines"
            troubles.append(Trouble(path, what))
        else:
            troubles += _label_troubles(case, path, mask.voxels)
            for label, values in wanted:
                hit = np.isin(np.rint(mask.voxels), values) if values else mask.voxels > 0.5
                labels[hit] = label
    if (case.layout, case.id) in KNOWN_BAD:
        what = f"{case.id} {KNOWN_BAD[case.layout, case.id]}"
        troubles.append(Trouble(case.image, what, "it is used if nothing else is wrong", True))
    if not all(trouble.usable for trouble in troubles):
        return scan, None, troubles
    if labels is not None and not labels.any():
        troubles.append(Trouble(case.image, "has no organ at all", "it is all background", True))
    return scan, labels, troubles


def read_usable(case: Case, organs: Sequence[str]) -> tuple[Scan, np.ndarray]:
    """Scan and labels of read_case; raises DataError for what keeps the case from being used."""
    scan, labels, troubles = read_case(case, organs)
    if scan is None or labels is None:
        raise DataError("\n".join(str(trouble) for trouble in troubles if not trouble.usable))
    return scan, labels


def _try_read(path: Path, troubles: list[Trouble]) -> Scan | None:
    try:
        scan = read_nifti(path)
    except DataError as error:
        troubles.append(error.args[0])
        return None
    troubles += scan.troubles
    return scan


def _label_files(case: Case, organs: Sequence[str]) -> dict[Path, list]:
    """Each label file of a case with the (label, values) to look for, so that it is read once."""
    files: dict[Path, list] = {}
    for label, organ in enumerate(organs, start=1):
        for path, values in case.masks.get(organ, ()):
            files.setdefault(path, []).append((label, values))
    return files


def _value_troubles(case: Case, scan: Scan) -> list[Trouble]:
    """Voxel values that the modality cannot have."""
    low, high = float(scan.voxels.min()), float(scan.voxels.max())
    what = ""
    if low == high:
        what = f"every voxel is {low:g}"
    elif case.modality == "ct" and (low < -8192 or high > 65535):
        what = f"values {low:g} … {high:g} are no Hounsfield units"
    elif case.modality == "mri" and max(-low, high) > 1e7:
        what = f"values {low:g} … {high:g} are no MRI signal"
    return [Trouble(case.image, what)] if what else []


def _label_troubles(case: Case, path: Path, mask: np.ndarray) -> list[Trouble]:
    """Values of a mask that its data set does not list."""
    known = case.values or (0, 1)
    odd = [int(value) for value in np.unique(np.rint(mask)) if value not in known]
    if not odd:
        return []
    listed = ", ".join(map(str, odd[:5])) + (" …" if len(odd) > 5 else "")
    then = "they count as background" if case.values else "values above 0.5 count as organ"
    return [Trouble(path, f"has labels that the data set does not list: {listed}", then, True)]


# ------------------------------------------------------------------ the model's grid and the scan's


def to_model_grid(scan: Scan, modality: str, spacing: float) -> np.ndarray:
    """A scan as the model sees it: cubic voxels of `spacing` mm, normalized, float32."""
    extent = zip(scan.voxels.shape, scan.spacing, strict=True)
    size = tuple(max(1, round(n * mm / spacing)) for n, mm in extent)
    return normalize(_resample(torch.from_numpy(scan.voxels), size).numpy(), modality)


def normalize(image: np.ndarray, modality: str) -> np.ndarray:
    """Clip a CT (HU) to a soft-tissue window, an MRI to its percentiles; then mean 0, deviation 1.

    The statistics are the scan's own, so none of another scan's ever enters.
    """
    low, high = NORMALIZATION[modality]
    if modality == "mri":
        low, high = np.percentile(image, (low, high))
    image = image.clip(low, high)
    return ((image - image.mean()) / max(float(image.std()), 1e-6)).astype(np.float32)


def resample_labels(scores: Iterator[Tensor] | Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Interpolate one score map (D, H, W) a class linearly to `size`; return the best class, uint8.

    With one-hot labels as scores it resamples a label map, with logits it brings a prediction back
    to a scan's grid. Only one class is held at the new size beside the best so far.
    """
    resampled = (_resample(score, size) for score in scores)
    best = next(resampled)
    labels = torch.zeros(size, dtype=torch.uint8, device=best.device)
    for label, score in enumerate(resampled, start=1):
        better = score > best
        best = torch.where(better, score, best)
        labels[better] = label
    return labels.cpu().numpy()


def _resample(volume: Tensor, size: tuple[int, ...]) -> Tensor:
    """Trilinear (D, H, W) → size over the same extent, voxels taken as cells with a centre."""
    if tuple(volume.shape) == tuple(size):
        return volume
    return F.interpolate(volume[None, None], size=size, mode="trilinear")[0, 0]


def to_scan_grid(labels: np.ndarray, scan: Scan) -> np.ndarray:
    """Turn a label map on a scan's voxels back to the axes of the scan's own file."""
    there = nibabel.orientations.io_orientation(scan.file.affine)
    turn = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), there)
    return nibabel.orientations.apply_orientation(labels, turn)


def write_nifti(path: Path, labels: np.ndarray, scan: Scan) -> None:
    """Save a label map with the header, and so the place, of a scan; whole or not at all."""
    header = scan.file.header.copy()
    header.set_data_dtype(np.uint8)
    header["scl_slope"], header["scl_inter"] = 1, 0
    temporary = path.with_name(f"tmp-{path.name}")
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.uint8), scan.file.affine, header), temporary)
    temporary.replace(path)


# -------------------------------------------------------------------------- volumes and their cache


class Volume(NamedTuple):
    """A case on the model's grid, ready for training."""

    id: str
    image: np.ndarray  # (D, H, W) float32, normalized
    labels: np.ndarray  # (D, H, W) uint8: 0 background, then the organs from 1
    centres: np.ndarray  # (n, 4) int32: organ and voxel, for patches centred on organs
    labelled: np.ndarray  # (1 + organs,) bool: what the case's data set labels; background always
    case: Case | None  # where it came from; None for what was made, not read


class CachedVolume:
    """A Volume whose arrays stay on disk, mapped into memory for as long as they are in use."""

    def __init__(self, folder: Path, labelled: np.ndarray, case: Case) -> None:
        self.id, self.folder, self.labelled, self.case = case.id, folder, labelled, case

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in ("image", "labels", "centres"):
            raise AttributeError(name)
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


def load_case(case: Case, organs: Sequence[str], spacing: float) -> Volume:
    """Read a case, resample it to cubic voxels of `spacing` mm, normalize it.

    Raises DataError, naming the file, for what keeps it from being used.
    """
    scan, truth = read_usable(case, organs)
    image = to_model_grid(scan, case.modality, spacing)
    one_hot = (torch.from_numpy(truth == label).float() for label in range(len(organs) + 1))
    labels = resample_labels(one_hot, image.shape)
    return make_volume(case.id, image, labels, labelled_organs(case, organs), case)


def make_volume(
    id_: str, image: np.ndarray, labels: np.ndarray, labelled: np.ndarray, case: Case | None = None
) -> Volume:
    """Put a volume together, with a fixed choice of voxels on which patches may be centred."""
    rng = np.random.default_rng(0)
    centres = [np.empty((0, 4), dtype=np.int32)]
    for label in np.unique(labels[labels > 0]):
        voxels = np.argwhere(labels == label).astype(np.int32)
        if len(voxels) > CENTRES_PER_ORGAN:
            voxels = voxels[rng.choice(len(voxels), CENTRES_PER_ORGAN, replace=False)]
        centres.append(np.insert(voxels, 0, label, axis=1))
    return Volume(id_, image, labels, np.concatenate(centres), labelled, case)


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
    """Load cases on several processes; return volumes by scan file, and what was left out and why.

    With a cache folder a case is preprocessed once, and mapped from disk when it is used. Raises
    DataError for a case that cannot be used, unless skip_bad leaves it out.
    """
    volumes: dict[Path, Volume | CachedVolume] = {}
    cases, duplicates = _duplicates(cases)
    left_out = list(map(str, duplicates))
    if left_out and not skip_bad:
        raise DataError(left_out[0])
    jobs = [(case, tuple(organs), spacing, cache) for case in cases]
    for case, volume in zip(cases, _in_parallel(_load, jobs, "reading scans"), strict=True):
        if not isinstance(volume, str):
            volumes[case.image] = volume
        elif skip_bad:
            left_out.append(volume)
        else:
            raise DataError(f"{volume}\n(--skip-bad leaves such cases out)")
    return volumes, left_out


def _load(job: tuple) -> Volume | CachedVolume | str:
    """Load one case, by way of the cache if there is one; a string is what is wrong with it."""
    case, organs, spacing, cache = job
    try:
        if cache is None:
            return load_case(case, organs, spacing)
        folder = cache / _cache_key(case, organs, spacing)
        if not folder.is_dir():
            _write_cache(folder, load_case(case, organs, spacing))
        return CachedVolume(folder, labelled_organs(case, organs), case)
    except DataError as error:
        return str(error)


def fingerprint(case: Case, organs: Sequence[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of last change of each file of a case that is there."""
    files = [path for path in (case.image, *_label_files(case, organs)) if path.is_file()]
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _cache_key(case: Case, organs: Sequence[str], spacing: float) -> str:
    """A name that changes with the case's files and with every setting of its preprocessing."""
    stamps = fingerprint(case, organs)
    masks = [[(str(path), values) for path, values in case.masks.get(o, ())] for o in organs]
    settings = (CACHE_FORMAT, organs, spacing, case.modality, NORMALIZATION, CENTRES_PER_ORGAN)
    return hashlib.sha256(repr((stamps, masks, settings)).encode()).hexdigest()[:32]


def _write_cache(folder: Path, volume: Volume) -> None:
    """Write a volume under a temporary name and rename it, so that `folder` is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="tmp-"))
    try:
        for name in ("image", "labels", "centres"):
            np.save(temporary / f"{name}.npy", getattr(volume, name))
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another process has just written the same
            raise


def _in_parallel(function: Callable, jobs: Sequence, what: str) -> Iterator[Any]:
    """function(job) of every job, in order, behind a progress bar; on several processes if many."""
    workers = min(os.cpu_count() or 1, len(jobs) // 8)
    with contextlib.ExitStack() as stack:
        results: Iterator[Any] = map(function, jobs)
        if workers > 1:
            # Spawned, not forked: a fork of a process with PyTorch's threads can hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,))
            results = stack.enter_context(pool).map(function, jobs)
        yield from tqdm(results, total=len(jobs), desc=what, unit="scan", leave=False)


def _duplicates(cases: Sequence[Case]) -> tuple[list[Case], list[Trouble]]:
    """The first case of each folder and id, and a trouble for each of the others."""
    first: dict[tuple[str, str], Case] = {}
    troubles = []
    for case in cases:
        key = (case.folder, case.id)
        if key in first:
            what = f"the id {case.id} stands in this folder twice"
            troubles.append(Trouble(case.image, what, "only the first one can be used"))
        else:
            first[key] = case
    return list(first.values()), troubles


# ----------------------------------------------------------------------------------------- patches


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

    for _ in range(steps):
        batch = []
        for _ in range(batch_size):
            volume = volumes[draw(len(volumes))]
            try:
                batch.append((*_draw_patch(volume, patch, draw), torch.from_numpy(volume.labelled)))
            except (OSError, ValueError) as error:
                raise DataError(f"case {volume.id}: {error}") from error
        images, labels, labelled = map(torch.stack, zip(*batch, strict=True))
        yield images[:, None], labels.long(), labelled


def ahead(batches: Iterator[tuple[Tensor, ...]], pin: bool) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same batches, each drawn by a thread while the one before it is in use.

    pin puts them into page-locked memory, from where a GPU fetches them without being waited for.
    """

    def draw() -> tuple[Tensor, ...] | None:
        batch = next(batches, None)
        return tuple(part.pin_memory() for part in batch) if pin and batch else batch

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(draw)
        while batch := coming.result():
            coming = thread.submit(draw)
            yield batch


def _draw_patch(volume: Volume, patch: int, draw: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    shape, centres = volume.labels.shape, volume.centres
    starts = [draw(max(n - patch, 0) + 1) for n in shape]
    organs = np.unique(centres[:, 0])
    if len(organs) and draw(1000) < 1000 * ORGAN_SHARE:
        rows = np.flatnonzero(centres[:, 0] == organs[draw(len(organs))])
        centre = centres[rows[draw(len(rows))], 1:].tolist()
        starts = [
            min(max(c - patch // 2, 0), max(n - patch, 0))
            for c, n in zip(centre, shape, strict=True)
        ]
    image, labels = _crop(volume, starts, patch)
    if not torch.isfinite(image).all():
        raise ValueError("its preprocessed image has values that are NaN or infinite")
    return image, labels


def _crop(volume: Volume, starts: list[int], patch: int) -> tuple[Tensor, Tensor]:
    window = tuple(slice(start, start + patch) for start in starts)
    image, labels = volume.image[window], volume.labels[window]
    if image.shape != (patch,) * 3:
        before = [(patch - n) // 2 for n in image.shape]
        margins = [(b, patch - n - b) for b, n in zip(before, image.shape, strict=True)]
        image = np.pad(image, margins, constant_values=image.min())
        labels = np.pad(labels, margins)
    return torch.tensor(image), torch.tensor(labels)


# -------------------------------------------------------------------------------- python data.py


def inspect(case: Case) -> dict:
    """What there is to say of a case: its troubles, spacing and size, and voxels by organ."""
    organs = [organ for organ in ORGANS if organ in case.masks]
    scan, labels, troubles = read_case(case, organs)
    found = labels if labels is not None else np.empty(0, dtype=np.uint8)
    counts = np.bincount(found.ravel(), minlength=len(organs) + 1)
    return {
        "id": case.id,
        "modality": case.modality,
        "usable": labels is not None,
        "spacing": list(scan.spacing) if scan else None,
        "size": list(scan.voxels.shape) if scan else None,
        "voxels": {organ: int(n) for organ, n in zip(organs, counts[1:], strict=True)},
        "troubles": [trouble._asdict() for trouble in troubles],
    }


def summarize(reports: Sequence[dict]) -> list[str]:
    """Lines that sum up the usable cases of a folder, by modality."""

    def span(values: Sequence[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:.6g}" if low == high else f"{low:.6g}…{high:.6g}"

    lines = []
    for modality in sorted({report["modality"] for report in reports}):
        cases = [r for r in reports if r["modality"] == modality and r["usable"]]
        total = sum(r["modality"] == modality for r in reports)
        lines.append(f"  {modality.upper()}: {len(cases)} of {total} cases usable")
        if not cases:
            continue
        for key, unit in (("spacing", "mm"), ("size", "voxels")):
            axes = zip(*(r[key] for r in cases), strict=True)
            lines.append(f"    {key:12} {' × '.join(map(span, axes))} {unit}")
        for organ in ORGANS:
            voxels = [r["voxels"][organ] for r in cases if organ in r["voxels"]]
            there = [n for n in voxels if n]
            text = f"{len(there)} of {len(voxels)} cases" if voxels else "not labelled"
            lines.append(f"    {organ:12} {text}{f', {span(there)} voxels' if there else ''}")
    return lines


def check(folders: Sequence[str], layout: str | None = None) -> dict[str, dict]:
    """Read every case of the folders; return reports and troubles by folder."""
    found = {}
    for folder in folders:
        reports: list[dict] = []
        try:
            cases = find_cases(folder, layout=layout)
            reports = list(_in_parallel(inspect, cases, folder))
            troubles = [trouble._asdict() for trouble in _duplicates(cases)[1]]
            troubles += [trouble for report in reports for trouble in report.pop("troubles")]
        except DataError as error:
            what = str(error).removeprefix(f"{Path(folder)}: ")
            troubles = [Trouble(Path(folder), what, "nothing of it can be used")._asdict()]
        found[folder] = {"cases": reports, "troubles": troubles}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look after folders of scans.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "read every case and print all troubles; exit code 1 if a case cannot be used"
    checker = commands.add_parser("check", help=text, description=text)
    checker.add_argument("folders", nargs="+", metavar="DIR", help="a hospital's folder")
    checker.add_argument("--layout", choices=LAYOUTS, help="where a folder looks like two")
    checker.add_argument("--json", action="store_true", help="for scripts: all of it as JSON")
    arguments = parser.parse_args(argv)
    found = check(arguments.folders, arguments.layout)
    if arguments.json:
        print(json.dumps(found, indent=1, default=str))  # default: for paths
    else:
        for folder, content in found.items():
            print(folder)
            for trouble in content["troubles"]:
                print(f"  {Trouble(**trouble)}")
            print("\n".join(summarize(content["cases"]) or ["  no case"]))
    return int(not all(t["usable"] for content in found.values() for t in content["troubles"]))


if __name__ == "__main__":
    sys.exit(main())
