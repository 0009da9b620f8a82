"""A scan and its labels, read: what was written comes back, and what is wrong is named."""

import nibabel
import numpy as np
import pytest
from conftest import (
    SPOILT_CASES,
    awkward_affine,
    edit,
    make_forms_disagree,
    save,
    set_voxel,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

from cases import read_case, read_usable, split_duplicates
from datasets import DataError, find_cases
from nifti import Problem
from phantom import ORGANS, SPACING, phantom


@pytest.mark.parametrize("write", [write_totalsegmentator, write_nnunet, write_amos])
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_comes_back(write, modality, tmp_path):
    write(tmp_path, modality, 2)
    for index, case in enumerate(find_cases(tmp_path)):
        image, target = phantom(1, modality, index)
        scan, labels, problems = read_case(case, ORGANS)
        np.testing.assert_array_equal(scan.voxels, image)
        np.testing.assert_array_equal(labels, target)
        assert labels.dtype == np.uint8
        assert scan.spacing == pytest.approx((SPACING,) * 3)
        assert [str(problem) for problem in problems if not problem.usable] == []
        usable_scan, usable_labels = read_usable(case, ORGANS)
        np.testing.assert_array_equal(usable_scan.voxels, image)
        np.testing.assert_array_equal(usable_labels, target)


def test_organs_are_numbered_as_asked_for(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "rest": [2, 3, 4, 8, 10]}
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1, labels=labels))
    target = phantom(1, "mri", 0)[1]
    read = read_case(case, ["spleen", "pancreas", "liver"])[1]
    expected = np.select([target == 1, target == 3], [3, 1])  # the pancreas is not labelled there
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("write", [write_totalsegmentator, write_nnunet, write_amos])
def test_labels_follow_their_scan_through_awkward_affines(write, tmp_path):
    write(tmp_path, "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    scan, labels = read_usable(find_cases(tmp_path)[0], ORGANS)
    # Canonical again, but for the flips: column j of the affine runs along ±x of axis order[j].
    image, target = (np.flip(array, (0, 2)) for array in phantom(1, "mri", 0))
    np.testing.assert_array_equal(scan.voxels, image)
    np.testing.assert_array_equal(labels, target)


@pytest.mark.parametrize("factor", [0.9, 1.0000000591])
def test_float_masks_and_a_trailing_axis_are_read(factor, tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    for path in tmp_path.rglob("*.nii.gz"):
        nifti = nibabel.load(path)
        scale = 1 if path.name == "ct.nii.gz" else factor
        save(path, (nifti.get_fdata() * scale)[..., None])
    [case] = find_cases(tmp_path)
    np.testing.assert_array_equal(read_usable(case, ORGANS)[1], phantom(1, "ct", 0)[1])


def test_float_label_values_are_rounded(tmp_path):
    [case] = find_cases(write_amos(tmp_path, "ct", 1))
    path = tmp_path / "labelsTr/amos_0001.nii.gz"
    edit(path, np.asarray(nibabel.load(path).dataobj) * np.float32(1.0000001))
    _, labels, problems = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, phantom(1, "ct", 0)[1])
    assert problems == []


# ----------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("file", "spoil", "message"), SPOILT_CASES)
def test_what_keeps_a_case_from_being_used_is_named(file, spoil, message, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    path = tmp_path / "s0000" / f"{file}.nii.gz"
    spoil(path)
    scan, labels, problems = read_case(case, ORGANS)
    assert scan is None or labels is None
    fatal = [problem for problem in problems if not problem.usable]
    assert message in fatal[0].what
    assert str(fatal[0]).endswith("; the case cannot be used")
    assert path.name in str(fatal[0])
    with pytest.raises(DataError) as error:
        read_usable(case, ORGANS)
    assert str(error.value) == "\n".join(map(str, fatal))
    assert str(tmp_path / "s0000") in str(error.value)


def test_a_missing_scan_is_named(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    case.image.unlink()
    scan, labels, problems = read_case(case, ORGANS)
    assert (scan, labels) == (None, None)
    assert problems == [Problem(case.image, "missing")]


def test_mri_signal_has_a_limit_of_its_own(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "mri", 1))
    set_voxel(4e6)(case.image)
    assert read_case(case, ORGANS)[2] == []
    set_voxel(-2e7)(case.image)
    [problem] = read_case(case, ORGANS)[2]
    assert "are no MRI signal" in problem.what
    assert not problem.usable


def test_every_problem_of_a_case_is_listed(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    masks = tmp_path / "s0000/segmentations"
    set_voxel(4e6)(case.image)
    truncate(masks / "liver.nii.gz")
    (masks / "kidney_left.nii.gz").unlink()
    set_voxel(7)(masks / "spleen.nii.gz")
    problems = read_case(case, ORGANS)[2]
    assert [(problem.file.name, problem.usable) for problem in problems] == [
        ("ct.nii.gz", False),
        ("liver.nii.gz", False),
        ("kidney_left.nii.gz", False),
        ("spleen.nii.gz", True),
    ]
    with pytest.raises(DataError) as error:
        read_usable(case, ORGANS)
    assert len(str(error.value).splitlines()) == 3


def test_what_does_no_harm_is_mentioned(tmp_path):
    write_nnunet(tmp_path, "mri", 4)
    labels, images = tmp_path / "labelsTr", tmp_path / "imagesTr"
    set_voxel(77)(labels / "case_000.nii.gz")
    edit(labels / "case_001.nii.gz", np.zeros((32, 32, 32), np.uint8))
    make_forms_disagree(images / "case_002_0000.nii.gz")
    scan = np.asarray(nibabel.load(images / "case_003_0000.nii.gz").dataobj)
    edit(images / "case_003_0000.nii.gz", scan[..., None])
    expected = [
        (
            labels / "case_000.nii.gz",
            "has labels that the data set does not list: 77",
            "they count as background",
        ),
        (images / "case_001_0000.nii.gz", "has no organ at all", "it is all background"),
        (
            images / "case_002_0000.nii.gz",
            "its sform and qform put the volume at different places",
            "the sform is used",
        ),
        (
            images / "case_003_0000.nii.gz",
            "has shape (32, 32, 32, 1)",
            "axes of length 1 are dropped",
        ),
    ]
    for index, (case, problem) in enumerate(zip(find_cases(tmp_path), expected, strict=True)):
        assert read_case(case, ORGANS)[2] == [Problem(*problem, usable=True)]
        target = phantom(1, "mri", index)[1] * (index != 1)
        np.testing.assert_array_equal(read_usable(case, ORGANS)[1], target)


def test_odd_values_of_a_binary_mask_count_as_organ(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    path = tmp_path / "s0000/segmentations/liver.nii.gz"
    edit(path, np.asarray(nibabel.load(path).dataobj) * 200)
    _, labels, problems = read_case(case, ORGANS)
    [problem] = problems
    assert problem.usable
    assert problem.what.endswith("does not list: 200")
    assert problem.consequence == "values above 0.5 count as organ"
    np.testing.assert_array_equal(labels, phantom(1, "ct", 0)[1])


def test_many_odd_values_are_cut_short(tmp_path):
    [case] = find_cases(write_amos(tmp_path, "ct", 1))
    path = tmp_path / "labelsTr/amos_0001.nii.gz"
    array = np.asarray(nibabel.load(path).dataobj).copy()
    array[-1, -1, :7] = range(100, 107)
    edit(path, array)
    [problem] = read_case(case, ORGANS)[2]
    assert problem.what.endswith("does not list: 100, 101, 102, 103, 104 …")


def test_rounding_in_affines_is_no_problem(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    path = tmp_path / "s0000/segmentations/liver.nii.gz"
    edit(path, affine=nibabel.load(path).affine + 1e-3 * np.eye(4) * [1, 1, 1, 0])
    assert (nibabel.load(path).affine != nibabel.load(case.image).affine).any()
    assert read_case(case, ORGANS)[2] == []


@pytest.mark.parametrize(
    ("write", "name", "known", "what"),
    [
        (write_totalsegmentator, "s0000", "s0864", "is corrupt or has impossible values"),
        (write_totalsegmentator, "s0000", "s0001", "is rotated against its labels"),
        (write_totalsegmentator, "s0000", "s0044", "is rotated against its labels"),
        (write_totalsegmentator, "s0000", "s0067", "is rotated against its labels"),
        (write_amos, "amos_0501", "amos_0540", "has a scale factor"),
    ],
)
def test_cases_known_to_be_bad_are_mentioned(write, name, known, what, tmp_path):
    write(tmp_path, "mri", 1)
    for path in list(tmp_path.rglob(f"{name}*")):
        path.rename(path.with_name(path.name.replace(name, known)))
    [case] = find_cases(tmp_path)
    _, labels, [problem] = read_case(case, ORGANS)
    assert problem.what.startswith(f"{known} {what}")
    assert problem.consequence == "it is used if nothing else is wrong"
    assert problem.usable
    np.testing.assert_array_equal(labels, phantom(1, "mri", 0)[1])
    unnamed = case._replace(layout="nnunet")
    assert read_case(unnamed, ORGANS)[2] == []


def test_an_id_that_stands_in_a_folder_twice_counts_once(tmp_path):
    first, second = find_cases(write_nnunet(tmp_path / "a", "mri", 2))
    again = first._replace(image=first.image.with_name("copy_0000.nii.gz"))
    elsewhere = first._replace(folder=str(tmp_path / "b"))
    kept, problems = split_duplicates([first, second, again, elsewhere])
    assert kept == [first, second, elsewhere]
    what = "the id case_000 stands in this folder twice"
    assert problems == [Problem(again.image, what, "only the first one can be used")]
    assert not problems[0].usable
