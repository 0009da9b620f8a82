"""Splits: those of a data set, those by seed, and what a table must say."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import WAY_OUT, ids, write_scans

from scans.files import DataError
from scans.layouts import find_cases, split_cases


def test_the_split_of_the_data_set_is_honoured(ct_folder):
    parts = split_cases(find_cases(ct_folder), seed=1)
    assert ids(parts["train"]) == ["s0000", "s0001"]
    assert ids(parts["val"]) == ["s0002"]
    assert ids(parts["test"]) == ["s0003"]
    assert split_cases(find_cases(ct_folder), 1, test_elsewhere=True)["test"] == []


def test_other_cases_are_split_by_seed_and_id(tmp_path):
    cases = find_cases(write_scans(tmp_path, 40))
    parts = split_cases(cases, seed=1)
    assert [len(parts[p]) for p in ("train", "val", "test")] == [29, 3, 8]
    assert ids(case for part in parts.values() for case in part) == ids(cases)
    assert split_cases(cases[::-1], 1) == parts  # the order of reading does not matter
    assert ids(split_cases(cases, 2)["test"]) != ids(parts["test"])
    few = [split_cases(cases[:n], 1) for n in (1, 2, 3, 4)]
    assert [[len(p[s]) for s in ("train", "val", "test")] for p in few] == [
        [1, 0, 0],
        [2, 0, 0],
        [2, 0, 1],
        [2, 1, 1],
    ]


def test_no_case_of_a_folder_is_tested_on_where_the_test_is_elsewhere(tmp_path):
    cases = find_cases(write_scans(tmp_path, 40))
    parts = split_cases(cases, seed=1, test_elsewhere=True)
    assert [len(parts[p]) for p in ("train", "val", "test")] == [36, 4, 0]
    assert ids(parts["train"] + parts["val"]) == ids(cases)


def test_validation_is_carved_out_where_only_a_test_split_is_given(tmp_path):
    cases = find_cases(write_scans(tmp_path, 30, splits=["test"] * 5 + ["train"] * 25))
    parts = split_cases(cases, seed=3)
    assert ids(parts["test"]) == [f"s{i:04d}" for i in range(5)]
    assert [len(parts["train"]), len(parts["val"])] == [23, 2]


@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
@pytest.mark.parametrize("header", ["image_id;split", "Image_ID;Split", "age; IMAGE_ID ;x; SPLIT "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_the_split_is_read_whatever_the_table_looks_like(delimiter, header, encoding, tmp_path):
    columns = header.split(";")
    cells = {"image_id": "s000{}", "split": "{}", "age": "ä{}", "x": "{}"}
    rows = [header]
    for i, split in enumerate(["train", "Test", "val"]):
        values = {"image_id": i, "split": split, "age": i, "x": i}
        names = [name.strip().lower() for name in columns]
        rows.append(";".join(cells[name].format(values[name]) for name in names))
    text = "\n".join(rows).replace(";", delimiter)
    write_scans(tmp_path, 3)
    (tmp_path / "meta.csv").write_bytes(text.encode(encoding))
    assert [case.split for case in find_cases(tmp_path)] == ["train", "test", "val"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a table with the columns image_id and split"),
        ("id;split\ns0000;test", "expected a table with the columns image_id and split"),
        ("image_id;part\ns0000;test", "expected a table with the columns image_id and split"),
        ("image_id split\ns0000 test", "expected a table with the columns image_id and split"),
        ("image_id;split\ns0000", "expected a table with the columns image_id and split"),
        ("image_id;split\ns0000;holdout", "split 'holdout' is none of train, val, test"),
        ("image_id;split\ns9999;test", "names none of the scans beside it"),
        (f"image_id;split\ns0000;{'x' * 200_000}", "expected a table with the columns"),
    ],
)
def test_a_split_that_cannot_be_read_is_refused(content, message, tmp_path):
    write_scans(tmp_path, 1)
    (tmp_path / "meta.csv").write_text(content)
    with pytest.raises(DataError, match=f"meta.csv: {message}"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("s0000;train", "does not name s0001 and 1 more scans beside it"),
        ("s0000;train s0001;test", "does not name s0002 beside it"),
        ("s0000;train s0001;test s0003;test", "does not name s0002 beside it"),
        ("s0000;train s0001; s0002;test", "has no split for s0001 beside it"),
        ("s0000;train s0001;test s0002;test s0001;train", "names more than once s0001 beside it"),
        ("s0000;train s0001;test s0002;test 1;test", "names more than once s0001 beside it"),
        ("s0000;train s0001;test s0002_ct;test", "does not name s0002 beside it"),
    ],
)
def test_a_scan_without_a_split_of_its_own_is_refused(rows, what, tmp_path):
    write_scans(tmp_path, 3)
    (tmp_path / "meta.csv").write_text("image_id;split\n" + rows.replace(" ", "\n"))
    with pytest.raises(DataError, match=rf"meta.csv: {what}; {WAY_OUT}"):
        find_cases(tmp_path)


def test_a_quotation_mark_without_its_partner_is_refused(tmp_path):
    write_scans(tmp_path, 3)
    rows = ["image_id;age;split", 's0000;"50;train', "s0001;60;test", "s0002;70;test"]
    (tmp_path / "meta.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match="expected a table with the columns"):
        find_cases(tmp_path)
    rows[3] = 's0002;"70;test'  # its partner, of another row
    (tmp_path / "meta.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match="meta.csv: "):
        find_cases(tmp_path)
    rows = ["image_id;age;split", 's0000;"5;0";train', "s0001;60;test", "s0002;70;test"]
    (tmp_path / "meta.csv").write_text("\n".join(rows))
    assert [case.split for case in find_cases(tmp_path)] == ["train", "test", "test"]


@pytest.mark.parametrize("id_", ["s{:04d}", "S{:04d}", "{:04d}", "{}", "s{:04d}.nii.gz", " s{} "])
def test_ids_may_be_spelt_otherwise(id_, tmp_path):
    write_scans(tmp_path, 3)
    splits = ["train", "test", "val"]
    rows = [f"{id_.format(i)};{split}" for i, split in enumerate(splits)]
    (tmp_path / "meta.csv").write_text("\n".join(["image_id;split", *rows]))
    assert [case.split for case in find_cases(tmp_path)] == splits


def test_rows_without_a_folder_are_a_line_with_their_number(tmp_path):
    write_scans(tmp_path, 2, splits=["train", "test", "test", "val", "train"])
    cases = find_cases(tmp_path)
    assert [case.split for case in cases] == ["train", "test"]
    for case in cases:
        [remark] = case.remarks
        assert remark.usable
        assert str(remark).startswith(f"{tmp_path}/meta.csv: names 3 scans that are not in the")


def test_a_table_without_any_split_leaves_it_to_the_seed(tmp_path):
    write_scans(tmp_path, 3, splits=["", "", ""])
    cases = find_cases(tmp_path)
    assert [(case.split, case.remarks) for case in cases] == [("", ())] * 3
    (tmp_path / "meta.csv").unlink()
    assert find_cases(tmp_path) == cases


def test_a_table_in_capitals_is_one(tmp_path):
    write_scans(tmp_path, 2, splits=["train", "test"])
    (tmp_path / "meta.csv").rename(tmp_path / "Meta.CSV")
    assert [case.split for case in find_cases(tmp_path)] == ["train", "test"]


def test_a_table_that_a_link_no_longer_leads_to_is_refused(tmp_path):
    write_scans(tmp_path, 2)
    (tmp_path / "meta.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="meta.csv: expected a table .*No such file"):
        find_cases(tmp_path)


@st.composite
def folders(draw):
    """{id: split} of a TotalSegmentator folder whose meta.csv names all splits, or none."""
    ids = draw(st.sets(st.integers(0, 9999), min_size=1, max_size=25))
    splits = draw(st.sampled_from([["train", "val", "test"], ["train", "test"], [""], [None]]))
    return {f"s{i:04d}": draw(st.sampled_from(splits)) for i in sorted(ids)}


@given(folders(), st.integers(0, 10**6), st.booleans(), st.randoms())
@settings(max_examples=40, deadline=None)
def test_every_case_has_one_split_and_the_data_sets_own_is_kept(found, seed, elsewhere, draw):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for id_ in found:
            (root / id_).mkdir()
            (root / id_ / "mri.nii.gz").touch()
        rows = [f"{id_};{split}" for id_, split in found.items() if split is not None]
        if rows:
            draw.shuffle(rows)
            (root / "meta.csv").write_text("\n".join(["image_id;split", *rows]))
        cases = find_cases(root)
    assert [case.id for case in cases] == list(found)
    parts = split_cases(cases, seed, elsewhere)
    placed = [case.id for part in parts.values() for case in part]
    own_test = {id_ for id_, split in found.items() if split == "test"}
    assert sorted(placed) == sorted(found.keys() - (own_test if elsewhere else set()))
    where = {case.id: split for split, part in parts.items() for case in part}
    for id_, split in found.items():
        if split in ("val", "test") and id_ in where:
            assert where[id_] == split
        elif split == "train":
            others = set(found.values())
            assert where[id_] != "test" or "test" not in others
            assert where[id_] != "val" or "val" not in others
    shuffled = list(cases)
    draw.shuffle(shuffled)
    assert split_cases(shuffled, seed, elsewhere) == parts
