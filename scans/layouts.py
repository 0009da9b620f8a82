"""The layouts on disk: which scans a folder holds, as downloaded, with their labels and split.

TotalSegmentator (CT or MRI), AMOS22 and nnU-Net's raw layout are told apart by what is in the
folder. No scan is opened here.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scans import nnunet
from scans.files import DataError, listed, names_in, reading
from scans.organs import AMOS, ORGANS, check_apart, match

MODALITIES = ("ct", "mri")
SPLITS = ("train", "val", "test")
TOTALSEGMENTATOR_CASE = re.compile(r"s\d{4}")
KIDNEYS = {"kidney_left", "kidney_right"}
AMOS_CASE = re.compile(r"amos_\d{4}\.nii\.gz")
WITHOUT = "without the file, a split is made by seed"

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
) -> list[Case]:
    """List the labelled cases of a folder, sorted by id, with the masks of these organs.

    The layout is seen from what is in the folder unless given. modality "ct" or "mri" keeps those
    cases only, and says what a data set is that does not say so itself. A case of which a file is
    missing is listed too: reading it names the file. Raises DataError if the folder is missing,
    looks like two layouts, or holds no such case.
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
            "dataset.json with imagesTr/ and labelsTr/ (nnU-Net raw); DICOM must be converted first"
        )
    [cases] = found.values()
    kept = [case for case in cases if modality in (None, case.modality)]
    if not kept:
        raise DataError(f"{root}: holds {cases[0].modality.upper()} scans only, no {modality}")
    for (id_, _), n in Counter((case.id, case.modality) for case in kept).items():
        if n > 1:
            raise DataError(f"{root}: two cases have the id {id_}; rename or remove one of them")
    return kept


# -------------------------------------------------------------------------------- TotalSegmentator


def _find_totalsegmentator(root: Path, organs: Sequence[str], modality: str | None) -> list[Case]:
    scans = _totalsegmentator_scans(root)
    splits = read_splits(root, [id_ for id_, _ in scans]) if scans else {}
    labelled = set()
    for id_, _ in scans:
        names = names_in(root / id_ / "segmentations")
        labelled |= {name.removesuffix(".nii.gz") for name in names if name.endswith(".nii.gz")}
    if labelled & KIDNEYS:
        labelled |= KIDNEYS
    found = match(organs, sorted(labelled))
    check_apart(root, dict.fromkeys(labelled, ()), found)
    cases = []
    for id_, kind in scans:
        image, folder = root / id_ / f"{kind}.nii.gz", root / id_ / "segmentations"
        masks: Masks = {o: [(folder / f"{name}.nii.gz", ()) for name in found[o]] for o in found}
        case = Case(str(root), id_, kind, splits.get(id_, ""), image, masks)
        cases.append(case._replace(structures=tuple(sorted(labelled))))
    return cases


def _totalsegmentator_scans(root: Path) -> list[tuple[str, str]]:
    """(id, modality) of each scan that is in a folder, or should be by what else is there."""
    scans, without = [], []
    for id_, folder in names_in(root).items():
        looks_like_one = TOTALSEGMENTATOR_CASE.fullmatch(id_)
        try:
            names = names_in(folder)
        except PermissionError:
            if looks_like_one:
                raise
            continue  # somebody else's
        found = [kind for kind in MODALITIES if f"{kind}.nii.gz" in names]
        scans += [(id_, kind) for kind in found]
        if not found and ("segmentations" in names or looks_like_one):
            without.append(id_)
    return sorted(scans + [(id_, scans[0][1]) for id_ in without if scans])


def read_splits(root: Path, ids: Sequence[str]) -> dict[str, str]:
    """{id: split} by the table meta.csv beside the scans; empty without one.

    Raises DataError where the split of a case cannot be told, because a case that is meant for the
    test would be trained on.
    """
    files = [path for name, path in names_in(root).items() if name.lower() == "meta.csv"]
    if not files:
        return {}
    [file] = files
    rows = _read_rows(file)
    if not any(split for _, split in rows):
        return {}
    n_rows, n_scans = Counter(name for name, _ in rows), Counter(map(_spelling, ids))
    problems = {
        "names more than once": [
            i for i in ids if max(n_rows[_spelling(i)], n_scans[_spelling(i)]) > 1
        ],
        "gives no split (train, val or test) to": [
            i for i in ids if dict(rows).get(_spelling(i)) not in SPLITS
        ],
    }
    for what, wrong in problems.items():
        if wrong:
            raise DataError(f"{file}: {what} {listed(wrong)}; give each scan one row; {WITHOUT}")
    return {id_: dict(rows)[_spelling(id_)] for id_ in ids}


