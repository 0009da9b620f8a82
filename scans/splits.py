"""The split of a data set, from the table meta.csv that stands beside its scans."""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from scans.files import DataError
from scans.nifti import Problem

SPLITS = ("train", "val", "test")
WITHOUT = "without the file, a split is made by seed"


def read_splits(file: Path, ids: Collection[str]) -> tuple[dict[str, str], list[Problem]]:
    """{id: split} of the cases beside a table, "" for all if it has none; and what to tell of it.

    Raises DataError where the split of a case cannot be told: what is meant for the test would be
    trained on.
    """
    rows = _read_rows(file)
    unknown = sorted({split for _, split in rows} - {*SPLITS, ""})
    if unknown:
        raise DataError(f"{file}: split {unknown[0]!r} is none of train, val, test")
    named, here = Counter(name for name, _ in rows), Counter(map(_spelling, ids))
    if not named.keys() & here.keys():
        raise DataError(f"{file}: names none of the scans beside it; {WITHOUT}")
    splits = {id_: dict(rows).get(_spelling(id_), "") for id_ in ids}
    if any(split for _, split in rows):
        for what, wrong in (
            (
                "names more than once",
                [i for i in ids if max(named[_spelling(i)], here[_spelling(i)]) > 1],
            ),
            ("does not name", [i for i in ids if not named[_spelling(i)]]),
            ("has no split for", [i for i in ids if not splits[i]]),
        ):
            if wrong:
                more = f" and {len(wrong) - 1} more scans" if len(wrong) > 1 else ""
                raise DataError(
                    f"{file}: {what} {wrong[0]}{more} beside it; give each scan one row with its "
                    f"split, or take it out of the folder; {WITHOUT}"
                )
    missing = len(named.keys() - here.keys())
    what = f"names {missing} scans that are not in the folder"
    return splits, [Problem(file, what, "those that are there are used", True)] if missing else []


def _read_rows(file: Path) -> list[tuple[str, str]]:
    """The id, in one spelling, and the split of each row; raises DataError for another table."""
    try:
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        header = text.partition("\n")[0]
        delimiter = max(";,\t", key=header.count)
        # strict: a quotation mark without its partner would swallow rows
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
        columns = [name.strip().lower() for name in rows[0]]
        id_, split = columns.index("image_id"), columns.index("split")
        rows = [row for row in rows[1:] if any(cell.strip() for cell in row)]
        return [(_spelling(row[id_]), row[split].strip().lower()) for row in rows]
    except (OSError, csv.Error, ValueError, IndexError) as error:
        raise DataError(
            f"{file}: expected a table with the columns image_id and split ({error}); {WITHOUT}"
        ) from error


def _spelling(id_: str) -> str:
    """An id as all its spellings have it: "s1003" for 1003, S1003 and s1003.nii.gz."""
    name = id_.strip().lower().removesuffix(".gz").removesuffix(".nii")
    number = re.fullmatch(r"s?0*(\d+)", name)
    return f"s{number[1]}" if number else name
