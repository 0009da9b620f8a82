"""Phantoms: point by point in plain NumPy, the published ones, anatomy alike, contrast not."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from phantom import ANATOMY, ORGANS, SIZE, SPACING, TISSUES, phantom

NAMES = list(TISSUES)
CT, T1, T2 = np.transpose([TISSUES[name] for name in NAMES])


def test_shape_dtype_and_determinism():
    for modality in ("ct", "mri"):
        image, labels = phantom(42, modality, 3)
        again, same = phantom.__wrapped__(42, modality, 3)  # conftest.py remembers phantoms
        assert image.shape == labels.shape == (SIZE,) * 3
        assert (image.dtype, labels.dtype) == (np.float32, np.uint8)
        assert np.array_equal(image, again)
        assert np.array_equal(labels, same)
        assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("modality", "index", "voxels", "mean", "deviation"),
    [
        ("ct", 0, [29859, 2115, 313, 305, 103, 73], -419.682016733, 472.249045550),
        ("mri", 1, [30960, 1306, 214, 171, 73, 44], 196.959935947, 194.164798162),
        ("mri", 3, [30998, 1238, 268, 155, 63, 46], 53.8877255029, 49.2013409047),
    ],
)
def test_the_phantoms_of_docs_results_stay_what_they_are(modality, index, voxels, mean, deviation):
    image, labels = phantom(42, modality, index)
    assert np.bincount(labels.ravel()).tolist() == voxels
    assert image.mean(dtype=float) == pytest.approx(mean, rel=1e-6)
    assert image.std(dtype=float) == pytest.approx(deviation, rel=1e-6)
    assert ORGANS == ("liver", "kidneys", "spleen", "pancreas", "gallbladder")
    assert SIZE * SPACING == 288  # mm


def blur(field, sigma, margin):
    """Gaussian weights out to 4 σ along each axis, beyond the margin wrapped or mirrored."""
    reach = int(4 * sigma + 0.5)
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    for axis in range(3):
        padded = np.pad(np.moveaxis(field, axis, 0), [(reach, reach), (0, 0), (0, 0)], margin)
        terms = (w * padded[n : n + SIZE] for n, w in enumerate(weights / weights.sum()))
        field = np.moveaxis(sum(terms), 0, axis)
    return field


def smooth_noise(rng, n, sigma):
    fields = [blur(field, sigma, "wrap") for field in rng.normal(size=(n, SIZE, SIZE, SIZE))]
    return [(field - field.mean()) / field.std() for field in fields]


def point_by_point(modality, rng):
    """Each voxel a row: which tissue is painted on it last, and what the scanner makes of it."""
    points = (2 * np.argwhere(np.ones((SIZE,) * 3)) + 1) / SIZE - 1
    points = Rotation.from_euler("xyz", rng.normal(0, 5, 3), degrees=True).apply(points)
    points = points * rng.normal(1, 0.04, 3)
    points = points + 0.04 * np.stack([f.ravel() for f in smooth_noise(rng, 3, SIZE / 6)], axis=1)
    tissue = np.zeros(len(points), int)
    for name, centre, radii in ANATOMY:
        through = radii[2] == 2  # from the lowest slice to the highest
        shift, scale = rng.normal(0, 0.04, 3), rng.normal(1, 0.03 if through else 0.13, 3)
        centre = np.array(centre) + (0 if through else shift)
        radii = np.array(radii) * np.minimum(np.maximum(scale, 0.75), 1.25)
        tissue[np.linalg.norm((points - centre) / radii, axis=1) < 1] = NAMES.index(name)
    tissue = tissue.reshape((SIZE,) * 3)
    if modality == "ct":
        values = CT + rng.normal(0, 12, len(NAMES))
        values[NAMES.index("air")] = -1000
        image = blur(values[tissue], 0.5, "symmetric") + rng.normal(0, 10, tissue.shape)
    else:
        share = rng.beta(0.5, 0.5)
        values = T1 + share * (T2 - T1)
        values = values * np.minimum(np.maximum(rng.normal(1, 0.2, len(NAMES)), 0.5), 1.5)
        values[NAMES.index("fat")] *= rng.uniform(0.35, 1)
        [bias] = smooth_noise(rng, 1, SIZE / 3)
        signal = blur(values[tissue], 0.5, "symmetric") * np.exp(bias / 4)
        signal = signal + 0.02 * rng.normal(size=signal.shape)
        image = np.sqrt(signal**2 + (0.02 * rng.normal(size=signal.shape)) ** 2)
        image = image * rng.uniform(200, 1000)
    return image, np.where(tissue > len(ORGANS), 0, tissue)


@pytest.mark.parametrize("modality", ["ct", "mri"])
@pytest.mark.parametrize("index", [2, 12])  # MRI with a tissue darkened, brightened to the limit
def test_equals_phantoms_made_point_by_point(modality, index):
    image, labels = phantom(7, modality, index)
    rng = np.random.default_rng([7, {"ct": 0, "mri": 1}[modality], index])
    expected, target = point_by_point(modality, rng)
    assert np.array_equal(labels, target)
    np.testing.assert_allclose(image, expected, rtol=1e-4, atol=1e-2)


def test_axes_run_left_to_right_back_to_front_and_feet_to_head():
    """As in nibabel's RAS+: the liver is right, the spleen left, kidneys behind, the gallbladder
    in front and below the liver."""
    place = np.zeros((6, 3))
    for index in range(8):
        labels = phantom(42, "ct", index)[1]
        place += [np.argwhere(labels == n).mean(axis=0) for n in range(6)]
    _, liver, kidneys, spleen, _, gallbladder = place / 8
    middle = (SIZE - 1) / 2
    assert spleen[0] < middle - 4
    assert liver[0] > middle + 3
    assert kidneys[1] < middle < gallbladder[1]
    assert gallbladder[2] < liver[2]


def test_cases_differ_by_seed_modality_and_index():
    cases = [phantom(*a)[1] for a in ((1, "ct", 0), (2, "ct", 0), (1, "mri", 0), (1, "ct", 1))]
    for i in range(4):
        for j in range(i):
            assert (cases[i] != cases[j]).any()


def test_every_case_has_every_organ_at_a_plausible_size():
    for modality in ("ct", "mri"):
        for index in range(24):
            counts = np.bincount(phantom(42, modality, index)[1].ravel(), minlength=len(ORGANS) + 1)
            assert (counts > 0).all()
            assert counts[0] > 0.8 * SIZE**3
            assert counts[1] == counts[1:].max()  # the liver is the largest


def test_anatomy_has_one_distribution():
    """Mean organ volumes of the modalities agree within what chance allows."""
    counts = {
        m: np.stack([np.bincount(phantom(7, m, i)[1].ravel(), minlength=6) for i in range(40)])
        for m in ("ct", "mri")
    }
    for label in range(1, 6):
        a, b = counts["ct"][:, label], counts["mri"][:, label]
        standard_error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * standard_error


def test_ct_is_in_hounsfield_units_and_mri_swaps_the_order_of_organs():
    liver_minus_spleen = []
    for index in range(24):
        image, labels = phantom(42, "ct", index)
        assert 60 < image[labels == 1].mean() < 160
        assert image[0, 0, 0] < -900
        image, labels = phantom(42, "mri", index)
        assert image.min() >= 0
        liver_minus_spleen.append(image[labels == 1].mean() - image[labels == 3].mean())
    brighter = np.sum(np.array(liver_minus_spleen) > 0)
    assert 4 <= brighter <= 20


def test_another_modality_is_refused():
    with pytest.raises(ValueError, match="modality"):
        phantom(1, "pet", 0)
