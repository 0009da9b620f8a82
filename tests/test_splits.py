"""Splits: those of a data set, those by seed, and what a table must say."""

import tempfile
from pathlib import Path

import pytest
from conftest import save, write_amos, write_nnunet
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import NOTHING, ids, write_scans

from scans.files import DataError
from scans.layouts import SPLITS, find_cases, split_cases


def test_the_split_of_the_data_set_is_honoured(ct_folder, tmp_path):
    parts = split_cases(find_cases(ct_folder), seed=1)
    assert [ids(parts[p]) for p in SPLITS] == [["s0000", "s0001"], ["s0002"], ["s0003"]]
    assert split_cases(find_cases(ct_folder), 1, test_elsewhere=True)["test"] == []
    cases = find_cases(write_scans(tmp_path, 30, splits=["test"] * 5 + ["train"] * 25))
    parts = split_cases(cases, seed=3)
    assert ids(parts["test"]) == [f"s{i:04d}" for i in range(5)]
    assert [len(parts[p]) for p in SPLITS] == [23, 2, 5]  # validation is carved out


def test_other_cases_are_split_by_seed_and_id(tmp_path):
    cases = find_cases(write_scans(tmp_path, 40))
    parts = split_cases(cases, seed=1)
    assert [len(parts[p]) for p in SPLITS] == [29, 3, 8]
    assert ids(case for part in parts.values() for case in part) == ids(cases)
    assert split_cases(cases[::-1], 1) == parts  # the order of reading does not matter
    assert ids(split_cases(cases, 2)["test"]) != ids(parts["test"])
    parts = split_cases(cases, 1, test_elsewhere=True)
    assert [len(parts[p]) for p in SPLITS] == [36, 4, 0]
    assert ids(parts["train"] + parts["val"]) == ids(cases)
    few = [split_cases(cases[:n], 1) for n in (1, 2, 3, 4)]
    sizes = [[len(parts[p]) for p in SPLITS] for parts in few]
    assert sizes == [[1, 0, 0], [2, 0, 0], [2, 0, 1], [2, 1, 1]]


def test_a_folder_whose_name_is_no_utf_8_has_a_split(tmp_path):
    cases = find_cases(write_scans(tmp_path, 9))
    odd = [case._replace(id=f"caf\udce9{case.id}") for case in cases]
    assert [len(split_cases(odd, 1)[split]) for split in SPLITS] == [7, 1, 1]


def test_without_a_test_split_of_its_own_a_fifth_of_the_training_cases_is_tested_on(tmp_path):
    """AMOS22 as a hospital: Tr and Va, and nothing else."""
    cases = find_cases(write_scans(tmp_path, 12, splits=["train"] * 10 + ["val"] * 2))
    parts = split_cases(cases, seed=1)
    assert [len(parts[split]) for split in SPLITS] == [8, 2, 2]
    assert {case.split for case in parts["test"]} == {"train"}


@pytest.mark.parametrize("header", ["image_id;split;Split", "image_id;split;split", "a;split;a"])
def test_a_column_that_is_there_twice_is_refused(header, tmp_path):
    """The last one would count, and test cases might be trained on."""
    root = write_scans(tmp_path, 3)
    rows = "".join(f"s000{i};test;train\n" for i in range(3))
    (root / "meta.csv").write_text(
        f"{header}\n{rows}".replace("a;", "image_id;").replace(";a", ";image_id")
    )
    with pytest.raises(DataError, match="meta.csv: .* has the column image_id or split twice"):
        find_cases(root)


def test_where_no_split_is_needed_no_table_is_read(tmp_path):
    root = write_scans(tmp_path, 3, splits=["train", "val", "test"])
    (root / "meta.csv").write_text("image_id,split\ns0000,train\n")  # of two new patients, none
    with pytest.raises(DataError, match="must name each scan in one row"):
        find_cases(root)
    assert ids(find_cases(root, split=False)) == ["s0000", "s0001", "s0002"]


@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
@pytest.mark.parametrize(
    ("header", "row"),
    [("Image_ID;Split", "{};{}"), ("age; IMAGE_ID ;x; SPLIT ", 'ä;{};"in ""quotes""; so";{}')],
)
def test_a_split_is_read_whatever_the_table_looks_like(header, row, delimiter, encoding, tmp_path):
    ids = [case.id for case in find_cases(write_scans(tmp_path, 3))]
    rows = [row.format(*cells) for cells in zip(ids, ("train", "Test", "val"), strict=True)]
    text = "\n".join([header, *rows]).replace(";", delimiter)
    (tmp_path / "Meta.CSV").write_bytes(text.encode(encoding))
    assert [case.split for case in find_cases(tmp_path)] == ["train", "test", "val"]


def write_table(root, content):
    """A meta.csv; its rows are separated by blanks."""
    (root / "meta.csv").write_text(content.replace(" ", "\n"))
    return root


