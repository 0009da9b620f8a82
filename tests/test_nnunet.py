"""nnU-Net's raw layout: dataset.json, its channels, labels and parts."""

import json
import shutil

import numpy as np
import pytest
from conftest import (
    save,
    write_nnunet,
    write_totalsegmentator,
)
from test_layouts import problems_of

from scans.files import DataError
from scans.layouts import find_cases
from scans.nifti import Problem


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
    images = tmp_path / "imagesTr"
    case, *misnamed = find_cases(tmp_path)
    assert (case.id, case.modality, case.problem) == ("a", "ct", "")
    assert case.masks == {"liver": [(tmp_path / "labelsTr/a.nii", (1,))]}
    assert [(c.id, c.image, c.problem) for c in misnamed] == [
        ("b", images / "b_0001.nii", "nnU-Net's name for it would be b_0000.nii; rename it"),
        ("c", images / "c_0000.nii.gz", "nnU-Net's name for it would be c_0000.nii; rename it"),
    ]


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


def test_several_channels_are_refused(tmp_path):
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="has 2 channels"):
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


def test_a_scan_or_label_that_nnunet_lacks_is_missed(tmp_path):
    write_nnunet(tmp_path, "mri", 4)
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    (images / "case_001_0000.nii.gz").unlink()
    (labels / "case_002.nii.gz").unlink()
    (images / "case_003_0000.nii.gz").unlink()
    (images / "case_003_0000.nii.gz").symlink_to("gone")
    assert problems_of(tmp_path) == {
        "case_000": [],
        "case_001": [Problem(images / "case_001_0000.nii.gz", "missing")],
        "case_002": [Problem(labels / "case_002.nii.gz", "missing")],
        "case_003": [Problem(images / "case_003_0000.nii.gz", "missing")],
    }


def nnunet_with(root, labels, **more):
    write_nnunet(root, "ct", 1, labels={"background": 0, **labels})
    dataset = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**dataset, **more}))
    return root


@pytest.mark.parametrize("name", ["ignore", "Ignore"])
def test_a_label_to_ignore_is_refused(name, tmp_path):
    nnunet_with(tmp_path, {"liver": 1, name: 2})
    with pytest.raises(
        DataError, match="dataset.json: has a label 'ignore', whose voxels would be"
    ):
        find_cases(tmp_path)


@pytest.mark.parametrize("name", ["tumor", "Tumour", "liver_lesions", "cyst", "cancer"])
def test_a_part_that_is_labelled_apart_is_warned_of(name, tmp_path):
    [case] = find_cases(nnunet_with(tmp_path / "holes", {"liver": 1, name: 2}))
    [remark] = case.remarks
    assert f"dataset.json: labels {name} apart from liver; " in str(remark)
    assert remark.usable
    [case] = find_cases(nnunet_with(tmp_path / "filled", {"liver": [1, 2], name: 2}))
    assert case.remarks == ()
    [case] = find_cases(tmp_path / "holes", organs=["liver", name])
    assert case.remarks == ()  # a class of its own


def test_a_part_of_an_organ_that_is_not_trained_on_is_not_warned_of(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    masks = tmp_path / "s0000/segmentations"
    shutil.copy(masks / "spleen.nii.gz", masks / "kidney_cyst_left.nii.gz")
    [remark] = find_cases(tmp_path)[0].remarks
    assert "labels kidney_cyst_left apart from kidneys; " in str(remark)
    assert find_cases(tmp_path, organs=["liver", "spleen"])[0].remarks == ()


@pytest.mark.parametrize("channel", ["0", "image", "In phase", "", "noNorm"])
def test_what_is_asked_for_decides_where_the_channel_says_nothing(channel, tmp_path):
    nnunet_with(tmp_path, {"liver": 1}, channel_names={"0": channel})
    for modality in ("ct", "mri"):
        assert [case.modality for case in find_cases(tmp_path, modality)] == [modality]
    with pytest.raises(DataError, match=r"CT or MRI\? .*; --ct, --mri or --modality tells it"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("channel", "modality"),
    [
        ("T2", "ct"),
        ("CT", "mri"),
        ("PET", "ct"),
        ("SUV", "ct"),
        ("CT and MR", "ct"),
        ("PET", "mri"),
    ],
)
def test_a_channel_that_contradicts_what_is_asked_for_is_refused(channel, modality, tmp_path):
    nnunet_with(tmp_path, {"liver": 1}, channel_names={"0": channel})
    with pytest.raises(DataError, match=r"scans only, no|is channel .* CT or MRI\?"):
        find_cases(tmp_path, modality)
