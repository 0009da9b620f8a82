"""The layouts on disk: which scans a folder holds, as downloaded, with their labels and split.

TotalSegmentator (CT or MRI), AMOS22 and nnU-Net's raw layout are told apart by what is in the
folder. No scan is opened here.

    from datasets import find_cases, split_cases
    cases = find_cases("Totalsegmentator_dataset_v201", "ct")
    parts = split_cases(cases, seed=42)  # {"train": [Case(…), …], "val": …, "test": …}
"""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ORGANS = ("liver", "kidneys", "spleen", "pancreas", "gallbladder")
SPLITS = ("train", "val", "test")

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

    def label_files(self, organs: Sequence[str]) -> dict[Path, list]:
        """Each label file with the (label, values) to look for in it, so that it is read once."""
        files: dict[Path, list] = {}
        for label, organ in enumerate(organs, start=1):
            for path, values in self.masks.get(organ, ()):
                files.setdefault(path, []).append((label, values))
        return files


def find_cases(
    folder: str | Path, modality: str | None = None, layout: str | None = None
) -> list[Case]:
    """List the labelled cases of a folder, sorted by id.

    The layout is seen from what is in the folder unless given. modality "ct" or "mri" keeps those
    cases only. Raises DataError if the folder is missing, looks like two layouts, or holds no such
    case.
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
        held = cases[0].modality
        raise DataError(f"{root}: holds {held.upper()} scans only; give it with --{held}")
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
        if any(file for name in names for file in root.glob(f"*/segmentations/{name}.nii.gz"))
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
    # AMOS22's dataset.json has another form.
    if not (root / "dataset.json").is_file() or any(root.glob(f"images*/{AMOS_SCANS}")):
        return []
    modality, organs, known, ending = _read_dataset_json(root / "dataset.json")
    cases = []
    for scan in sorted((root / "imagesTr").glob("[!.]*")):
        if scan.name.endswith(f"_0000{ending}"):
            id_ = scan.name.removesuffix(f"_0000{ending}")
            label_file = root / "labelsTr" / f"{id_}{ending}"
            masks = {o: [(label_file, organs[o])] for o in ORGANS if o in organs}
            cases.append(Case("nnunet", str(root), id_, modality, "", scan, masks, known))
    return cases


def _read_dataset_json(file: Path) -> tuple[str, dict[str, tuple], tuple, str]:
    """Modality, label values by organ, all label values and the files' ending."""
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
    return "ct" if channels[0] == "ct" else "mri", organs, tuple(known), ending


LAYOUTS = {
    "totalsegmentator": _find_totalsegmentator,
    "amos": _find_amos,
    "nnunet": _find_nnunet,
}


def check_organs(labelled: Mapping[str, set[str]], organs: Sequence[str], partial: bool) -> None:
    """Raise DataError unless every folder labels all organs (partial: one folder each of them).

    labelled: folder → the organs of which it has masks.
    """
    union = set().union(*labelled.values())
    common = union.intersection(*labelled.values())
    if set(organs) <= (union if partial else common):
        return
    lists = [
        f"{name}: {', '.join(organ for organ in ORGANS if organ in its_organs) or 'none'}"
        for name, its_organs in labelled.items()
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
