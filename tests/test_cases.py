"""Scans and their labels: what was written comes back, what is wrong is named, all is prepared."""

import shutil
import time

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
from scipy import ndimage

from data import normalize
from scans import cases as cases_module
from scans.cache import fingerprint, pack_target
from scans.cases import (
    PEAK,
    load_case,
    load_cases,
    peak_bytes,
    read_case,
    read_usable,
    sample,
    split_duplicates,
)
from scans.files import DataError
from scans.layouts import Case, find_cases
from scans.nifti import Problem
from scans.phantom import ORGANS, SPACING, make_phantom

WRITERS = [write_totalsegmentator, write_nnunet, write_amos]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_comes_back(write, modality, tmp_path):
    write(tmp_path, modality, 2)
    for index, case in enumerate(find_cases(tmp_path)):
        image, target = make_phantom(1, modality, index)
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
    target = make_phantom(1, "mri", 0)[1]
    read = read_case(case, ["spleen", "pancreas", "liver"])[1]
    expected = np.select([target == 1, target == 3], [3, 1])  # the pancreas is not labelled there
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("write", WRITERS)
def test_labels_follow_their_scan_through_awkward_affines(write, tmp_path):
    write(tmp_path, "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    scan, labels = read_usable(find_cases(tmp_path)[0], ORGANS)
    # Canonical again, but for the flips: column j of the affine runs along ±x of axis order[j].
    image, target = (np.flip(array, (0, 2)) for array in make_phantom(1, "mri", 0))
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
    np.testing.assert_array_equal(read_usable(case, ORGANS)[1], make_phantom(1, "ct", 0)[1])


def test_float_label_values_are_rounded(tmp_path):
    [case] = find_cases(write_amos(tmp_path, "ct", 1))
    path = tmp_path / "labelsTr/amos_0001.nii.gz"
    edit(path, np.asarray(nibabel.load(path).dataobj) * np.float32(1.0000001))
    _, labels, problems = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
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
    write_nnunet(tmp_path, "mri", 3)
    labels, images = tmp_path / "labelsTr", tmp_path / "imagesTr"
    set_voxel(77)(labels / "case_000.nii.gz")
    make_forms_disagree(images / "case_001_0000.nii.gz")
    scan = np.asarray(nibabel.load(images / "case_002_0000.nii.gz").dataobj)
    edit(images / "case_002_0000.nii.gz", scan[..., None])
    expected = [
        (
            labels / "case_000.nii.gz",
            "has labels that the data set does not list: 77",
            "they count as background",
        ),
        (
            images / "case_001_0000.nii.gz",
            "its sform and qform put the volume at different places",
            "the sform is used",
        ),
        (
            images / "case_002_0000.nii.gz",
            "has shape (32, 32, 32, 1)",
            "axes of length 1 are dropped",
        ),
    ]
    for index, (case, problem) in enumerate(zip(find_cases(tmp_path), expected, strict=True)):
        assert read_case(case, ORGANS)[2] == [Problem(*problem, usable=True)]
        scan, labels = read_usable(case, ORGANS)
        assert scan.problems == [Problem(*problem, usable=True)]
        np.testing.assert_array_equal(labels, make_phantom(1, "mri", index)[1])


def test_odd_values_of_a_binary_mask_count_as_organ(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    path = tmp_path / "s0000/segmentations/liver.nii.gz"
    edit(path, np.asarray(nibabel.load(path).dataobj) * 200)
    _, labels, problems = read_case(case, ORGANS)
    [problem] = problems
    assert problem.usable
    assert problem.what.endswith("does not list: 200")
    assert problem.consequence == "values above 0.5 count as organ"
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])


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


def rescale(a, b=0.0):
    return lambda image: image * a + b


def unit(image):
    return (image - image.min()) / np.ptp(image)


def standardized(image):
    return (image - image.mean()) / image.std()


