"""Layouts on disk: which scans a folder holds, where their labels are, and how they are split."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import save, write_amos, write_nnunet, write_totalsegmentator
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import DataError, check_organs, find_cases, split_cases

WRITERS = {
    "totalsegmentator": write_totalsegmentator,
    "amos": write_amos,
    "nnunet": write_nnunet,
}


def ids(cases):
    return sorted(case.id for case in cases)


def write_scans(root, n, splits=()):
    """TotalSegmentator's layout without labels; splits: what meta.csv says of the first cases."""
    for i in range(n):
        save(root / f"s{i:04d}" / "mri.nii.gz", np.zeros((2, 2, 2), np.float32))
    if splits:
        rows = ["image_id;split", *(f"s{i:04d};{split}" for i, split in enumerate(splits))]
        (root / "meta.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return root


# ---------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_each_layout_is_told_from_what_the_folder_holds(layout, modality, tmp_path):
    WRITERS[layout](tmp_path, modality, 2)
    cases = find_cases(tmp_path)
    assert [case.layout for case in cases] == [layout] * 2
    assert [case.modality for case in cases] == [modality] * 2
    assert [case.folder for case in cases] == [str(tmp_path)] * 2
    assert find_cases(tmp_path, modality) == find_cases(tmp_path, layout=layout) == cases
    other = {"ct": "mri", "mri": "ct"}[modality]
    message = f"holds {modality.upper()} scans only, no"
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path, other)


def test_totalsegmentators_files(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 2, splits=["val"], organs=["kidneys", "spleen"])
    first, second = find_cases(tmp_path)
    masks = tmp_path / "s0000/segmentations"
    assert (first.id, first.split, first.image) == ("s0000", "val", tmp_path / "s0000/ct.nii.gz")
    assert first.masks == {
        "kidneys": [(masks / "kidney_left.nii.gz", ()), (masks / "kidney_right.nii.gz", ())],
        "spleen": [(masks / "spleen.nii.gz", ())],
    }
    assert (second.id, second.split, second.values) == ("s0001", "", ())


def test_a_mask_that_one_case_lacks_is_still_expected_of_it(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 2, organs=["liver"])
    (tmp_path / "s0000/segmentations/liver.nii.gz").unlink()
    for case in find_cases(tmp_path):
        path = tmp_path / case.id / "segmentations/liver.nii.gz"
        assert case.masks["liver"] == [(path, ())]


def test_a_folder_may_hold_both_modalities(tmp_path):
    for i, modality in enumerate(["mri", "ct", "ct"]):
        save(tmp_path / f"s{i:04d}" / f"{modality}.nii.gz", np.zeros((2, 2, 2), np.float32))
    assert ids(find_cases(tmp_path)) == ["s0000", "s0001", "s0002"]
    assert ids(find_cases(tmp_path, "ct")) == ["s0001", "s0002"]
    assert ids(find_cases(tmp_path, "mri")) == ["s0000"]


def test_amos_files(tmp_path):
    write_amos(tmp_path, "ct", 2)
    write_amos(tmp_path, "mri", 1)
    save(tmp_path / "imagesTr/amos_0500.nii.gz", np.zeros((2, 2, 2), np.float32))
    cases = {case.id: case for case in find_cases(tmp_path)}
    assert {id_: (case.modality, case.split) for id_, case in cases.items()} == {
        "amos_0001": ("ct", "train"),
        "amos_0002": ("ct", "val"),
        "amos_0500": ("ct", "train"),
        "amos_0501": ("mri", "train"),
    }
    case, labels = cases["amos_0002"], tmp_path / "labelsVa/amos_0002.nii.gz"
    assert case.image == tmp_path / "imagesVa/amos_0002.nii.gz"
    assert case.masks == {
        "liver": [(labels, (6,))],
        "kidneys": [(labels, (2, 3))],
        "spleen": [(labels, (1,))],
        "pancreas": [(labels, (10,))],
        "gallbladder": [(labels, (4,))],
    }
    assert case.values == tuple(range(16))


