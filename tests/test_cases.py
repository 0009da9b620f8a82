"""Scans and their labels: what was written comes back, what is wrong is named, all is prepared."""

import contextlib
import shutil
import threading
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
from scans.cases import Volumes, load_cases, read_case, read_usable
from scans.files import DataError
from scans.layouts import Case, find_cases
from scans.phantom import ORGANS, SPACING, make_phantom
from scans.values import sample

WRITERS = [write_totalsegmentator, write_nnunet, write_amos]


def load(cases, organs, spacing, folder, **settings):
    """The prepared cases, in order."""
    return [*load_cases(cases, organs, spacing, folder / "cache", **settings)[0].values()]


def case_of(path, modality="ct"):
    return Case(str(path.parent), "x", modality, "", path, {})


# ----------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_comes_back_and_is_prepared(write, modality, tmp_path):
    cases = find_cases(write(tmp_path / "set", modality, 2), modality)
    assert [case.modality for case in cases] == [modality] * 2
    prepared = load(cases, ORGANS, SPACING, tmp_path)
    for index, case in enumerate(cases):
        image, target = make_phantom(1, modality, index)
        scan, labels, errors, warnings = read_case(case, ORGANS)
        assert (errors, warnings) == ([], [])
        np.testing.assert_array_equal(scan.voxels, image)
        np.testing.assert_array_equal(labels, target)
        assert labels.dtype == np.uint8
        assert scan.spacing == pytest.approx((SPACING,) * 3)
        volume = Volumes(prepared)[index]
        assert (volume.id, volume.modality) == (case.id, modality)
        np.testing.assert_array_equal(volume.labels, target)
        np.testing.assert_allclose(volume.image, normalize(image, modality), atol=1e-4)
        np.testing.assert_array_equal(prepared[index].counts, np.bincount(target.ravel()))
        assert prepared[index].labelled.all()