def padded(value, change=lambda image: image):
    """With `value` outside of the circle that a scanner sees, before or after a change."""

    def pad(image):
        x, y = np.ogrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
        return np.where((x**2 + y**2 > 1)[..., None], value, change(image))

    return pad


def with_voxel(value, change=lambda image: image):
    def put(image):
        image = change(image).copy()
        image[1, 2, 3] = value
        return image

    return put


NO_HOUNSFIELD = {
    "stored": rescale(1, 1024),
    "stored, one voxel at -1": with_voxel(-1, rescale(1, 1024)),
    "stored, one voxel at -2000": with_voxel(-2000, rescale(1, 1024)),
    "stored, padded with -2000": padded(-2000, rescale(1, 1024)),
    "stored, padding scaled": padded(-976, rescale(1, 1024)),
    "stored, from 0": lambda image: (image + 1024).clip(0),
    "by 1000": rescale(1, 1000),
    "twice": rescale(1, -1024),
    "tenfold": rescale(10),
    "a tenth": rescale(0.1),
    "0 to 1": unit,
    "-1 to 1": lambda image: 2 * unit(image) - 1,
    "0 to 255": lambda image: 255 * unit(image),
    "0 to 255, splines": with_voxel(-3, lambda image: 255 * unit(image)),
    "a window, 0 to 255": lambda image: 255 * unit(image.clip(-160, 240)),
    "a window, 0 to 1": lambda image: unit(image.clip(-160, 240)),
    "standardized": standardized,
    "an MRI": lambda image: make_phantom(1, "mri", 0)[0],
    "an MRI from 0 to 300": lambda image: 300 * unit(make_phantom(1, "mri", 0)[0]),
}


@pytest.mark.parametrize("scanner", ["own", "other"])
@pytest.mark.parametrize("change", NO_HOUNSFIELD.values(), ids=NO_HOUNSFIELD)
def test_a_ct_that_is_shifted_or_scaled_is_refused(change, scanner, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for index in range(4):
        edit(case.image, change(make_phantom(1, "ct", index, scanner)[0]).astype(np.float32))
        _, labels, [problem] = read_case(case, ORGANS)
        assert labels is None
        assert "are no Hounsfield units, in which air is near −1000" in problem.what
        assert "bring them there by their slope and intercept" in problem.what


HOUNSFIELD = {
    "padded with -2000": padded(-2000),
    "padded with -3024": padded(-3024),
    "metal": with_voxel(30000.0),
    "one voxel at -2000": with_voxel(-2000),
    "12 bits": lambda image: image.clip(-1024, 3071),
    "air at -1000": lambda image: image.clip(-1000),
    "in much air": lambda image: np.pad(image, 16, constant_values=-1024),
    "a thorax": lambda image: np.where((image > -150) & (image < 60), image - 850, image),
    "integers": lambda image: image.astype(np.int16),
}


@pytest.mark.parametrize("scanner", ["own", "other"])
@pytest.mark.parametrize("change", HOUNSFIELD.values(), ids=HOUNSFIELD)
def test_a_ct_in_hounsfield_units_passes_in_silence(change, scanner, tmp_path):
    for index in range(4):
        image = change(make_phantom(1, "ct", index, scanner)[0])
        save(tmp_path / "ct.nii.gz", image.astype(np.float32))
        case = Case("file", str(tmp_path), "x", "ct", "", tmp_path / "ct.nii.gz", {})
        scan, labels, problems = read_case(case, ORGANS)
        assert problems == []
        assert scan.voxels.shape == labels.shape == image.shape
        assert not labels.any()  # there is no file of them


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("mean", "deviation"), [(75, 25), (110, 15), (35, 12)])
def test_a_crop_without_air_is_used_with_a_warning(mean, deviation, seed, tmp_path):
    liver = np.random.default_rng(seed).normal(mean, deviation, (40, 30, 20)).clip(0, 150)
    save(tmp_path / "ct.nii.gz", liver.astype(np.float32))
    case = Case("file", str(tmp_path), "x", "ct", "", tmp_path / "ct.nii.gz", {})
    scan, labels = read_usable(case, ORGANS)
    [problem] = scan.problems
    assert problem.usable
    assert problem.what.startswith(f"values {liver.min():g} … {liver.max():g} hold no air")
    assert problem.consequence == "right for a crop only; it is used"
    image, labels = make_phantom(1, "ct", 0)
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(labels == 1))
    save(tmp_path / "ct.nii.gz", image[box])
    assert [p for p in read_usable(case, ORGANS)[0].problems if "hold no air" not in p.what] == []


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_label_map_is_no_scan(modality, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, modality, 1))
    for values in (make_phantom(1, modality, 0)[1], np.arange(31)[make_phantom(1, "ct", 0)[1] * 6]):
        edit(case.image, values.astype(np.float32))
        [problem] = read_case(case, ORGANS)[2]
        assert problem.what == f"has {len(np.unique(values))} different values only, as a label map"
        assert not problem.usable


