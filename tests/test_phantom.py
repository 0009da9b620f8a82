"""Phantoms: point by point in plain NumPy, the published ones, anatomy alike, contrast not."""

import hashlib

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scans.phantom import ANATOMY, ORGANS, SIZE, SPACING, TISSUES, make_phantom

NAMES = list(TISSUES)
NATIVE, ARTERIAL, PORTAL, DELAYED, T1, T2 = np.transpose([TISSUES[name] for name in NAMES])


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


def anatomy(rng):
    """One row per voxel: which tissue is painted on it last."""
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
    return tissue.reshape((SIZE,) * 3)


def ct(tissue, rng, scanner):
    phase = PORTAL if scanner == "seen" else [NATIVE, ARTERIAL, DELAYED][rng.integers(0, 3)]
    values = phase + rng.normal(0, 12, len(NAMES))
    values[NAMES.index("air")] = -1000
    if scanner == "seen":
        return blur(values[tissue], 0.5, "symmetric") + rng.normal(0, 10, tissue.shape)
    [noise] = smooth_noise(rng, 1, 0.8)
    return blur(values[tissue], 0.8, "symmetric") + 15 * noise


def mri(tissue, rng, scanner):
    own = scanner == "seen"
    share = rng.beta(0.5, 0.5) if own else 0.4 + 0.2 * rng.random()
    values = T1 + share * (T2 - T1)
    values = values * np.minimum(np.maximum(rng.normal(1, 0.2, len(NAMES)), 0.5), 1.5)
    values[NAMES.index("fat")] *= 0.35 + 0.65 * rng.random() if own else 0.2 * rng.random()
    [bias] = smooth_noise(rng, 1, SIZE / 3)
    signal = blur(values[tissue], 0.5, "symmetric") * np.exp(bias / (4 if own else 2))
    noise = 0.02 if own else 0.04
    signal = signal + noise * rng.normal(size=signal.shape)
    image = np.sqrt(signal**2 + (noise * rng.normal(size=signal.shape)) ** 2)
    return image * rng.uniform(200, 1000)


@pytest.mark.parametrize("scanner", ["seen", "unseen"])
@pytest.mark.parametrize("render", [ct, mri])
@pytest.mark.parametrize("index", [2, 12])  # own MRI: a tissue darkened, brightened to the limit
def test_equals_phantoms_made_point_by_point(render, index, scanner):
    case = 7, render.__name__, index, scanner
    image, labels = make_phantom(*case)
    assert image.shape == labels.shape == (SIZE,) * 3
    assert (image.dtype, labels.dtype) == (np.float32, np.uint8)
    kinds = [("ct", "seen"), ("mri", "seen"), ("ct", "unseen"), ("mri", "unseen")]
    rng = np.random.default_rng([7, kinds.index((render.__name__, scanner)), index])
    tissue = anatomy(rng)
    assert np.array_equal(labels, np.where(tissue > len(ORGANS), 0, tissue))
    np.testing.assert_allclose(image, render(tissue, rng, scanner), rtol=1e-4, atol=1e-2)
    assert all(map(np.array_equal, make_phantom.__wrapped__(*case), (image, labels)))  # not cached


@pytest.mark.parametrize(
    ("case", "digest"),
    [
        ((42, "ct", 0), "8190ad20ae2332d9"),
        ((42, "mri", 1), "4e56e439f5fa5d1a"),
        ((42, "mri", 3), "d4bb51b8301ca80b"),
    ],
)
def test_the_phantoms_of_docs_results_stay_what_they_are_to_the_bit(case, digest):
    image, labels = make_phantom(*case)
    assert hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest().startswith(digest)
    assert np.array_equal(image, make_phantom(*case, scanner="seen")[0])
    assert ORGANS == ("liver", "kidneys", "spleen", "pancreas", "gallbladder")
    assert SIZE * SPACING == 288  # mm


def test_the_contrast_of_the_unseen_ct_is_that_of_its_sources():
    """HU copied from the sources beside TISSUES: native, and what is gained over it."""
    arterial, delayed = (dict(zip(NAMES, hu - NATIVE, strict=True)) for hu in (ARTERIAL, DELAYED))
    assert NATIVE[NAMES.index("liver")] == 56
    assert arterial["spleen"] == pytest.approx((97 + 108) / 2, abs=1)
    assert 300 <= arterial["aorta"] <= 336
    assert delayed["liver"] == pytest.approx(0.3 * 75 / 0.6, abs=2)


def test_axes_run_left_to_right_back_to_front_and_feet_to_head():
    """As in nibabel's RAS+: the liver is right, the spleen left, kidneys behind, the gallbladder
    in front and below the liver."""
    place = np.zeros((6, 3))
    for index in range(8):
        labels = make_phantom(42, "ct", index)[1]
        place += [np.argwhere(labels == n).mean(axis=0) for n in range(6)]
    _, liver, kidneys, spleen, _, gallbladder = place / 8
    middle = (SIZE - 1) / 2
    assert spleen[0] < middle - 4
    assert liver[0] > middle + 3
    assert kidneys[1] < middle < gallbladder[1]
    assert gallbladder[2] < liver[2]


def test_cases_differ_by_seed_modality_index_and_scanner():
    own = [(1, "ct", 0), (2, "ct", 0), (1, "mri", 0), (1, "ct", 1)]
    cases = [make_phantom(*case, scanner)[1] for scanner in ("seen", "unseen") for case in own]
    for i in range(8):
        for j in range(i):
            assert (cases[i] != cases[j]).any()


@pytest.mark.parametrize("scanner", ["seen", "unseen"])
def test_every_case_has_every_organ_at_a_plausible_size(scanner):
    for modality in ("ct", "mri"):
        for index in range(24):
            labels = make_phantom(42, modality, index, scanner)[1]
            counts = np.bincount(labels.ravel(), minlength=len(ORGANS) + 1)
            assert (counts > 0).all()
            assert counts[0] > 0.8 * SIZE**3
            assert counts[1] == counts[1:].max()  # the liver is the largest


def test_ct_is_in_hounsfield_units_and_mri_swaps_the_order_of_organs():
    liver_minus_spleen = []
    for index in range(24):
        image, labels = make_phantom(42, "ct", index)
        assert 60 < image[labels == 1].mean() < 160
        assert image[0, 0, 0] < -900
        image, labels = make_phantom(42, "mri", index)
        assert image.min() >= 0
        liver_minus_spleen.append(image[labels == 1].mean() - image[labels == 3].mean())
    brighter = np.sum(np.array(liver_minus_spleen) > 0)
    assert 4 <= brighter <= 20


def test_another_modality_or_scanner_is_refused():
    with pytest.raises(ValueError, match='modality must be "ct" or "mri", not \'pet\''):
        make_phantom(1, "pet", 0)
    for scanner in ("third", "", None):
        with pytest.raises(
            ValueError, match=f'scanner must be "seen" or "unseen", not {scanner!r}'
        ):
            make_phantom(1, "ct", 0, scanner)
