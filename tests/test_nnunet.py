"""nnU-Net's raw layout: dataset.json, its channels, labels and parts."""

import json
import shutil

import pytest
from conftest import save, write_amos, write_nnunet, write_totalsegmentator
from test_layouts import NOTHING, WRITERS, errors_of

from scans.files import DataError
from scans.layouts import find_cases


def nnunet_with(root, labels, **more):
    """One case; its dataset.json begins with a byte-order mark, which is fine."""
    write_nnunet(root, "ct", 1, labels={"background": 0, **labels})
    text = json.dumps({**json.loads((root / "dataset.json").read_text()), **more})
    (root / "dataset.json").write_text(text, encoding="utf-8-sig")
    return root


def test_nnunets_files(tmp_path):
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))
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
    save(tmp_path / "imagesTr/a_0000.nii", NOTHING)
    [case] = find_cases(tmp_path)
    assert (case.id, case.modality) == ("a", "ct")
    assert case.masks == {"liver": [(tmp_path / "labelsTr/a.nii", (1,))]}


def test_an_id_may_end_as_a_channel_does(tmp_path):
    write_nnunet(tmp_path, "mri", 1)
    for path in tmp_path.rglob("case_000*"):
        path.rename(path.with_name(path.name.replace("case_000", "a_0001")))
    assert errors_of(tmp_path) == {"a_0001": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"labels": {}}', "it has no channel_names, file_ending; nnU-Net 2 writes them"),
        ('{"channel_names": {"0": "CT"}, "labels": [1], "file_ending": ".x"}', "cannot be read"),
    ],
)
def test_a_dataset_json_that_makes_no_sense_is_named(content, message, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=rf"dataset.json: .*{message}"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    "value", [0, -1, 10**30, float("inf"), float("nan"), "six", None, [], [[]], [3, 0], 1.5]
)
def test_a_label_value_that_cannot_be_is_refused(value, tmp_path):
    nnunet_with(tmp_path, {"liver": value})
    with pytest.raises(DataError, match="dataset.json: cannot be read"):
        find_cases(tmp_path)
    nnunet_with(tmp_path, {"liver": 1.0, "other": 1.5})
    with pytest.raises(DataError, match=r"label other is \(1.5,\); expected whole numbers, 1 to"):
        find_cases(tmp_path)


@pytest.mark.parametrize("name", ["ignore", "Ignore"])
def test_a_label_to_ignore_is_refused(name, tmp_path):
    nnunet_with(tmp_path, {"liver": 1, name: 2})
    with pytest.raises(DataError, match=r"dataset.json: has a label 'ignore', whose voxels would"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("channel", "modality"),
    [
        *(
            (name, "ct")
            for name in ("CT", "ct", "CT (HU)", "CT_venous", "spectral CT", "greyscale CT")
        ),
        *(
            (name, "mri")
            for name in ("MRI", "T2", "t1", "T1_in_phase", "MR-T2-SPIR", "FLAIR", "GRE")
        ),
    ],
)
def test_channel_names_tell_the_modality(channel, modality, tmp_path):
    nnunet_with(tmp_path, {"liver": 6}, channel_names={"0": channel})
    assert [case.modality for case in find_cases(tmp_path)] == [modality]
    assert [case.modality for case in find_cases(tmp_path, modality)] == [modality]
    other = {"ct": "mri", "mri": "ct"}[modality]
    with pytest.raises(DataError, match=f"holds {modality.upper()} scans only, no {other}"):
        find_cases(tmp_path, other)


@pytest.mark.parametrize("channel", ["0", "image", "In phase", "", "noNorm"])
def test_what_is_asked_for_decides_where_the_channel_says_nothing(channel, tmp_path):
    nnunet_with(tmp_path, {"liver": 1}, channel_names={"0": channel})
    for modality in ("ct", "mri"):
        assert [case.modality for case in find_cases(tmp_path, modality)] == [modality]
    with pytest.raises(DataError, match=r"CT or MRI\? .* give --ct, --mri or --modality"):
        find_cases(tmp_path)
    nnunet_with(tmp_path, {"liver": 1}, channel_names={"0": channel, "1": "T2"})
    with pytest.raises(DataError, match="has 2 channels"):
        find_cases(tmp_path, "mri")


@pytest.mark.parametrize("channel", ["PET", "PET/CT", "SPECT/CT", "SUV", "ultrasound", "CT and MR"])
@pytest.mark.parametrize("modality", [None, "ct", "mri"])
def test_a_channel_that_is_neither_is_refused(channel, modality, tmp_path):
    nnunet_with(tmp_path, {"liver": 1}, channel_names={"0": channel})
    with pytest.raises(DataError, match=r"dataset.json: is channel .* CT or MRI\?"):
        find_cases(tmp_path, modality)