def test_an_mri_of_which_normalization_leaves_nothing_is_refused(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "mri", 1))
    image = np.zeros((32, 32, 32), np.float32)
    image[:4, :4, :4] = np.arange(1, 65).reshape(4, 4, 4)
    assert not normalize(image, "mri").any()
    edit(case.image, image)
    [problem] = read_case(case, ORGANS)[2]
    assert problem.what == "almost every voxel is 0, so that normalization makes all of them 0"
    assert not problem.usable
    image[:8, :8, :8] = np.arange(512).reshape(8, 8, 8)
    assert normalize(image, "mri").any()
    edit(case.image, image)
    assert read_case(case, ORGANS)[2] == []


@pytest.mark.parametrize(
    "shape", [(512, 512, 30), (300, 300, 300), (64, 64, 64), (7, 5, 3), (1,) * 3]
)
def test_a_sample_is_of_every_row_column_and_slice(shape):
    places = np.arange(np.prod(shape)).reshape(shape)
    taken = sample(places)
    assert len(np.unique(taken)) == len(taken) >= min(places.size, 9_000)
    assert len(taken) <= 20_000
    for axis, found in enumerate(np.unravel_index(taken, shape)):
        assert set(found) == set(range(shape[axis]))


def test_a_grid_too_small_for_a_body_is_mentioned(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in tmp_path.rglob("*.nii.gz"):
        edit(path, affine=np.diag([0.009, 0.009, 0.009, 1]))  # metres, but nothing says so
    _, labels, [problem] = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    assert str(problem) == (
        f"{case.image}: is 0.288 × 0.288 × 0.288 mm large, less than a body; are its voxel sizes "
        "right?"
    )
    assert problem.usable


def test_what_is_wrong_with_scan_and_labels_alike_is_said_once(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in tmp_path.rglob("*.nii.gz"):
        make_forms_disagree(path)
    [problem] = read_case(case, ORGANS)[2]
    assert problem.file == case.image


def test_an_id_that_stands_in_a_folder_twice_counts_once(tmp_path):
    first, second = find_cases(write_nnunet(tmp_path / "a", "mri", 2))
    again = first._replace(image=first.image.with_name("copy_0000.nii.gz"))
    elsewhere = first._replace(folder=str(tmp_path / "b"))
    kept, problems = split_duplicates([first, second, again, elsewhere])
    assert kept == [first, second, elsewhere]
    what = "the id case_000 stands in this folder twice"
    assert problems == [Problem(again.image, what, "only the first one can be used")]
    assert not problems[0].usable


# ------------------------------------------------------------------------------ on the model's grid


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_is_prepared(write, modality, tmp_path):
    write(tmp_path, modality, 2)
    cases = find_cases(tmp_path, modality)
    assert {case.layout for case in cases} == {write.__name__.removeprefix("write_")}
    assert [case.modality for case in cases] == [modality] * 2
    for index, case in enumerate(cases):
        image, labels = make_phantom(1, modality, index)
        volume, read_target, files, *_ = load_case(case, ORGANS, SPACING)
        assert (volume.id, volume.modality) == (case.id, modality)
        assert files == fingerprint(case, ORGANS)
        np.testing.assert_array_equal(volume.labels, labels)
        np.testing.assert_array_equal(read_target()[0], labels)
        np.testing.assert_allclose(volume.image, normalize(image, modality), atol=1e-4)
        assert volume.labelled.all()


@pytest.mark.parametrize("codes", ["LPS", "ASR", "PIL", "SLA"])
def test_any_orientation_is_prepared_as_canonical(codes, tmp_path):
    image, labels = make_phantom(1, "ct", 0)
    write_totalsegmentator(tmp_path, "ct", 1)
    for path in tmp_path.rglob("*.nii.gz"):
        nifti = nibabel.load(path)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(nifti.affine),
            nibabel.orientations.axcodes2ornt(tuple(codes)),
        )
        nibabel.save(nifti.as_reoriented(turn), path)
    volume = load_case(find_cases(tmp_path)[0], ORGANS, SPACING).volume
    np.testing.assert_array_equal(volume.labels, labels)
    np.testing.assert_allclose(volume.image, normalize(image, "ct"), atol=1e-4)


@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_is_prepared_through_awkward_affines(write, tmp_path):
    write(tmp_path, "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    volume = load_case(find_cases(tmp_path)[0], ORGANS, SPACING).volume
    labels = make_phantom(1, "mri", 0)[1]
    # Canonical again, but for the flips: column j of the affine runs along ±x of axis order[j].
    turned = np.flip(labels, [axis for axis in range(3) if flips[axis] < 0])
    np.testing.assert_array_equal(volume.labels, turned)


def test_resampling_agrees_with_scipy(tmp_path):
    """Anisotropic voxels onto a cubic grid: the same as map_coordinates at the cells' centres."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(20, 16, 9)), 1.5).astype(np.float32)
    write_totalsegmentator(tmp_path, "mri", 1)
    affine = np.diag([1.5, 2.5, 6.0, 1.0])
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, image if path.name == "mri.nii.gz" else (image > 0.1).astype(np.uint8), affine)
    volume, read_target, *_ = load_case(find_cases(tmp_path)[0], ORGANS[:1], 3.0)
    assert volume.image.shape == (10, 13, 18)  # 30 / 3, 40 / 3 and 54 / 3 mm
    centres = [
        (np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(image.shape, (10, 13, 18), strict=True)
    ]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"))
    expected = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
    np.testing.assert_allclose(volume.image, normalize(expected, "mri"), atol=1e-3)
    inside = ndimage.map_coordinates((image > 0.1).astype(float), grid, order=1, mode="nearest")
    clear = abs(inside - 0.5) > 1e-3
    np.testing.assert_array_equal(volume.labels[clear], (inside > 0.5)[clear])
    target, spacing = read_target()
    np.testing.assert_array_equal(target, image > 0.1)
    assert spacing == pytest.approx((1.5, 2.5, 6.0))


@pytest.mark.parametrize("cached", [False, True])
def test_what_a_case_is_scored_on_is_read_with_it_and_not_again(cached, tmp_path):
    write_nnunet(tmp_path / "mri", "mri", 1)
    affine = awkward_affine((1.5, 2.5, 6.0), (-1, 1, -1), (1, 2, 0))
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.asarray(nibabel.load(path).dataobj)[:30, :, 3:], affine)
    [case] = find_cases(tmp_path / "mri")
    scan, labels = read_usable(case, ORGANS)
    found, _ = load_cases([case], ORGANS, 12.0, tmp_path / "cache" if cached else None)
    shutil.rmtree(tmp_path / "mri")
    target, spacing = found[case.image].read_target()
    np.testing.assert_array_equal(target, labels)
    assert (target.dtype, spacing) == (np.uint8, scan.spacing)
    assert len(set(spacing)) == 3
    assert len(pack_target(labels, spacing)) < labels.size / 4


def test_a_volume_knows_what_its_data_set_labels(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1}
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1, labels=labels))
    volume = load_case(case, ["pancreas", "spleen"], SPACING).volume
    assert volume.labelled.tolist() == [True, False, True]
    np.testing.assert_array_equal(volume.labels, 2 * (make_phantom(1, "mri", 0)[1] == 3))


@pytest.mark.parametrize("name", ["ct", "segmentations/liver"])
def test_a_bad_file_is_named(name, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    truncate(tmp_path / "s0000" / f"{name}.nii.gz")
    with pytest.raises(DataError, match=f"s0000/{name}.nii.gz: cannot be read"):
        load_case(case, ORGANS, SPACING)


# --------------------------------------------------------------------------------------- many cases


def test_many_cases_come_back_in_order(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 16)
    cases = find_cases(tmp_path / "ct")
    found, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    assert list(found) == [case.image for case in cases]
    for index in (0, 15):
        plain = load_case(cases[index], ORGANS, 12.0).volume
        np.testing.assert_array_equal(found[cases[index].image].volume.image, plain.image)


def test_bad_cases_and_repeated_ids_stop_the_loading_or_are_left_out(tmp_path):
    cases = find_cases(write_nnunet(tmp_path, "mri", 3))
    truncate(cases[1].image)
    bad = f"{cases[1].image}: cannot be read"
    with pytest.raises(DataError, match=rf"{bad}(?s:.*)\(--skip-bad leaves such cases out\)"):
        load_cases(cases, ORGANS, 12.0)
    again = cases[0]._replace(image=tmp_path / "again.nii.gz")
    with pytest.raises(DataError, match=f"{again.image}: the id case_000 stands in this folder"):
        load_cases([cases[0], again], ORGANS, 12.0)
    found, left_out = load_cases([*cases, again], ORGANS, 12.0, skip_bad=True)
    assert list(found) == [cases[0].image, cases[2].image]
    assert len(left_out) == 2
    assert left_out[0].startswith(f"{again.image}: the id case_000")
    assert left_out[1].startswith(bad)


def test_the_first_bad_case_ends_the_reading(tmp_path, monkeypatch):
    cases = find_cases(write_nnunet(tmp_path, "mri", 1)) * 1000
    cases = [case._replace(id=f"case_{i:03d}") for i, case in enumerate(cases)]
    read = []

    def load(case, *args):
        read.append(case.id)
        time.sleep(0.01)
        raise DataError(f"{case.id} is bad")

    monkeypatch.setattr(cases_module, "load_case", load)
    with pytest.raises(DataError, match="case_000 is bad"):
        load_cases(cases, ORGANS, 12.0)
    assert len(read) < 100
    count = len(read)
    time.sleep(0.05)
    assert len(read) == count


def test_a_case_that_memory_does_not_hold_is_a_bad_one_and_a_bug_is_not(tmp_path, monkeypatch):
    cases = find_cases(write_nnunet(tmp_path, "mri", 1))

    errors = [MemoryError("too much"), RuntimeError("can't allocate memory: too much")]
    errors.append(RuntimeError("a bug"))

    def read(*_):
        raise errors.pop(0)

    monkeypatch.setattr(cases_module, "read_usable", read)
    for _ in range(2):
        with pytest.raises(DataError, match="0000.nii.gz: too large for this .*too much"):
            load_cases(cases, ORGANS, 12.0)
    with pytest.raises(RuntimeError, match="a bug"):
        load_cases(cases, ORGANS, 12.0, skip_bad=True)


def test_the_largest_case_tells_what_memory_reading_takes(tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path, "ct", 3))
    cases[0].image.unlink()
    cases[1].image.write_bytes(b"no NIfTI")
    assert peak_bytes(cases[:2], 9.0) == 0
    assert peak_bytes(cases, 9.0) == PEAK * 2 * 32**3
    assert peak_bytes([], 9.0) == 0