def _read_rows(file: Path) -> list[tuple[str, str]]:
    """The id, in one spelling, and the split of each row."""
    with reading(file):
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        delimiter = max(";,\t", key=text.partition("\n")[0].count)
        # strict: a quotation mark without its partner would swallow rows
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
        columns = [name.strip().lower() for name in rows[0]]
        id_, split = columns.index("image_id"), columns.index("split")
        filled = [row for row in rows[1:] if any(cell.strip() for cell in row)]
        return [(_spelling(row[id_]), row[split].strip().lower()) for row in filled]


def _spelling(id_: str) -> str:
    """The form that all spellings of an id share: "s1003" for 1003, S1003 and s1003.nii.gz."""
    name = id_.strip().lower().removesuffix(".gz").removesuffix(".nii")
    number = re.fullmatch(r"s?0*(\d+)", name)
    return f"s{number[1]}" if number else name


# ------------------------------------------------------------------------ AMOS22, and nnU-Net raw


def _find_amos(root: Path, organs: Sequence[str], modality: str | None) -> list[Case]:
    cases: list[Case] = []
    if not any(_amos_names(root, part) for part in ("imagesTr", "imagesVa")):
        return cases
    for part, split in (("Tr", "train"), ("Va", "val")):
        images, labels = root / f"images{part}", root / f"labels{part}"
        for name in sorted({*_amos_names(root, images.name), *_amos_names(root, labels.name)}):
            id_ = name.removesuffix(".nii.gz")
            kind = "mri" if int(id_[-4:]) > 500 else "ct"
            # Nobody has drawn bladder and prostate in MRI.
            numbers = {o: n for n, o in AMOS.items() if kind == "ct" or n < 14}
            found = match(organs, numbers)
            masks = {o: [(labels / name, tuple(numbers[n] for n in found[o]))] for o in found}
            values, image = (0, *AMOS), images / name
            cases.append(Case(str(root), id_, kind, split, image, masks, values, tuple(numbers)))
    return sorted(cases, key=lambda case: case.id)


def _amos_names(root: Path, folder: str) -> Iterable[str]:
    return [name for name in names_in(root / folder) if AMOS_CASE.fullmatch(name)]


def _find_nnunet(root: Path, organs: Sequence[str], modality: str | None) -> list[Case]:
    file = root / "dataset.json"
    is_amos = any(_amos_names(root, f"images{part}") for part in ("Tr", "Va", "Ts"))
    if is_amos or not file.exists():  # AMOS22's dataset.json has another form
        return []
    channels, labels, ending = nnunet.read_dataset_json(file, organs)
    kind = nnunet.modality_of(file, channels, modality)
    structures = {name: v for name, v in labels.items() if nnunet.is_structure(name)}
    found = match(organs, structures)
    check_apart(file, structures, found)
    values_of = {o: tuple(v for name in found[o] for v in structures[name]) for o in found}
    known = tuple(value for values in labels.values() for value in values)
    warnings = [f"{file}: {warning}" for warning in nnunet.warn_of_parts(structures, found)]
    cases = []
    for id_, (image, label_file) in nnunet.find_files(root, ending).items():
        masks: Masks = {organ: [(label_file, values)] for organ, values in values_of.items()}
        case = Case(str(root), id_, kind, "", image, masks, known, tuple(structures))
        cases.append(case._replace(warnings=tuple(warnings)))
    return cases


LAYOUTS = {
    "totalsegmentator": _find_totalsegmentator,
    "amos": _find_amos,
    "nnunet": _find_nnunet,
}


# ------------------------------------------------------------------------------------------ splits


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