@pytest.mark.parametrize("name", ["tumor", "Tumour", "liver_lesions", "cyst", "cancer"])
def test_a_part_that_is_labelled_apart_is_warned_of(name, tmp_path):
    [case] = find_cases(nnunet_with(tmp_path / "holes", {"liver": 1, name: 2}))
    [warning] = case.warnings
    assert warning.startswith(f"{tmp_path}/holes/dataset.json: labels {name} apart from the organs")
    [case] = find_cases(nnunet_with(tmp_path / "filled", {"liver": [1, 2], name: 2}))
    assert case.warnings == ()
    [case] = find_cases(tmp_path / "holes", organs=["liver", name])
    assert case.warnings == ()  # a class of its own


def test_a_mask_of_a_part_is_no_reason_for_nnunets_advice(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    masks = tmp_path / "s0000/segmentations"
    shutil.copy(masks / "spleen.nii.gz", masks / "kidney_cyst_left.nii.gz")
    [case] = find_cases(tmp_path)
    assert case.warnings == ()


@pytest.mark.parametrize(
    ("said", "warning"),
    [
        ({"numTraining": 1}, "numTraining is 1, but 2 cases are here, and all are read"),
        ({"dataset": {"x": {"images": ["b/x.nii.gz"]}}}, "its list 'dataset' is not read; the"),
        ({"training": ["a/x.nii.gz"]}, "its list 'training' is not read; the cases are those in"),
        ({"training": [{"image": "imagesTr/x.nii.gz", "label": "../x.nii.gz"}]}, "its list 'tra"),
        ({"training": [{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}]}, ""),
        ({"training": [], "numTraining": 2, "dataset": {}, "test": ["imagesTs/x.nii.gz"]}, ""),
        ({"numTraining": "many"}, ""),
    ],
)
def test_what_a_dataset_json_says_of_cases_is_not_read_in_silence(said, warning, tmp_path):
    write_nnunet(tmp_path, "ct", 2)
    nnunet = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**nnunet, **said}))
    cases = find_cases(tmp_path)
    assert len(cases) == 2
    found = [
        w.partition(f"{tmp_path}/dataset.json: ")[2][: len(warning)] for w in cases[0].warnings
    ]
    assert found == [warning] * bool(warning)


def test_links_that_lead_to_themselves_are_no_traceback(tmp_path):
    write_nnunet(tmp_path, "ct", 1)
    (tmp_path / "loop.nii.gz").symlink_to(tmp_path / "loop.nii.gz")
    nnunet = json.loads((tmp_path / "dataset.json").read_text())
    nnunet["training"] = [{"image": "loop.nii.gz", "label": "labelsTr/x.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps(nnunet))
    [case] = find_cases(tmp_path)
    assert "its list 'training' is not read" in case.warnings[0]


def test_a_labelled_test_split_is_not_left_out_in_silence(tmp_path):
    write_nnunet(tmp_path, "ct", 1)
    (tmp_path / "imagesTs").mkdir()
    assert find_cases(tmp_path)[0].warnings == ()
    (tmp_path / "labelsTs").mkdir()
    [warning] = find_cases(tmp_path)[0].warnings
    assert warning.startswith(f"{tmp_path}/labelsTs: not read; a meta.csv can give")


@pytest.mark.parametrize("write", WRITERS.values())
def test_nnunets_own_splits_are_not_read_in_silence(write, tmp_path):
    write(tmp_path, "ct", 2)
    (tmp_path / "splits_final.json").write_text("[]")
    for case in find_cases(tmp_path):
        [warning] = case.warnings
        assert warning.startswith(f"{tmp_path}/splits_final.json: not read; a meta.csv gives")


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (write_nnunet, ["imagesTr/case_007_0000.nii", "imagesTr/x.nii.gz", "labelsTr/x.NII.GZ"]),
        (write_amos, ["imagesTr/amos_0007.nii", "labelsVa/amos_07.nii.gz"]),
    ],
)
def test_scans_and_labels_of_another_name_are_not_left_out_in_silence(write, names, tmp_path):
    write(tmp_path, "ct", 2)
    cases = find_cases(tmp_path)
    for name in [*names, "imagesTr/notes.txt"]:
        (tmp_path / name).write_text("")
    found = find_cases(tmp_path)
    assert [case.warnings for case in cases] == [(), ()]
    [warning] = found[0].warnings
    assert warning.startswith(
        f"{', '.join(str(tmp_path / name) for name in names)}: not read, because"
    )
    assert [case._replace(warnings=()) for case in found] == cases
