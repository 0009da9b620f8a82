"""Layouts on disk: which scans a folder holds, where their labels are, and how they are split."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import (
    SPACING,
    save,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

from scans.cases import load_cases, read_case
from scans.files import DataError
from scans.layouts import find_cases
from scans.nifti import Problem
from scans.organs import ORGANS

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
    write_totalsegmentator(tmp_path, "ct", 2, splits=["val", "train"], organs=["kidneys", "spleen"])
    first, second = find_cases(tmp_path)
    masks = tmp_path / "s0000/segmentations"
    assert (first.id, first.split, first.image) == ("s0000", "val", tmp_path / "s0000/ct.nii.gz")
    assert first.masks == {
        "kidneys": [(masks / "kidney_left.nii.gz", ()), (masks / "kidney_right.nii.gz", ())],
        "spleen": [(masks / "spleen.nii.gz", ())],
    }
    assert (second.id, second.split, second.values) == ("s0001", "train", ())


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


def test_bad_folders_are_named(tmp_path, mri_folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no labelled case found; expected"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match=r"holds MRI scans only, no ct"):
        find_cases(mri_folder, "ct")


def test_amos_without_labelled_scans_is_not_taken_for_nnunet(tmp_path):
    write_amos(tmp_path, "ct", 1)
    (tmp_path / "imagesTr").rename(tmp_path / "imagesTs")
    with pytest.raises(DataError, match=r"no labelled case found; expected"):
        find_cases(tmp_path)


WAY_OUT = r"give each scan one row with its split, .*without the file, a split is made by seed"


def problems_of(root, **more):
    """What keeps each case of a folder from being used, by id."""
    found = {case.id: read_case(case, ORGANS)[2] for case in find_cases(root, **more)}
    return {id_: [p for p in problems if not p.usable] for id_, problems in found.items()}


def test_a_scan_that_totalsegmentators_folders_lack_is_missed(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 5)
    (tmp_path / "s0000/ct.nii.gz").unlink()  # masks without their scan
    (tmp_path / "s0001/ct.nii.gz").rename(tmp_path / "there.nii.gz")
    (tmp_path / "s0001/ct.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    (tmp_path / "s0002/ct.nii.gz").unlink()
    (tmp_path / "s0002/ct.nii.gz").symlink_to("ct.nii.gz")  # to itself
    shutil.rmtree(tmp_path / "s0003")
    (tmp_path / "s0003").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "s0005").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("")
    problems = problems_of(tmp_path)
    assert problems.pop("s0004") == []
    assert list(problems) == ["s0000", "s0001", "s0002", "s0003", "s0005"]
    for id_, found in problems.items():
        assert found[0] == Problem(tmp_path / id_ / "ct.nii.gz", "missing")
    with pytest.raises(DataError, match=r"s0000/ct.nii.gz: missing"):
        load_cases(find_cases(tmp_path), ORGANS, SPACING)
    prepared, left_out = load_cases(find_cases(tmp_path), ORGANS, SPACING, skip_bad=True)
    assert [path.parent.name for path in prepared] == ["s0004"]
    assert len(left_out) == 5


@pytest.mark.parametrize("name", ["segmentations/liver.nii.gz", "segmentations"])
def test_masks_that_a_link_no_longer_leads_to_are_missed(name, tmp_path):
    write_totalsegmentator(tmp_path, "ct", 2, organs=["liver"])
    path = tmp_path / "s0001" / name
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "gone")
    missing = Problem(tmp_path / "s0001/segmentations/liver.nii.gz", "missing")
    assert problems_of(tmp_path) == {"s0000": [], "s0001": [missing]}


def test_a_scan_or_label_that_amos_lacks_is_missed(tmp_path):
    write_amos(tmp_path, "ct", 4)
    (tmp_path / "imagesVa/amos_0002.nii.gz").unlink()
    (tmp_path / "labelsVa/amos_0003.nii.gz").unlink()
    (tmp_path / "imagesVa/amos_0004.nii.gz").unlink()
    (tmp_path / "imagesVa/amos_0004.nii.gz").symlink_to("gone")
    assert problems_of(tmp_path) == {
        "amos_0001": [],
        "amos_0002": [Problem(tmp_path / "imagesVa/amos_0002.nii.gz", "missing")],
        "amos_0003": [Problem(tmp_path / "labelsVa/amos_0003.nii.gz", "missing")],
        "amos_0004": [Problem(tmp_path / "imagesVa/amos_0004.nii.gz", "missing")],
    }


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "name", ["case_001.nii.gz", "case_001_0000.NII.GZ", "case_001_0000.nii", "case_001_0001.nii.gz"]
)
def test_an_image_of_another_name_has_a_sentence_of_its_own(name, cached, tmp_path):
    root = write_nnunet(tmp_path / "set", "mri", 2)
    cache = tmp_path / "cache" if cached else None
    load_cases(find_cases(root), ORGANS, SPACING, cache)
    image = root / "imagesTr" / name
    (root / "imagesTr/case_001_0000.nii.gz").rename(image)
    what = "nnU-Net's name for it would be case_001_0000.nii.gz; rename it"
    first, second = problems_of(root).values()
    assert (first, second[0]) == ([], Problem(image, what))
    with pytest.raises(DataError, match=f"{name}: {what}"):
        load_cases(find_cases(root), ORGANS, SPACING, cache)


def test_an_id_may_end_as_a_channel_does(tmp_path):
    write_nnunet(tmp_path, "mri", 1)
    (tmp_path / "imagesTr/case_000_0000.nii.gz").rename(tmp_path / "imagesTr/a_0001_0000.nii.gz")
    (tmp_path / "labelsTr/case_000.nii.gz").rename(tmp_path / "labelsTr/a_0001.nii.gz")
    assert problems_of(tmp_path) == {"a_0001": []}
    (tmp_path / "imagesTr/a_0001_0000.nii.gz").rename(tmp_path / "imagesTr/a_0001.nii.gz")
    [case] = find_cases(tmp_path)
    assert case.problem.startswith("nnU-Net's name for it would be a_0001_0000.nii.gz")


def test_what_is_no_case_is_none(tmp_path):
    write_nnunet(tmp_path, "mri", 1)
    cases = find_cases(tmp_path)
    for name in ("imagesTr/readme.txt", "imagesTr/case_000_0001.nii.gz", "labelsTr/a.json"):
        (tmp_path / name).write_text("")
    assert find_cases(tmp_path) == cases


def test_cases_that_a_dataset_json_counts_are_a_line_with_their_number(tmp_path):
    nnunet = write_nnunet(tmp_path / "nnunet", "mri", 3)
    for name in ("imagesTr/case_001_0000.nii.gz", "labelsTr/case_001.nii.gz"):
        (nnunet / name).unlink()
    amos = write_amos(tmp_path / "amos", "ct", 2)
    listed = {"training": [{}] * 5, "validation": [{}] * 3, "labels": {}}
    (amos / "dataset.json").write_text(json.dumps(listed))
    for root, n in ((nnunet, 1), (amos, 6)):
        [remark] = find_cases(root)[0].remarks
        text = f"{root}/dataset.json: speaks of {n} more cases than are in the folder; "
        assert (str(remark).startswith(text), remark.usable) == (True, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 2)
    (tmp_path / "s0001").chmod(0)
    with pytest.raises(DataError, match="s0001: cannot be read"):
        find_cases(tmp_path)
    (tmp_path / "s0001").chmod(0o755)


def test_a_folder_of_dicom_is_told_what_it_is(tmp_path):
    (tmp_path / "patient/series").mkdir(parents=True)
    (tmp_path / "patient/series/i0000.DCM").write_bytes(b"")
    with pytest.raises(DataError, match=r"no labelled case found; expected .*holds DICOM: convert"):
        find_cases(tmp_path)


def test_an_ending_in_capitals_is_told(tmp_path):
    save(tmp_path / "s0000/ct.nii.gz", np.zeros((2, 2, 2), np.float32))
    (tmp_path / "s0000/ct.nii.gz").rename(tmp_path / "s0000/CT.NII.GZ")
    with pytest.raises(DataError, match=r"s0000/CT.NII.GZ: names end in .nii.gz, in small letters"):
        find_cases(tmp_path)