def test_nnunets_files(tmp_path):
    write_nnunet(tmp_path, "mri", 1)
    [case] = find_cases(tmp_path)
    labels = tmp_path / "labelsTr/case_000.nii.gz"
    assert (case.id, case.split) == ("case_000", "")
    assert case.image == tmp_path / "imagesTr/case_000_0000.nii.gz"
    assert case.masks == {
        "liver": [(labels, (6, 7))],
        "kidneys": [(labels, (2, 3))],  # "kidney_right" and "left kidney"
        "spleen": [(labels, (1,))],
        "pancreas": [(labels, (10,))],
        "gallbladder": [(labels, (4,))],  # "Gall Bladder"
    }
    assert sorted(case.values) == [0, 1, 2, 3, 4, 6, 7, 8, 10]


def test_another_file_ending_is_honoured(tmp_path):
    dataset = {"channel_names": {"0": "ct"}, "labels": {"liver": 1}, "file_ending": ".nii"}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    for name in ("a_0000.nii", "b_0001.nii", "c_0000.nii.gz", "a.nii"):
        save(tmp_path / "imagesTr" / name, np.zeros((2, 2, 2), np.float32))
    [case] = find_cases(tmp_path)
    assert (case.id, case.modality) == ("a", "ct")
    assert case.masks == {"liver": [(tmp_path / "labelsTr/a.nii", (1,))]}


def test_each_label_file_is_listed_once(tmp_path):
    [amos] = find_cases(write_amos(tmp_path / "amos", "ct", 1))
    [[path, wanted]] = amos.label_files(["spleen", "kidneys"]).items()
    assert path == tmp_path / "amos/labelsTr/amos_0001.nii.gz"
    assert wanted == [(1, (1,)), (2, (2, 3))]
    [case] = find_cases(write_totalsegmentator(tmp_path / "ts", "ct", 1, organs=["kidneys"]))
    masks = tmp_path / "ts/s0000/segmentations"
    assert case.label_files(["spleen", "kidneys"]) == {
        masks / "kidney_left.nii.gz": [(2, ())],
        masks / "kidney_right.nii.gz": [(2, ())],
    }


@pytest.mark.parametrize("layout", WRITERS)
def test_macos_leftovers_are_no_cases(layout, tmp_path):
    WRITERS[layout](tmp_path, "mri", 2)
    cases = find_cases(tmp_path)
    for path in list(tmp_path.rglob("*")):
        if path.is_file():
            (path.parent / f"._{path.name}").write_bytes(b"junk")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    shutil.copytree(tmp_path, tmp_path / "__MACOSX")
    assert find_cases(tmp_path) == cases
    assert len(cases) == 2


def test_a_folder_of_two_layouts_is_ambiguous(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    write_nnunet(tmp_path, "ct", 1)
    with pytest.raises(DataError, match="looks like totalsegmentator and nnunet; .*--layout"):
        find_cases(tmp_path)
    assert ids(find_cases(tmp_path, layout="nnunet")) == ["case_000"]
    assert ids(find_cases(tmp_path, layout="totalsegmentator")) == ["s0000"]
    with pytest.raises(DataError, match="no amos case found; expected"):
        find_cases(tmp_path, layout="amos")


# ----------------------------------------------------------------------------------------- splits


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


# ---------------------------------------------------------------------------------------- bad input


def test_bad_folders_are_named(tmp_path, mri_folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no labelled case found; expected"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match=r"holds MRI scans only, no ct"):
        find_cases(mri_folder, "ct")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"labels": {}}',
        '{"channel_names": {"0": "CT"}, "labels": [1], "file_ending": ".x"}',
        '{"channel_names": {"0": "CT"}, "labels": {"liver": "x"}, "file_ending": ".x"}',
    ],
)
def test_a_dataset_json_that_makes_no_sense_is_named(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset.json: expected"):
        find_cases(tmp_path)


def test_amos_without_labelled_scans_is_not_taken_for_nnunet(tmp_path):
    write_amos(tmp_path, "ct", 1)
    (tmp_path / "imagesTr").rename(tmp_path / "imagesTs")
    with pytest.raises(DataError, match=r"no labelled case found; expected"):
        find_cases(tmp_path)


def test_several_channels_are_refused(tmp_path):
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="has 2 channels"):
        find_cases(tmp_path)