@pytest.mark.parametrize("write", WRITERS)
def test_labels_follow_their_scan_through_awkward_affines(write, tmp_path):
    write(tmp_path / "set", "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    cases = find_cases(tmp_path / "set")
    scan, labels = read_usable(cases[0], ORGANS)
    # Canonical again, except for the flips: column j of the affine runs along ±x of axis order[j].
    image, target = (np.flip(array, (0, 2)) for array in make_phantom(1, "mri", 0))
    np.testing.assert_array_equal(scan.voxels, image)
    np.testing.assert_array_equal(labels, target)
    [prepared] = load(cases, ORGANS, SPACING, tmp_path)
    np.testing.assert_array_equal(prepared.read_volume().labels, target)


def test_organs_are_numbered_as_asked_for_and_those_that_nobody_labelled_are_known(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "rest": [2, 3, 4, 8, 10]}
    [case] = find_cases(write_nnunet(tmp_path / "mri", "mri", 1, labels=labels))
    target = make_phantom(1, "mri", 0)[1]
    organs = ["spleen", "pancreas", "liver"]
    expected = np.select([target == 1, target == 3], [3, 1])  # the pancreas is not labelled there
    np.testing.assert_array_equal(read_case(case, organs)[1], expected)
    [prepared] = load([case], organs, SPACING, tmp_path)
    np.testing.assert_array_equal(prepared.read_volume().labels, expected)
    np.testing.assert_array_equal(prepared.read_volume().labelled, [True, True, False, True])
    np.testing.assert_array_equal(prepared.labelled, [True, True, False, True])


@pytest.mark.parametrize("factor", [0.9, 1.0000000591])
def test_float_masks_and_a_trailing_axis_are_read(factor, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in case.label_files(ORGANS):
        edit(path, lambda labels: (labels * factor)[..., None])
    _, labels, errors, warnings = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    assert (errors, warnings) == ([], [])


# ----------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("file", "spoil", "message"), SPOILT_CASES)
def test_what_keeps_a_case_from_being_used_is_named(file, spoil, message, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    path = tmp_path / "s0000" / f"{file}.nii.gz"
    spoil(path)
    errors = read_case(case, ORGANS)[2]
    assert message in errors[0]
    assert path.name in errors[0]
    with pytest.raises(DataError) as error:
        read_usable(case, ORGANS)
    assert str(error.value) == "\n".join(errors)
    assert str(tmp_path / "s0000") in str(error.value)


def test_all_that_is_wrong_with_a_case_is_listed(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    masks = tmp_path / "s0000/segmentations"
    edit(case.image, lambda image: image + 1024)
    make_forms_disagree(case.image)
    truncate(masks / "liver.nii.gz")
    (masks / "kidney_left.nii.gz").unlink()
    set_voxel(7)(masks / "spleen.nii.gz")
    _, _, errors, warnings = read_case(case, ORGANS)
    files = [case.image, masks / "liver.nii.gz", masks / "kidney_left.nii.gz"]
    assert [error.split(": ")[0] for error in errors] == [str(file) for file in files]
    assert [warning[:30] for warning in warnings] == [
        "its sform and qform put it at different places"[:30],
        "its mask spleen.nii.gz: has labels"[:30],
    ]
    case.image.unlink()
    assert [error.split(": ")[0] for error in read_case(case, ORGANS)[2]] == [*map(str, files)]


def odd_values(labels):
    labels[-1, -1, :7] = range(100, 107)
    return labels


def test_labels_that_the_data_set_does_not_list_are_mentioned(tmp_path):
    [case] = find_cases(write_amos(tmp_path / "amos", "ct", 1))
    edit(tmp_path / "amos/labelsTr/amos_0001.nii.gz", odd_values)
    _, labels, errors, [warning] = read_case(case, ORGANS)
    assert (errors, warning) == (
        [],
        "its label map: has labels that the data set does not list: 100, 101, 102, 103, 104 and 2 "
        "more; they count as background",
    )
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    [case] = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    edit(tmp_path / "ct/s0000/segmentations/liver.nii.gz", lambda mask: mask * 200)
    scan, labels = read_usable(case, ORGANS)
    assert scan.warnings == [
        "its mask liver.nii.gz: has labels that the data set does not list: 200; values above 0.5 "
        "count as organ"
    ]
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])


def test_what_is_wrong_with_scan_and_labels_alike_is_said_once(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in tmp_path.rglob("*.nii.gz"):
        make_forms_disagree(path)
    expected = ["its sform and qform put it at different places; the sform is used"]
    assert read_case(case, ORGANS)[2:] == ([], expected)


def test_a_grid_too_small_for_a_body_is_mentioned(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in tmp_path.rglob("*.nii.gz"):
        edit(path, affine=np.diag([9, 9, 0.5, 1]))
    _, labels, errors, warnings = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    expected = "is 288 × 288 × 16 mm large, less than a body; are its voxel sizes right?"
    assert (errors, warnings) == ([], [expected])


def resampled(labels):
    """Half a voxel further and back again, linearly."""
    return ndimage.shift(ndimage.shift(labels.astype(float), 0.5, order=1), -0.5, order=1)


@pytest.mark.parametrize(
    ("write", "change", "off"),
    [
        (write_amos, resampled, True),
        (write_nnunet, resampled, True),
        (write_amos, lambda labels: labels * 1.02, True),  # the pancreas is 10
        (write_amos, lambda labels: labels * 1.0025, False),  # as a scale factor leaves it
        (write_totalsegmentator, resampled, False),  # masks of probabilities
    ],
)
def test_a_label_map_between_whole_numbers_is_refused(write, change, off, tmp_path):
    [case] = find_cases(write(tmp_path, "mri", 1))
    target = make_phantom(1, "mri", 0)[1]
    for path in case.label_files(ORGANS):
        edit(path, change)
    _, labels, errors, warnings = read_case(case, ORGANS)
    if off:
        [path] = case.label_files(ORGANS)
        expected = "has values between whole numbers: resampled linearly? Take nearest neighbours"
        assert errors == [f"{path}: {expected}"]
        return
    assert (errors, warnings) == ([], [])
    if write is write_totalsegmentator:
        liver = resampled(target == 1) > 0.5
        np.testing.assert_array_equal((labels == 1)[liver], True)
        assert 0 < liver.sum() < (target == 1).sum()
    else:
        np.testing.assert_array_equal(labels, target)


@pytest.mark.parametrize(("share", "named"), [(0.4, False), (0.6, True), (1.0, True)])
def test_an_organ_that_others_overlap_is_named(share, named, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "mri", 1))
    liver, spleen = (
        make_phantom(1, "mri", 0)[1] == 1,
        tmp_path / "s0000/segmentations/spleen.nii.gz",
    )
    covered = np.zeros(liver.shape, np.uint8)
    covered.ravel()[np.flatnonzero(liver)[: round(share * liver.sum())]] = 1
    edit(spleen, lambda mask: np.maximum(mask, covered))
    _, labels, errors, warnings = read_case(case, ORGANS)
    assert (labels == 1).sum() == round((1 - share) * liver.sum())
    expected = "masks overlap and later ones count: most of the liver is covered"
    assert (errors, warnings) == ([], [expected] * named)
    for side in ("left", "right"):  # both of them in both files
        path = tmp_path / f"s0000/segmentations/kidney_{side}.nii.gz"
        edit(path, (make_phantom(1, "mri", 0)[1] == 1 + ORGANS.index("kidneys")).astype(np.uint8))
    assert read_case(case, ORGANS)[2:] == ([], warnings)


@pytest.mark.parametrize(("modality", "named"), [("ct", True), ("mri", False)])
def test_an_organ_of_a_ct_that_lies_in_air_is_named(modality, named, tmp_path):
    [case] = find_cases(write_nnunet(tmp_path, modality, 1))
    corner = np.zeros((32, 32, 32), np.uint8)
    corner[:3, :3, :3] = 1

    def move(labels):
        """The spleen and the aorta, which is none of the five, to where air is."""
        labels[labels == 1] = 0
        labels[:3, :3, :3], labels[:2, :3, :3] = 1, 8
        return labels

    edit(case.label_files(ORGANS).popitem()[0], move)
    expected = "most of the spleen is air (below −200 HU); are the labels its own?"
    assert read_case(case, [*ORGANS, "aorta"])[2:] == ([], [expected] * named)


# ------------------------------------------------------------------------------- values of a scan


def rescale(a, b=0.0):
    return lambda image: image * a + b


def unit(image):
    return (image - image.min()) / np.ptp(image)


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


def mri(change=lambda image: image):
    return lambda image: change(make_phantom(1, "mri", 0)[0])


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
    "standardized": lambda image: (image - image.mean()) / image.std(),
    "an MRI": mri(),
    "an MRI from 0 to 300": mri(lambda image: 300 * unit(image)),
}
HOUNSFIELD = {
    "padded with -2000": padded(-2000),
    "padded with -3024": padded(-3024),
    "padded with -32768": padded(-32768),
    "metal": with_voxel(30000.0),
    "a voxel of 70000": with_voxel(70000.0),
    "one voxel at -2000": with_voxel(-2000),
    "12 bits": lambda image: image.clip(-1024, 3071),
    "air at -1000": lambda image: image.clip(-1000),
    "padded and turned": lambda image: ndimage.rotate(padded(-3024)(image), 9, order=3, cval=-3024),
    "padded with -9999 and turned": lambda image: ndimage.rotate(
        padded(-9999)(image), 9, order=1, cval=-9999
    ),
    "in much air": lambda image: np.pad(image, 16, constant_values=-1024),
    "a thorax": lambda image: np.where((image > -150) & (image < 60), image - 850, image),
    "integers": lambda image: image.astype(np.int16),
}
WAYS = [pytest.param(way, False, id=name) for name, way in NO_HOUNSFIELD.items()]
WAYS += [pytest.param(way, True, id=name) for name, way in HOUNSFIELD.items()]


@pytest.mark.parametrize("scanner", ["own", "other"])
@pytest.mark.parametrize(("change", "fits"), WAYS)
def test_a_ct_is_in_hounsfield_units_or_refused(change, fits, scanner, tmp_path):
    case = case_of(tmp_path / "ct.nii")
    for index in range(4):
        image = change(make_phantom(1, "ct", index, scanner)[0]).astype(np.float32)
        save(case.image, image)
        scan, labels, errors, warnings = read_case(case, ORGANS)
        assert scan.voxels.shape == labels.shape == image.shape
        assert not labels.any()  # there is no file of them
        if fits:
            assert (errors, warnings) == ([], [])
        else:
            [error] = errors
            assert error.startswith(f"{case.image}: values {image.min():g} … {image.max():g} are ")
            assert "are not Hounsfield units, in which air is near −1000 and soft tissue " in error
            assert error.endswith("at 0 to 100; apply their slope and intercept")


WITHOUT_FAT = ("a thorax",)


@pytest.mark.parametrize("scanner", ["own", "other"])
@pytest.mark.parametrize("name", [name for name in HOUNSFIELD if name not in WITHOUT_FAT])
def test_a_ct_that_is_given_as_mri_is_refused(name, scanner, tmp_path):
    case = case_of(tmp_path / "mri.nii", "mri")
    for index in range(4):
        image = HOUNSFIELD[name](make_phantom(1, "ct", index, scanner)[0]).astype(np.float32)
        save(case.image, image)
        assert read_case(case, ORGANS)[2] == [
            f"{case.image}: values {image.min():g} … {image.max():g} are Hounsfield units, with "
            "air near −1000 and fat near −100; give the scan as CT"
        ]


def phase(limit):
    """Noise in the air, as wide as a phase can be, and a smooth phase in the body."""

    def make(image):
        noise = np.random.default_rng(0).uniform(-1, 1, image.shape)
        smooth = ndimage.gaussian_filter(noise, 4)
        return limit * np.where(image > np.median(image), smooth / abs(smooth).max(), noise)

    return make


MRI = {
    "times 1e-12": rescale(1e-12),
    "times 1e9": rescale(1e9),
    "ADC in m²/s": lambda image: 3e-9 * unit(image),
    "ADC in µm²/s, noisy": lambda image: 3000 * unit(image) - 40,
    "phase, radians": phase(np.pi),
    "phase, GE": phase(3142),
    "phase, Siemens": phase(4096),
    "phase, ±2048": phase(2048),
    "susceptibility, ppb": lambda image: phase(1000)(image) * (image > np.median(image)),
    "standardized": lambda image: (image - image.mean()) / image.std(),
    "thousandths of it": lambda image: 1000 * (image - image.mean()) / image.std(),
    "padded with -1000": padded(-1000),
    "dark, padded with -1024": padded(-1024, lambda image: 150 * unit(image)),
    "a voxel of 1e8": with_voxel(1e8),
}


@pytest.mark.parametrize("change", MRI.values(), ids=MRI)
def test_an_mri_may_have_any_values(change, tmp_path):
    case = case_of(tmp_path / "mri.nii", "mri")
    for index, scanner in ((0, "own"), (1, "own"), (0, "other"), (1, "other")):
        save(case.image, change(make_phantom(1, "mri", index, scanner)[0]).astype(np.float32))
        assert read_case(case, ORGANS)[2:] == ([], [])


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_scale_of_an_mri_does_not_matter(factor, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path / "mri", "mri", 1))
    [plain] = load([case], ORGANS, 11.0, tmp_path)
    edit(case.image, lambda image: image * np.float32(factor))
    [scaled] = load([case], ORGANS, 11.0, tmp_path)
    assert scaled.contents != plain.contents
    images = scaled.read_volume().image, plain.read_volume().image
    np.testing.assert_allclose(*images, atol=1e-5)


def test_a_ct_that_the_window_makes_constant_is_refused(tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    for window in ((2000.0, 3000.0), (-4000.0, -3000.0)):
        what = f"the CT window {window[0]:g} … {window[1]:g} HU makes almost every voxel the same"
        with pytest.raises(DataError, match=f"ct.nii.gz: {what}"):
            load(cases, ORGANS, SPACING, tmp_path, ct_window=window)
        with pytest.raises(DataError, match=what):
            read_usable(cases[0], ORGANS, window)
    assert load(cases, ORGANS, SPACING, tmp_path, ct_window=(-1100.0, -900.0))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("mean", "deviation"), [(75, 25), (110, 15), (35, 12)])
def test_a_crop_without_air_is_used_with_a_warning(mean, deviation, seed, tmp_path):
    case = case_of(tmp_path / "ct.nii")
    liver = np.random.default_rng(seed).normal(mean, deviation, (40, 30, 20)).clip(0, 150)
    save(case.image, liver.astype(np.float32))
    expected = ["has values without air (near −1000 HU), which is right for a crop only"]
    assert read_case(case, ORGANS)[2:] == ([], expected)
    image, labels = make_phantom(1, "ct", 0)
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(labels == 1))
    save(case.image, image[box])
    assert [w for w in read_usable(case, ORGANS)[0].warnings if "without air" not in w] == []


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_label_map_is_no_scan(modality, tmp_path):
    case = case_of(tmp_path / "scan.nii", modality)
    for values in (make_phantom(1, modality, 0)[1], np.arange(31)[make_phantom(1, "ct", 0)[1] * 6]):
        save(case.image, values.astype(np.float32))
        expected = f"has {len(np.unique(values))} different values only, as a label map"
        assert read_case(case, ORGANS)[2] == [f"{case.image}: {expected}"]


