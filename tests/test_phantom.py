"""Phantoms: point by point in plain NumPy, the published ones, anatomy alike, contrast not."""

import hashlib

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scans.phantom import ANATOMY, ORGANS, SIZE, SPACING, TISSUES, make_phantom

NAMES = list(TISSUES)
NATIVE, ARTERIAL, PORTAL, DELAYED, T1, T2 = np.transpose([TISSUES[name] for name in NAMES])


@pytest.mark.parametrize("scanner", ["own", "other"])
def test_shape_dtype_and_determinism(scanner):
    for modality in ("ct", "mri"):
        image, labels = make_phantom(42, modality, 3, scanner)
        again, same = make_phantom.__wrapped__(
            42, modality, 3, scanner
        )  # conftest.py remembers them
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
    image, labels = make_phantom(42, modality, index)
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


def anatomy(rng):
    """Each voxel a row: which tissue is painted on it last."""
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
    phase = PORTAL if scanner == "own" else [NATIVE, ARTERIAL, DELAYED][rng.integers(0, 3)]
    values = phase + rng.normal(0, 12, len(NAMES))
    values[NAMES.index("air")] = -1000
    if scanner == "own":
        return blur(values[tissue], 0.5, "symmetric") + rng.normal(0, 10, tissue.shape)
    [noise] = smooth_noise(rng, 1, 0.8)
    return blur(values[tissue], 0.8, "symmetric") + 15 * noise


def mri(tissue, rng, scanner):
    own = scanner == "own"
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


def seeded(seed, modality, index, scanner):
    kinds = [("ct", "own"), ("mri", "own"), ("ct", "other"), ("mri", "other")]
    return np.random.default_rng([seed, kinds.index((modality, scanner)), index])


@pytest.mark.parametrize("scanner", ["own", "other"])
@pytest.mark.parametrize("render", [ct, mri])
@pytest.mark.parametrize("index", [2, 12])  # own MRI: a tissue darkened, brightened to the limit
def test_equals_phantoms_made_point_by_point(render, index, scanner):
    modality = render.__name__
    image, labels = make_phantom(7, modality, index, scanner)
    rng = seeded(7, modality, index, scanner)
    tissue = anatomy(rng)
    assert np.array_equal(labels, np.where(tissue > len(ORGANS), 0, tissue))
    np.testing.assert_allclose(image, render(tissue, rng, scanner), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("case", "digest"),
    [
        ((42, "ct", 0), "8190ad20ae2332d9"),
        ((42, "mri", 1), "4e56e439f5fa5d1a"),
        ((42, "mri", 3), "d4bb51b8301ca80b"),
        ((7, "ct", 2), "e601d4133f6086b4"),
        ((7, "ct", 12), "5d27183675232b57"),
        ((7, "mri", 2), "ac0c12c0d71437de"),
        ((7, "mri", 12), "6e8891709f7dc32c"),
        ((0, "ct", 23), "74697ca55f114ec1"),
    ],
)
def test_the_own_scanner_gives_the_bytes_it_gave_before_there_was_another(case, digest):
    image, labels = make_phantom(*case)
    assert hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest().startswith(digest)
    assert np.array_equal(image, make_phantom(*case, scanner="own")[0])


def fitted(image, tissue, kernel):
    """By least squares: what fills each tissue before the kernel, and the noise that is left."""
    kinds = np.stack(
        [blur((tissue == n) * 1.0, kernel, "symmetric").ravel() for n in range(len(NAMES))], axis=1
    )
    values = np.linalg.lstsq(kinds, image.ravel().astype(float), rcond=None)[0]
    return values, image - (kinds @ values).reshape(image.shape)


def next_voxels(noise):
    """The correlation of neighbours."""
    return np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]


