"""Whether voxels are what they are said to be: values of CT and MRI, and labels."""

import numpy as np
import pytest
from conftest import edit, save, write_amos, write_nnunet, write_totalsegmentator
from scipy import ndimage

from data import normalize
from scans.cases import read_case, read_usable
from scans.layouts import Case, find_cases
from scans.phantom import ORGANS, make_phantom
from scans.values import sample


def case_of(path, modality="ct"):
    return Case(str(path.parent), "x", modality, "", path, {})


# ----------------------------------------------------------------------------------------- a scan


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


@pytest.mark.parametrize("scanner", ["seen", "unseen"])
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


@pytest.mark.parametrize("scanner", ["seen", "unseen"])
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
    for index, scanner in ((0, "seen"), (1, "seen"), (0, "unseen"), (1, "unseen")):
        save(case.image, change(make_phantom(1, "mri", index, scanner)[0]).astype(np.float32))
        assert read_case(case, ORGANS)[2:] == ([], [])


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
        expected = f"has only {len(np.unique(values))} different values, like a label map"
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


def test_a_grid_too_small_for_a_body_is_mentioned(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in tmp_path.rglob("*.nii.gz"):
        edit(path, affine=np.diag([9, 9, 0.5, 1]))
    _, labels, errors, warnings = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    expected = "is 288 × 288 × 16 mm large, less than a body; are its voxel sizes right?"
    assert (errors, warnings) == ([], [expected])


# ----------------------------------------------------------------------------------------- labels


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
        """The spleen and the aorta, which is not one of the five, to where air is."""
        labels[labels == 1] = 0
        labels[:3, :3, :3], labels[:2, :3, :3] = 1, 8
        return labels

    edit(case.label_files(ORGANS).popitem()[0], move)
    expected = "most of the spleen is air (below −200 HU); are the labels its own?"
    assert read_case(case, [*ORGANS, "aorta"])[2:] == ([], [expected] * named)
