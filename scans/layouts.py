"""The layouts on disk: which scans a folder holds, as downloaded, with their labels and split.

TotalSegmentator (CT or MRI), AMOS22 and nnU-Net's raw layout are told apart by what is in the
folder. No scan is opened here.
"""

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scans import nnunet
from scans.files import DataError, listed, names_in, reading
from scans.organs import AMOS, ORGANS, check_apart, match, spelling

MODALITIES = ("ct", "mri")
SPLITS = ("train", "val", "test")
ADVICE = "without the file, a split is made by seed"

# organ → the files that hold it, each with the label values that mean it; no values: any > 0.5
Masks = dict[str, list[tuple[Path, tuple[int, ...]]]]


class Case(NamedTuple):
    """One scan as it lies on disk."""

    folder: str  # the hospital's folder; ids are unique within it only
    id: str
    modality: str  # "ct" or "mri"
    split: str  # "train", "val" or "test" where the data set says so, else ""
    image: Path
    masks: Masks
    values: tuple[int, ...] = ()  # all values that the data set lists; empty for binary masks
    structures: tuple[str, ...] = ()  # all that its folder labels, in the folder's own spelling
    warnings: tuple[str, ...] = ()  # about its folder

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
    split: bool = True,
) -> list[Case]:
    """List the labelled cases of a folder, sorted by id, with the masks of these organs.

    Unless `layout` is given, the content of the folder decides it. `modality` keeps only the cases
    of this modality, and is that of a data set that does not name its own. A case that lacks a file
    is listed too, and reading it names the file. With split=False no meta.csv is read. Raises
    DataError if the folder is missing, looks like two layouts, or holds no such case.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: {'is not a folder' if root.exists() else 'no such folder'}")
    finders = {layout: LAYOUTS[layout]} if layout else LAYOUTS
    found = {name: list(find(root, organs, modality)) for name, find in finders.items()}
    found = {name: cases for name, cases in found.items() if cases}
    if len(found) > 1:
        raise DataError(f"{root}: looks like {' and '.join(found)}; say which with --layout")
    if not found:
        raise DataError(
            f"{root}: no {layout or 'labelled'} case found; expected sNNNN/ct.nii.gz or "
            "sNNNN/mri.nii.gz (TotalSegmentator), imagesTr/amos_NNNN.nii.gz (AMOS22), or "
            "dataset.json with imagesTr/ and labelsTr/ (nnU-Net raw); DICOM must be converted first"
        )
    [(name, cases)] = found.items()
    cases = sorted(cases, key=lambda case: (case.id, case.modality))
    kept = [case for case in cases if modality in (None, case.modality)]
    if not kept:
        raise DataError(f"{root}: holds {cases[0].modality.upper()} scans only, no {modality}")
    ids = Counter((case.id, case.modality) for case in kept)
    twice = [id_ for (id_, _), n in ids.items() if n > 1]
    if twice:
        raise DataError(f"{root}: two cases have the id {twice[0]}; rename or remove one of them")
    splits, warnings = read_splits(root, {c.id for c in kept}, name) if split else ({}, [])
    more = (*warnings, *_warn_of_unread(root, cases, name))
    return [c._replace(split=splits.get(c.id, c.split), warnings=c.warnings + more) for c in kept]


def _warn_of_unread(root: Path, cases: Sequence[Case], layout: str) -> list[str]:
    """Warnings of what lies beside the cases of a folder and is not read."""
    unread = {"splits_final.json": "a meta.csv gives the split"}
    unread["labelsTs"] = "a meta.csv can give cases in imagesTr and labelsTr to the test"
    warnings = [f"{root}/{k}: not read; {v}" for k, v in unread.items() if (root / k).exists()]
    used = {f for case in cases for f in (case.image, *case.label_files(tuple(case.masks)))}
    folders = {file.parent for file in used}
    if layout == "totalsegmentator":  # which looks at masks itself
        folders = {root, *(f for f in names_in(root).values() if os.access(f, os.R_OK))}
    there = [f for folder in folders for f in names_in(folder).values() if f not in used]
    odd = sorted(f for f in there if re.search(r"(?<!segmentations)\.nii", f.name.lower()))
    if odd:
        warnings.append(f"{listed(odd)}: not read, because the layout has no such names")
    return warnings


def _totalsegmentator(root: Path, organs: Sequence[str], modality: str | None) -> Iterator[Case]:
    folders = names_in(root)
    scans = _totalsegmentator_scans(folders)
    files = {id_: names_in(folders[id_] / "segmentations") for id_, _ in scans}
    names = {name for own in files.values() for name in own if name.endswith(".nii.gz")}
    labelled = {name.removesuffix(".nii.gz") for name in names}
    odd = [f for own in files.values() for f in own.values() if f.suffix == ".nii"]
    whole = "segmentations.nii*"  # all organs in a file, which TotalSegmentator can write
    odd += [f for id_, own in files.items() if not own for f in folders[id_].glob(whole)]
    what = "not read, because masks are sNNNN/segmentations/<organ>.nii.gz"
    warnings = (f"{listed(odd)}: {what}",) if odd else ()
    found = match(organs, sorted(labelled))
    check_apart(root, dict.fromkeys(labelled, ()), found)
    wanted = {o: [f"{name}.nii.gz" for name in found[o]] for o in found}
    for id_, kind in scans:
        image, folder = folders[id_] / f"{kind}.nii.gz", folders[id_] / "segmentations"
        own, structures = files[id_], tuple(sorted(labelled))
        masks: Masks = {o: [(own.get(f, folder / f), ()) for f in wanted[o]] for o in wanted}
        yield Case(str(root), id_, kind, "", image, masks, (), structures, warnings)


def _totalsegmentator_scans(folders: Mapping[str, Path]) -> list[tuple[str, str]]:
    """(id, modality) of each scan that is in a folder, or should be by what else is there."""
    scans, without = [], []
    for id_, folder in folders.items():
        looks_like_one = re.fullmatch(r"s\d{4}", id_)
        if not (looks_like_one or os.access(folder, os.R_OK)):
            continue  # not a case: lost+found, for instance
        names = names_in(folder)
        kinds = [kind for kind in MODALITIES if f"{kind}.nii.gz" in names]
        scans += [(id_, kind) for kind in kinds]
        if not kinds and ("segmentations" in names or looks_like_one):
            without.append(id_)
    return scans + [(id_, scans[0][1]) for id_ in without if scans]


def _amos(root: Path, organs: Sequence[str], modality: str | None) -> Iterator[Case]:
    if not any(_amos_names(root / part) for part in ("imagesTr", "imagesVa")):
        return
    for part, split in (("Tr", "train"), ("Va", "val")):
        images, labels = root / f"images{part}", root / f"labels{part}"
        for name in {*_amos_names(images), *_amos_names(labels)}:
            id_ = name.removesuffix(".nii.gz")
            kind = "mri" if int(id_[-4:]) > 500 else "ct"
            # Nobody has outlined bladder and prostate in MRI.
            values = {organ: (n,) for n, organ in AMOS.items() if kind == "ct" or n < 14}
            check_apart(root, values, match(organs, values))
            masks, known = _label_map(labels / name, values, organs), (0, *AMOS)
            yield Case(str(root), id_, kind, split, images / name, masks, known, tuple(values))


def _amos_names(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if re.fullmatch(r"amos_\d{4}\.nii\.gz", name)]


def _label_map(file: Path, values: Mapping[str, tuple[int, ...]], organs: Sequence[str]) -> Masks:
    """The organs that are in a label map; values: {structure: those that mean it}."""
    found = match(organs, values)
    return {organ: [(file, sum((values[n] for n in found[organ]), ()))] for organ in found}


def _nnunet(root: Path, organs: Sequence[str], modality: str | None) -> Iterator[Case]:
    file = root / "dataset.json"
    is_amos = any(_amos_names(root / f"images{part}") for part in ("Tr", "Va", "Ts"))
    if is_amos or not file.exists():  # AMOS22's dataset.json has another form
        return
    channels, labels, ending = nnunet.read_dataset_json(file, organs)
    kind = nnunet.modality_of(file, channels, modality)
    values = {name: v for name, v in labels.items() if spelling(name) != "background"}
    check_apart(file, values, match(organs, values))
    known, files = sum(labels.values(), ()), nnunet.find_files(root, ending)
    unlikely = nnunet.warn_of_parts(values, organs) + nnunet.warn_of_lists(file, len(files))
    warnings = tuple(f"{file}: {warning}" for warning in unlikely)
    for id_, (image, label_file) in files.items():
        masks = _label_map(label_file, values, organs)
        yield Case(str(root), id_, kind, "", image, masks, known, tuple(values), warnings)


LAYOUTS = {"totalsegmentator": _totalsegmentator, "amos": _amos, "nnunet": _nnunet}


def read_splits(root: Path, ids: Collection[str], layout: str) -> tuple[dict[str, str], list[str]]:
    """{id: split} by the table meta.csv beside the scans, empty without one, and warnings.

    Raises DataError where the split of a case is unclear, because a test case might be trained on.
    A table without the two columns is an error in TotalSegmentator's layout, else a warning.
    """
    files = [path for name, path in names_in(root).items() if name.lower() == "meta.csv"]
    tables = {file: _read_rows(file) for file in files}
    foreign = [file for file, rows in tables.items() if rows is None]
    if foreign and layout == "totalsegmentator":
        raise DataError(f"{foreign[0]}: has no columns image_id and split; {ADVICE}")
    warnings = [f"{f}: not read, because it has no columns image_id and split" for f in foreign]
    rows = [row for rows in tables.values() for row in rows or ()]
    if not any(split for _, split in rows):
        return {}, warnings
    keys, split_of = {id_: _spelling(id_) for id_ in sorted(ids)}, dict(rows)
    n_rows, n_scans = Counter(key for key, _ in rows), Counter(keys.values())
    unclear = {key for key in n_scans if n_rows[key] != 1 or split_of[key] not in SPLITS}
    wrong = [id_ for id_, key in keys.items() if key in unclear or n_scans[key] > 1]
    if wrong:
        what = "must name each scan in one row, with the split train, val or test, but does not"
        raise DataError(f"{files[0]}: {what} for {listed(wrong)}; {ADVICE}")
    return {id_: split_of[key] for id_, key in keys.items()}, warnings


def _read_rows(file: Path) -> list[tuple[str, str]] | None:
    """The id, in one spelling, and the split of each row; None without these columns."""
    with reading(file):
        text = file.read_text(encoding="utf-8-sig", errors="replace").lower()
        delimiter = max(";,\t", key=text.partition("\n")[0].count)
        # strict: a quotation mark without its partner would swallow rows
        rows = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True, restval="")
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        if not {"image_id", "split"} <= set(rows.fieldnames):
            return None
        if max(map(rows.fieldnames.count, ("image_id", "split"))) > 1:
            raise ValueError("it has the column image_id or split twice")
        return [(_spelling(row["image_id"]), row["split"].strip()) for row in rows]


def _spelling(id_: str) -> str:
    """The form that all spellings of an id share: "s1003" for 1003, S1003 and s1003.nii.gz."""
    name = unicodedata.normalize("NFC", id_.strip().lower())
    name = name.removesuffix(".gz").removesuffix(".nii")
    number = re.fullmatch(r"s?0*(\d+)", name)
    return f"s{number[1]}" if number else name


def split_cases(
    cases: Sequence[Case], seed: int, test_elsewhere: bool = False
) -> dict[str, list[Case]]:
    """Divide one folder's cases into "train", "val" and "test", by its own split where it has one.

    Other cases are put in an order that depends on seed and id alone; a fifth of them goes to test
    (none with test_elsewhere) and a tenth of the training cases to validation, at least one of each
    once there are three. Of a folder's own split, a part that is missing, test or validation, is
    carved out of the training cases in the same way.
    """
    order = sorted(cases, key=lambda c: hashlib.sha256(os.fsencode(f"{seed}/{c.id}")).digest())
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