def test_the_other_ct_has_its_three_phases_kernel_and_noise():
    """HU copied from the sources beside TISSUES: native plus what is gained, by arithmetic."""
    aorta, liver, spleen = (NAMES.index(name) for name in ("aorta", "liver", "spleen"))
    by_phase = {"native": [], "arterial": [], "delayed": []}
    for index in range(45):
        image, _ = make_phantom(3, "ct", index, "other")
        values, noise = fitted(image, anatomy(seeded(3, "ct", index, "other")), 0.8)
        assert noise.std() == pytest.approx(15, rel=0.02)
        assert next_voxels(noise) == pytest.approx(np.exp(-1 / (4 * 0.8**2)), abs=0.03)
        phase = np.argmin([abs(values[aorta] - hu) for hu in (40, 340, 115)])
        list(by_phase.values())[phase].append(values)
    assert [len(cases) for cases in by_phase.values()] == pytest.approx([15] * 3, abs=9)  # 2.8 σ
    native, arterial, delayed = (np.mean(cases, axis=0) for cases in by_phase.values())
    for values, column in ((native, NATIVE), (arterial, ARTERIAL), (delayed, DELAYED)):
        np.testing.assert_allclose(values, column, atol=4 * 12 / np.sqrt(8))
    assert native[liver] == pytest.approx(56, abs=12)
    assert arterial[spleen] - native[spleen] == pytest.approx((97 + 108) / 2, abs=16)
    assert delayed[liver] - native[liver] == pytest.approx(0.3 * 75 / 0.6, abs=16)


def test_the_own_ct_has_sharper_white_noise():
    image, _ = make_phantom(3, "ct", 0)
    values, noise = fitted(image, anatomy(seeded(3, "ct", 0, "own")), 0.5)
    np.testing.assert_allclose(values, PORTAL, atol=4 * 12)
    assert noise.std() == pytest.approx(10, rel=0.02)
    assert next_voxels(noise) == pytest.approx(0, abs=0.03)


def test_only_the_other_mri_suppresses_fat():
    """At most 0.2 of fat's 0.85 is left beside muscle's 0.29; on the own, 0.35 of 0.75 to 0.95."""
    fat, muscle = NAMES.index("fat"), NAMES.index("muscle")
    brighter = {"own": 0, "other": 0}
    for scanner in brighter:
        for index in range(24):
            image, _ = make_phantom(3, "mri", index, scanner)
            tissue = anatomy(seeded(3, "mri", index, scanner))
            signal = [np.median(image[tissue == n]) for n in (fat, muscle)]
            brighter[scanner] += signal[0] > signal[1]
    assert brighter["own"] > 18
    assert brighter["other"] < 3


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
    cases = [make_phantom(*case, scanner)[1] for scanner in ("own", "other") for case in own]
    for i in range(8):
        for j in range(i):
            assert (cases[i] != cases[j]).any()


@pytest.mark.parametrize("scanner", ["own", "other"])
def test_every_case_has_every_organ_at_a_plausible_size(scanner):
    for modality in ("ct", "mri"):
        for index in range(24):
            labels = make_phantom(42, modality, index, scanner)[1]
            counts = np.bincount(labels.ravel(), minlength=len(ORGANS) + 1)
            assert (counts > 0).all()
            assert counts[0] > 0.8 * SIZE**3
            assert counts[1] == counts[1:].max()  # the liver is the largest


def test_anatomy_has_one_distribution():
    """Mean organ volumes of modalities and scanners agree within what chance allows."""

    def volumes(modality, scanner):
        cases = (make_phantom(7, modality, i, scanner)[1].ravel() for i in range(40))
        return np.stack([np.bincount(labels, minlength=6) for labels in cases])

    first = volumes("ct", "own")
    for kind in (("mri", "own"), ("ct", "other"), ("mri", "other")):
        counts = volumes(*kind)
        standard_error = np.sqrt((first.var(axis=0) + counts.var(axis=0)) / 40)
        assert (abs(first.mean(axis=0) - counts.mean(axis=0)) < 4 * standard_error).all()


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
        with pytest.raises(ValueError, match=f'scanner must be "own" or "other", not {scanner!r}'):
            make_phantom(1, "ct", 0, scanner)