@pytest.mark.parametrize(
    "content", ["", "id;split s0000;test", "image_id;part s0000;test", "image_id|split s0000|test"]
)
def test_a_table_without_the_two_columns_is_refused(content, tmp_path):
    write_table(write_scans(tmp_path, 1), content)
    with pytest.raises(DataError, match="meta.csv: has no columns image_id and split; without"):
        find_cases(tmp_path)
    (tmp_path / "meta.csv").rename(tmp_path / "gone.csv")
    (tmp_path / "meta.csv").symlink_to("elsewhere.csv")
    with pytest.raises(DataError, match="meta.csv: cannot be read .*No such file"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        's0000;"50;train s0001;60;test s0002;70;test',
        's0000;"50;train s0001;60;test s0002;"70;test',  # its partner, of another row
        f"s0000;{'x' * 200_000};train s0001;60;test s0002;70;test",
    ],
)
def test_a_table_whose_rows_are_unclear_is_refused(rows, tmp_path):
    write_table(write_scans(tmp_path, 3), f"image_id;age;split {rows}")
    with pytest.raises(DataError, match="meta.csv: cannot be read"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("rows", "unclear"),
    [
        ("s0000;train", "s0001, s0002"),
        ("s0000;train s0001;test", "s0002"),
        ("s0000;train s0001;test s0003;test", "s0002"),
        ("s0000;train s0001; s0002;test", "s0001"),
        ("s0000;train s0001 s0002;test", "s0001"),
        ("s0000;train s0001;holdout s0002;test", "s0001"),
        ("s0000;train s0001;test s0002;test s0001;train", "s0001"),
        ("s0000;train s0001;test s0002;test 1;test", "s0001"),
        ("s0000;train s0001;test s0002_ct;test", "s0002"),
        ("s9999;test", "s0000, s0001, s0002"),
    ],
)
def test_a_scan_without_a_split_of_its_own_is_refused(rows, unclear, tmp_path):
    write_table(write_scans(tmp_path, 3), f"image_id;split {rows}")
    message = rf"meta.csv: must name each scan in one row, .* for {unclear}; without the file, a"
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path)


def test_the_scans_of_a_folder_share_its_row_and_those_of_two_do_not(tmp_path):
    write_scans(tmp_path, 2, splits=["train", "test"])
    save(tmp_path / "s0000/ct.nii.gz", NOTHING)
    found = [(case.id, case.modality, case.split) for case in find_cases(tmp_path)]
    assert found == [("s0000", "ct", "train"), ("s0000", "mri", "train"), ("s0001", "mri", "test")]
    save(tmp_path / "s1/mri.nii.gz", NOTHING)
    with pytest.raises(DataError, match="meta.csv: must name each scan .* for s0001, s1; "):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("write", "ids", "own"),
    [
        (write_nnunet, ["case_000", "case_001", "case_002"], ["", "", ""]),
        (write_amos, ["amos_0001", "amos_0002", "amos_0003"], ["train", "val", "val"]),
    ],
)
def test_a_table_gives_the_split_in_any_layout(write, ids, own, tmp_path):
    """By patient, for instance: the first two scans are of one, and both are tested on."""
    write(tmp_path, "mri" if write == write_nnunet else "ct", 3)
    rows = " ".join(f"{id_.upper()}.nii.gz;{{}}" for id_ in ids)

    def splits(*wanted):
        write_table(tmp_path, f"image_id;split {rows.format(*wanted)}")
        cases = find_cases(tmp_path)
        assert [case.warnings for case in cases] == [()] * 3
        return [case.split for case in cases]

    assert splits("test", "test", "train") == ["test", "test", "train"]
    assert splits("", "", "") == own
    with pytest.raises(DataError, match=f"meta.csv: must name each scan .* for {ids[1]}; without"):
        splits("test", "", "train")
    write_table(tmp_path, "patient;age 1;40")  # somebody else's
    for case, split in zip(find_cases(tmp_path), own, strict=True):
        assert case.split == split
        [warning] = case.warnings
        assert (
            warning
            == f"{tmp_path}/meta.csv: not read, because it has no columns image_id and split"
        )


def test_a_table_names_the_scans_of_the_modality_that_is_asked_for(tmp_path):
    write_amos(write_amos(tmp_path, "ct", 2), "mri", 2)
    write_table(tmp_path, "image_id;split amos_0501;test amos_0502;train")
    assert [case.split for case in find_cases(tmp_path, "mri")] == ["test", "train"]
    with pytest.raises(DataError, match="for amos_0001, amos_0002; without"):
        find_cases(tmp_path)


@pytest.mark.parametrize("id_", ["s{:04d}", "S{:04d}", "{:04d}", "{}", "s{:04d}.nii.gz", " s{} "])
def test_ids_may_be_spelt_otherwise(id_, tmp_path):
    write_scans(tmp_path, 3)
    splits = ["train", "test", "val"]
    rows = [f"{id_.format(i)};{split}" for i, split in enumerate(splits)]
    (tmp_path / "meta.csv").write_text("\n".join(["image_id;split", *rows]))
    assert [case.split for case in find_cases(tmp_path)] == splits


def test_a_table_without_any_split_leaves_it_to_the_seed(tmp_path):
    write_scans(tmp_path, 3, splits=["", "", ""])
    cases = find_cases(tmp_path)
    assert [(case.split, case.warnings) for case in cases] == [("", ())] * 3
    (tmp_path / "meta.csv").unlink()
    assert find_cases(tmp_path) == cases


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
