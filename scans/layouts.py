"""The layouts on disk: which scans a folder holds, as downloaded, with their labels and split.

TotalSegmentator (CT or MRI), AMOS22 and nnU-Net's raw layout are told apart by what is in the
folder. No scan is opened here.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from scans import nnunet
from scans.files import DataError, names_in
from scans.nifti import Problem
from scans.organs import AMOS, NO_STRUCTURES, ORGANS, check_apart, match, spelling
from scans.splits import SPLITS, read_splits

MODALITIES = ("ct", "mri")
TOTALSEGMENTATOR_CASE = re.compile(r"s\d{4}")
KIDNEYS = {"kidney_left", "kidney_right"}
AMOS_CASE = re.compile(r"amos_\d{4}\.nii\.gz")
KNOWN_BAD = {
    ("totalsegmentator", "s0864"): "is corrupt or has impossible values in some releases",
    ("totalsegmentator", "s0001"): "is rotated against its labels in some releases",
    ("totalsegmentator", "s0044"): "is rotated against its labels in some releases",
    ("totalsegmentator", "s0067"): "is rotated against its labels in some releases",
    ("amos", "amos_0540"): "has a scale factor that puts its values into the millions",
}


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
    problem: str = ""  # what keeps it from being used, by the names of its files alone
    structures: tuple[str, ...] = ()  # all that its folder labels, in the folder's own spelling
    remarks: tuple[Problem, ...] = ()  # what there is to say of its folder

    def files(self, organs: Sequence[str] = ORGANS) -> list[Path]:
        """The scan, and the files of its labels."""
        return [self.image, *self.label_files(organs)]

    def label_files(self, organs: Sequence[str]) -> dict[Path, list]:
        """Each label file with the (label, values) to look for in it, so that it is read once."""
        files: dict[Path, list] = {}
        for label, organ in enumerate(organs, start=1):
            for path, values in self.masks.get(organ, ()):
                files.setdefault(path, []).append((label, values))
        return files


def find_cases(
    folder: str | Path,
    modality: str | None = None,
    layout: str | None = None,
    organs: Sequence[str] = ORGANS,
) -> list[Case]:
    """List the labelled cases of a folder, sorted by id, with the masks of these organs.

    The layout is seen from what is in the folder unless given. modality "ct" or "mri" keeps those
    cases only, and says what a data set is that does not say so itself. A case that something is
    missing of is listed too: reading it says what. Raises DataError if the folder is missing, looks
    like two layouts, or holds no such case.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    names = [layout] if layout else LAYOUTS
    found = {name: LAYOUTS[name](root, organs, modality) for name in names}
    found = {name: cases for name, cases in found.items() if cases}
    if len(found) > 1:
        raise DataError(f"{root}: looks like {' and '.join(found)}; say which with --layout")
    if not found:
        raise DataError(
            f"{root}: no {layout or 'labelled'} case found; expected sNNNN/ct.nii.gz or "
            "sNNNN/mri.nii.gz (TotalSegmentator), imagesTr/amos_NNNN.nii.gz (AMOS22), or "
            f"dataset.json with imagesTr/ and labelsTr/ (nnU-Net raw){_look_closer(root)}"
        )
    [cases] = found.values()
    kept = [case for case in cases if modality in (None, case.modality)]
    if not kept:
        raise DataError(f"{root}: holds {cases[0].modality.upper()} scans only, no {modality}")
    return kept


def _look_closer(root: Path) -> str:
    """What may explain that a folder holds no case."""
    seen = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.lower().endswith((".dcm", ".ima")) or name == "DICOMDIR":
                return "; it holds DICOM: convert it to NIfTI first, with dcm2niix for instance"
            if re.search(r"(?i:\.nii(\.gz)?)$", name) and not name.endswith((".nii", ".nii.gz")):
                return f"; {Path(folder, name)}: names end in .nii.gz, in small letters"
        seen += len(names)
        if seen > 10_000:
            break
    return ""


def _find_totalsegmentator(root: Path, organs: Sequence[str], modality: str | None) -> list[Case]:
    scans = _totalsegmentator_scans(root)
    splits = dict.fromkeys((id_ for id_, _ in scans), "")
    remarks: list[Problem] = []
    for name in names_in(root):
        if scans and name.lower() == "meta.csv":
            splits, remarks = read_splits(root / name, splits)
    labelled = set()
    for id_, _ in scans:
        names = names_in(root / id_ / "segmentations")
        labelled |= {name.removesuffix(".nii.gz") for name in names if name.endswith(".nii.gz")}
    if labelled & KIDNEYS:
        labelled |= KIDNEYS
    found = match(organs, sorted(labelled))
    remarks += check_apart(root, dict.fromkeys(labelled, ()), found)
    cases = []
    for id_, kind in scans:
        image, folder = root / id_ / f"{kind}.nii.gz", root / id_ / "segmentations"
        masks: Masks = {o: [(folder / f"{name}.nii.gz", ()) for name in found[o]] for o in found}
        case = Case("totalsegmentator", str(root), id_, kind, splits[id_], image, masks)
        cases.append(case._replace(structures=tuple(sorted(labelled)), remarks=tuple(remarks)))
    return cases