def test_an_mri_of_which_normalization_leaves_nothing_is_refused(tmp_path):
    case = case_of(tmp_path / "mri.nii", "mri")
    image = np.zeros((32, 32, 32), np.float32)
    image[:4, :4, :4] = np.arange(1, 65).reshape(4, 4, 4)
    assert not normalize(image, "mri").any()
    save(case.image, image)
    expected = "almost every voxel is 0, so normalization makes all of them 0"
    assert read_case(case, ORGANS)[2] == [f"{case.image}: {expected}"]
    image[:8, :8, :8] = np.arange(512).reshape(8, 8, 8)
    assert normalize(image, "mri").any()
    save(case.image, image)
    assert read_case(case, ORGANS)[2:] == ([], [])


@pytest.mark.parametrize(
    "shape", [(512, 512, 30), (150, 150, 150), (64, 64, 64), (7, 5, 3), (1,) * 3]
)
def test_a_sample_is_of_every_row_column_and_slice(shape):
    places = np.arange(np.prod(shape)).reshape(shape)
    taken = sample(places)
    assert len(np.unique(taken)) == len(taken) >= min(places.size, 9_000)
    assert len(taken) <= 20_000
    for axis, found in enumerate(np.unravel_index(taken, shape)):
        assert set(found) == set(range(shape[axis]))


