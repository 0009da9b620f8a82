"""The layouts on disk: which scans a folder holds, as downloaded, with their labels and split.

TotalSegmentator (CT or MRI), AMOS22 and nnU-Net's raw layout are told apart by what is in the
folder. No scan is opened here.

    from datasets import find_cases, split_cases
    cases = find_cases("Totalsegmentator_dataset_v201", "ct")
    parts = split_cases(cases, seed=42)  # {"train": [Case(…), …], "val": …, "test": …}
"""

import csv
import hashlib
import io
import json
import re
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
CHANNELS = {  # how the words of nnU-Net's channel names begin, by modality
    "ct": ("ct",),
    "mri": (
        *("mr", "t1", "t2", "pd", "flair", "dwi", "adc", "dixon", "stir", "spir", "haste", "vibe"),
        *("gre", "ssfp", "trufi", "water", "fat", "inphase", "outphase", "opposed"),
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
        raise DataError(f"{root}: holds {cases[0].modality.upper()} scans only, no {modality}")
    return kept


def _find_totalsegmentator(root: Path) -> list[Case]:
    scans = sorted([*root.glob("*/ct.nii.gz"), *root.glob("*/mri.nii.gz")])
    splits = _read_splits(root / "meta.csv") if scans else {}
    if splits and not any(scan.parent.name in splits for scan in scans):
        raise DataError(f"{root / 'meta.csv'}: names none of the scans beside it")
    labelled = {
        organ: names
        for organ, names in TOTALSEGMENTATOR_MASKS.items()
        if any(file for name in names for file in root.glob(f"*/segmentations/{name}.nii.gz"))
    }
    cases = []
    for scan in scans:
        id_, modality = scan.parent.name, scan.name.removesuffix(".nii.gz")
        masks: Masks = {
            organ: [(scan.parent / "segmentations" / f"{name}.nii.gz", ()) for name in names]
            for organ, names in labelled.items()
        }
        split = splits.get(id_, "")
        cases.append(Case("totalsegmentator", str(root), id_, modality, split, scan, masks))
    return cases


def _read_splits(file: Path) -> dict[str, str]:
    """{id: split} of a meta.csv, {} if there is none; raises DataError where it cannot be told."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    header = text.partition("\n")[0]
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=max(";,\t", key=header.count)))
        columns = [name.strip().lower() for name in rows[0]]
        id_, split = columns.index("image_id"), columns.index("split")
        splits = {row[id_].strip(): row[split].strip().lower() for row in rows[1:] if row}
    except (csv.Error, ValueError, IndexError) as error:
        raise DataError(
            f"{file}: expected a table with the columns image_id and split ({error}); without the "
            "file, a split is made by seed"
        ) from error
    unknown = sorted(set(splits.values()) - {*SPLITS, ""})
    if unknown:
        raise DataError(f"{file}: split {unknown[0]!r} is none of train, val, test")
    return splits


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
        dataset = json.loads(file.read_text(encoding="utf-8-sig"))
        channels = [str(name) for name in dataset["channel_names"].values()]
        known: list[int] = []
        organs: dict[str, tuple[int, ...]] = {}
        for name, value in dataset["labels"].items():
            values = tuple(int(v) for v in np.atleast_1d(value))
            organ = ORGAN_OF_NAME.get(name.lower().replace("_", " "))
            if organ:
                organs[organ] = organs.get(organ, ()) + values
                if min(values) < 1 or max(values) > 65535:
                    raise ValueError(f"label {name} is {values}, expected 1 to 65535")
            known += values
        ending = str(dataset["file_ending"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{file}: expected nnU-Net's channel_names, labels and file_ending "
            f"({type(error).__name__}: {error})"
        ) from error
    if len(channels) != 1:
        raise DataError(
            f"{file}: has {len(channels)} channels; expected one, CT or an MRI sequence"
        )
    words = re.findall("[a-z]+[0-9]*", channels[0].lower())
    found = {m for m, starts in CHANNELS.items() for w in words if w.startswith(starts)}
    if len(found) != 1 or "pet" in words:
        raise DataError(
            f"{file}: is channel {channels[0]!r} CT or MRI? Name it CT, MRI or by its sequence, T2 "
            "for instance"
        )
    return found.pop(), organs, tuple(known), ending


LAYOUTS = {
    "totalsegmentator": _find_totalsegmentator,
    "amos": _find_amos,
    "nnunet": _find_nnunet,
}


def check_organs(labelled: Mapping[str, set[str]], organs: Sequence[str], partial: bool) -> None:
    """Raise DataError unless every folder labels all organs.

    Partial: each folder one of them, and each organ by one folder. labelled: folder → the organs of
    which it has masks.
    """
    union, common = set.union(*labelled.values()), set.intersection(*labelled.values())
    usable = [organ for organ in ORGANS if organ in (union if partial else common)]
    idle = [folder for folder, its_organs in labelled.items() if not its_organs & set(organs)]
    if set(organs) <= set(usable) and not idle:
        return
    held = "; ".join(
        f"{name}: {', '.join(organ for organ in ORGANS if organ in its_organs) or 'none'}"
        for name, its_organs in labelled.items()
    )
    if partial and idle:
        raise DataError(f"{idle[0]}: labels none of {', '.join(organs)} ({held}); leave it out")
    advice = [f"--organs {' '.join(usable)}"] if usable else []
    if not partial and set(organs) <= union:
        advice.append("--partial-labels, and each hospital trains on the organs that it has")
    raise DataError(
        f"not {'one folder' if partial else 'every folder'} labels {', '.join(organs)} ({held}); "
        f"use {' or '.join(advice) or 'folders that share an organ'}"
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