def _totalsegmentator_scans(root: Path) -> list[tuple[str, str]]:
    """(id, modality) of each scan that is in a folder, or should be by what else is there."""
    content = {}
    for id_ in names_in(root):
        try:
            content[id_] = names_in(root / id_)
        except DataError:
            if TOTALSEGMENTATOR_CASE.fullmatch(id_):  # else it is somebody else's
                raise
    found = {id_: [m for m in MODALITIES if f"{m}.nii.gz" in content[id_]] for id_ in content}
    scans = [(id_, kind) for id_, kinds in found.items() for kind in kinds]
    for id_, names in content.items() if scans else ():
        looks_like_one = "segmentations" in names or TOTALSEGMENTATOR_CASE.fullmatch(id_)
        if looks_like_one and not found[id_]:
            scans.append((id_, scans[0][1]))
    return sorted(scans)


def _find_amos(root: Path, organs: Sequence[str], modality: str | None) -> list[Case]:
    cases = []
    for part, split in (("Tr", "train"), ("Va", "val")):
        images, labels = root / f"images{part}", root / f"labels{part}"
        for name in sorted({*_amos_cases(images), *_amos_cases(labels)}):
            id_ = name.removesuffix(".nii.gz")
            kind = "mri" if int(id_[-4:]) > 500 else "ct"
            # Nobody has drawn bladder and prostate in MRI.
            numbers = {o: n for n, o in AMOS.items() if kind == "ct" or n < 14}
            found = match(organs, numbers)
            masks = {o: [(labels / name, tuple(numbers[n] for n in found[o]))] for o in found}
            case = Case("amos", str(root), id_, kind, split, images / name, masks, (0, *AMOS))
            cases.append(case._replace(structures=tuple(numbers)))
    if not any(_amos_cases(root / f"images{part}") for part in ("Tr", "Va")):
        return []
    count = _too_few(root / "dataset.json", cases, _count_amos)
    return [case._replace(remarks=tuple(count)) for case in cases]


def _count_amos(dataset: dict) -> int:
    return len(dataset["training"]) + len(dataset["validation"])


def _amos_cases(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if AMOS_CASE.fullmatch(name)]


def _find_nnunet(root: Path, organs: Sequence[str], modality: str | None) -> list[Case]:
    # AMOS22's dataset.json has another form.
    is_amos = any(_amos_cases(root / f"images{part}") for part in ("Tr", "Va", "Ts"))
    if is_amos or "dataset.json" not in names_in(root):
        return []
    file = root / "dataset.json"
    channels, labels, ending = nnunet.read_dataset_json(file, organs)
    kind = nnunet.modality_of(file, channels, modality)
    structures = {n: v for n, v in labels.items() if spelling(n) not in NO_STRUCTURES}
    found = match(organs, structures)
    values_of = {o: tuple(v for name in found[o] for v in structures[name]) for o in found}
    known = tuple(value for values in labels.values() for value in values)
    cases = []
    for id_, (image, problem) in sorted(nnunet.find_images(root, ending).items()):
        label_file = root / "labelsTr" / f"{id_}{ending}"
        masks = {organ: [(label_file, values)] for organ, values in values_of.items()}
        cases.append(Case("nnunet", str(root), id_, kind, "", image, masks, known, problem))
    remarks = check_apart(file, structures, found)
    remarks += _too_few(file, cases, lambda dataset: dataset["numTraining"])
    return [c._replace(structures=tuple(structures), remarks=tuple(remarks)) for c in cases]


def _too_few(file: Path, cases: Sequence[Case], count: Callable[[dict], int]) -> list[Problem]:
    """What to say if a dataset.json speaks of more cases than there are."""
    missing = 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        missing = count(json.loads(file.read_text(encoding="utf-8-sig"))) - len(cases)
    what = f"speaks of {missing} more cases than are in the folder"
    return [Problem(file, what, "those that are there are used", True)] if missing > 0 else []


LAYOUTS = {
    "totalsegmentator": _find_totalsegmentator,
    "amos": _find_amos,
    "nnunet": _find_nnunet,
}


def split_cases(
    cases: Sequence[Case], seed: int, test_elsewhere: bool = False
) -> dict[str, list[Case]]:
    """Divide one folder's cases into "train", "val" and "test", by its own split where it has one.

    Other cases are put in an order that depends on seed and id alone; a fifth of them goes to test
    (none with test_elsewhere) and a tenth of the training cases to validation, at least one of each
    once there are three. Where a folder has a test split of its own but no validation split, the
    validation cases are carved out of the training cases.
    """
    order = sorted(cases, key=lambda c: hashlib.sha256(f"{seed}/{c.id}".encode()).digest())
    parts = {split: [c for c in order if c.split == split] for split in SPLITS}
    train = parts["train"] + [c for c in order if c.split not in SPLITS]
    if test_elsewhere:
        parts["test"] = []
    elif not parts["test"]:
        n_test = max(len(train) // 5, int(len(train) >= 3))
        parts["test"], train = train[:n_test], train[n_test:]
    if not parts["val"]:
        n_val = max(len(train) // 10, int(len(train) >= 3))
        parts["val"], train = train[:n_val], train[n_val:]
    return {**parts, "train": train}