# ------------------------------------------------------------------------------ on the model's grid


def test_resampling_agrees_with_scipy(tmp_path):
    """Anisotropic voxels onto a cubic grid: the same as map_coordinates at the cells' centres."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(20, 16, 9)), 1.5).astype(np.float32)
    write_totalsegmentator(tmp_path / "set", "mri", 1)
    affine = np.diag([1.5, 2.5, 6.0, 1.0])
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, image if path.name == "mri.nii.gz" else (image > 0.1).astype(np.uint8), affine)
    [prepared] = load(find_cases(tmp_path / "set"), ORGANS[:1], 3.0, tmp_path)
    volume = prepared.read_volume()
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
    target, spacing = prepared.read_target()
    np.testing.assert_array_equal(target, image > 0.1)
    assert spacing == pytest.approx((1.5, 2.5, 6.0))


@pytest.mark.parametrize("window", [(-160.0, 240.0), (-500.0, 900.0)])
def test_a_ct_is_clipped_to_the_window(window, tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    clipped = make_phantom(1, "ct", 0)[0].astype(np.float64).clip(*window)
    expected = (clipped - clipped.mean()) / clipped.std()
    [prepared] = load(cases, ORGANS, SPACING, tmp_path, ct_window=window)
    np.testing.assert_allclose(prepared.read_volume().image, expected, atol=1e-3)


def test_what_a_case_is_scored_on_is_kept_with_it(tmp_path):
    write_nnunet(tmp_path / "mri", "mri", 1)
    affine = awkward_affine((1.5, 2.5, 6.0), (-1, 1, -1), (1, 2, 0))
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.asarray(nibabel.load(path).dataobj)[:30, :, 3:], affine)
    [case] = find_cases(tmp_path / "mri")
    scan, labels = read_usable(case, ORGANS)
    [prepared] = load([case], ORGANS, 12.0, tmp_path)
    shutil.rmtree(tmp_path / "mri")
    target, spacing = prepared.read_target()
    np.testing.assert_array_equal(target, labels)
    assert (target.dtype, spacing) == (np.uint8, scan.spacing)
    assert len(set(spacing)) == 3


# --------------------------------------------------------------------------------------- many cases


def test_bad_cases_stop_the_loading_or_are_left_out(tmp_path):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 4))
    truncate(cases[1].image)
    cases[2].image.unlink()
    bad = f"{cases[1].image}: cannot be read"
    with pytest.raises(DataError, match=rf"{bad}(?s:.*)\(--skip-bad leaves such cases out\)"):
        load(cases, ORGANS, 12.0, tmp_path)
    found, left_out = load_cases(cases, ORGANS, 12.0, tmp_path / "cache", skip_bad=True)
    assert list(found) == [cases[0].image, cases[3].image]
    assert left_out[0].startswith(bad)
    assert left_out[1] == f"{cases[2].image}: is missing"


def test_the_first_bad_case_ends_the_reading_before_another_process_may_write(
    tmp_path, monkeypatch
):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1)) * 1000
    cases = [case._replace(image=tmp_path / f"{i:03d}.nii.gz") for i, case in enumerate(cases)]
    read, running, left = [], [], []

    def read_slowly(case, *_):
        read.append(case.image.name)
        running.append(threading.get_ident())
        time.sleep(0.03 if len(read) > 1 else 0)
        running.remove(threading.get_ident())
        raise DataError(f"{case.image.name} is bad")

    @contextlib.contextmanager
    def only_writer(cache):
        try:
            yield
        finally:
            left.append(len(running))

    monkeypatch.setattr(cases_module, "read_usable", read_slowly)
    monkeypatch.setattr(cases_module, "only_writer", only_writer)
    with pytest.raises(DataError, match="000.nii.gz is bad"):
        load_cases(cases, ORGANS, 12.0, tmp_path)
    assert left == [0]
    assert len(read) < 100
    count = len(read)
    time.sleep(0.05)
    assert len(read) == count


def test_a_case_that_memory_does_not_hold_is_a_bad_one_and_a_bug_is_not(tmp_path, monkeypatch):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    errors = [MemoryError("too much"), RuntimeError("can't allocate memory: too much")]
    errors.append(RuntimeError("a bug"))

    def read(*_):
        raise errors.pop(0)

    monkeypatch.setattr(cases_module, "read_usable", read)
    for _ in range(2):
        with pytest.raises(DataError, match="0000.nii.gz: too large for this .*too much"):
            load(cases, ORGANS, 12.0, tmp_path)
    with pytest.raises(RuntimeError, match="a bug"):
        load(cases, ORGANS, 12.0, tmp_path, skip_bad=True)