def test_organs_that_a_folder_does_not_label(tmp_path):
    labels = {"background": 0, "liver": 1, "spleen": 2}
    few = find_cases(write_nnunet(tmp_path / "few", "mri", 1, labels=labels))
    full = find_cases(write_nnunet(tmp_path / "full", "ct", 1))
    few, full = (set(cases[0].masks) for cases in (few, full))
    organs = ["liver", "kidneys", "spleen", "pancreas", "gallbladder"]
    check_organs({"few": few, "full": full}, ["spleen", "liver"], False)
    check_organs({"few": few, "full": full}, organs, partial=True)
    advice = r"few: liver, spleen; full: .*use --organs liver spleen or --partial-labels"
    with pytest.raises(DataError, match=advice):
        check_organs({"few": few, "full": full}, organs, partial=False)
    with pytest.raises(DataError, match=r"not one folder labels .*use --organs liver spleen"):
        check_organs({"few": few}, organs, partial=True)
    with pytest.raises(DataError, match=r"\(few: liver; other: none\); use --partial-labels"):
        check_organs({"few": {"liver"}, "other": set()}, ["liver"], partial=False)
    with pytest.raises(DataError, match=r"a: liver; b: spleen\); use folders that share an organ"):
        check_organs({"a": {"liver"}, "b": {"spleen"}}, organs, partial=False)


# ------------------------------------------------------------------------- what cannot be told


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
    ("channel", "modality"),
    [
        *((name, "ct") for name in ("CT", "ct", "CT (HU)", "CT_venous")),
        *((name, "mri") for name in ("MRI", "T2", "t1", "T1_in_phase", "MR-T2-SPIR", "FLAIR")),
    ],
)
def test_channel_names_tell_the_modality(channel, modality, tmp_path):
    write_nnunet(tmp_path, "ct", 1)
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    dataset["channel_names"] = {"0": channel}
    text = json.dumps(dataset)
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8-sig")  # a byte-order mark is fine
    assert [case.modality for case in find_cases(tmp_path)] == [modality]


@pytest.mark.parametrize("channel", ["PET", "PET/CT", "SUV", "0", "", "ultrasound", "CT and MR"])
def test_a_channel_that_is_neither_is_refused(channel, tmp_path):
    write_nnunet(tmp_path, "ct", 1)
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**dataset, "channel_names": {"0": channel}}))
    with pytest.raises(DataError, match="dataset.json: is channel .* CT or MRI"):
        find_cases(tmp_path)


@pytest.mark.parametrize("value", [0, -1, 10**30, float("inf"), float("nan"), "six", None, [[]]])
def test_a_label_value_that_cannot_be_is_refused(value, tmp_path):
    write_nnunet(tmp_path, "ct", 1)
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    dataset["labels"]["liver"] = value
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="dataset.json: expected nnU-Net's channel_names, labels"):
        find_cases(tmp_path)


def test_a_folder_that_labels_none_of_the_organs_is_refused_even_with_partial_labels():
    labelled = {"a": {"liver", "spleen"}, "b": {"kidneys"}}
    with pytest.raises(DataError, match="b: labels none of liver, spleen .*; leave it out"):
        check_organs(labelled, ["liver", "spleen"], partial=True)


# ------------------------------------------------------------------- any folder (hypothesis)


@st.composite
def folders(draw):
    """{id: split or None for a scan that meta.csv does not list} of a TotalSegmentator folder."""
    ids = draw(st.sets(st.integers(0, 9999), min_size=1, max_size=25))
    splits = st.sampled_from(["train", "val", "test", "", None])
    return {f"s{i:04d}": draw(splits) for i in sorted(ids)}


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
