"""Arrays are brought to the model's grid, and patches are drawn from them."""

import threading

import numpy as np
import pytest
import torch
from scipy import ndimage

import data
from data import (
    make_volume,
    normalize,
    patches,
    prefetch,
    resample_image,
    resample_labels,
    to_model_grid,
)
from scans.phantom import make_phantom


def noise(shape):
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.5).astype(np.float32)


def interpolate(volume, size):
    """Linear interpolation at the centres of `size` cells that fill the volume, by SciPy."""
    centres = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(volume.shape, size, strict=True)]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"))
    return ndimage.map_coordinates(volume, grid, order=1, mode="nearest")


@pytest.mark.parametrize(
    ("spacing", "target", "size", "off"),
    [
        ((1.5, 2.5, 6.0), 3.0, (10, 13, 18), 1e-5),  # 30 / 3, 40 / 3 and 54 / 3 mm
        ((1.5, 2.5, 6.0), 1.0, (30, 40, 54), 1e-5),
        ((1.5, 2.5, 6.0), 3.5, (9, 11, 15), 1e-5),  # 8.6, 11.4 and 15.4, rounded
        ((0.1, 0.1, 0.1), 9.0, (1, 1, 1), 1e-5),
        ((3.0, 3.0, 3.0), 3.0, (20, 16, 9), 0),  # it lies on the grid
    ],
)
def test_images_are_resampled_as_by_scipy(spacing, target, size, off):
    image = noise((20, 16, 9))
    resampled = resample_image(image, spacing, target)
    assert resampled.shape == size
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, interpolate(image, size), rtol=0, atol=off)


@pytest.mark.parametrize("size", [(10, 13, 18), (40, 31, 9), (20, 16, 9)])
def test_the_best_class_wins_at_each_voxel_as_by_scipy(size):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 20, 16, 9)).astype(np.float32)
    interpolated = np.stack([interpolate(score, size) for score in logits])
    labels = resample_labels(torch.from_numpy(logits), size)
    assert labels.dtype == np.uint8
    first, second = np.sort(interpolated, axis=0)[[-1, -2]]
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], interpolated.argmax(0)[clear])


def test_foreground_voxels_are_of_their_organ_and_the_same_each_time():
    image, labels = (array.repeat(2, 0) for array in make_phantom(1, "ct", 0))
    volume, again = (make_volume("x", "ct", image, labels, np.ones(6, bool)) for _ in range(2))
    organ, *voxel = volume.foreground_voxels.T
    np.testing.assert_array_equal(labels[tuple(voxel)], organ)
    assert len(np.unique(volume.foreground_voxels, axis=0)) == len(organ)
    counts = [min((labels == n).sum(), data.VOXELS_PER_ORGAN) for n in range(6)]
    np.testing.assert_array_equal(np.bincount(organ)[1:], counts[1:])
    assert (labels == 1).sum() > data.VOXELS_PER_ORGAN
    np.testing.assert_array_equal(again.foreground_voxels, volume.foreground_voxels)


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_scan_on_the_models_grid_is_resampled_and_normalized(modality):
    scan, window = 100 * noise((20, 16, 9)), (-20.0, 30.0)
    found = to_model_grid(scan, (1.5, 2.5, 6.0), modality, 3.0, window)
    expected = normalize(interpolate(scan, (10, 13, 18)), modality, window)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("modality", "window", "clipped"),
    [
        ("ct", (), (-160, 240)),
        ("ct", ((-500.0, 900.0),), (-500, 900)),
        ("mri", (), (-990, 990)),  # 0.5 and 99.5 % of 2001 values
    ],
)
def test_normalization_by_modality(modality, window, clipped):
    image = np.linspace(-1000, 1000, 2001, dtype=np.float32)
    found, clipped = normalize(image, modality, *window), image.clip(*clipped)
    expected = (clipped - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(normalize(np.ones((3, 3), np.float32), modality)).all()


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_normalization_is_by_the_images_own_scale(modality):
    """And of an ordinary image the plain formula, to the last bit."""
    image = 1000 * noise((20, 16, 9))
    low, high = (-160, 240) if modality == "ct" else np.percentile(image, (0.5, 99.5))
    clipped = image.clip(low, high)
    plain = normalize(image, modality)
    expected = (clipped - clipped.mean()) / float(clipped.std())
    np.testing.assert_array_equal(plain, expected.astype(np.float32))
    for factor in (1e-12, 1e9) if modality == "mri" else ():
        np.testing.assert_allclose(normalize(image * np.float32(factor), "mri"), plain, atol=1e-5)
    for value in (0, 1e-9, 0.1, 1e9):
        constant = np.full((5, 5), value, np.float32)
        np.testing.assert_allclose(normalize(constant, modality), 0, atol=0.2)


def plain_patches(volumes, patch, batch_size, steps, generator):
    """patches in plain steps, each of which makes an array of its own."""

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    def one():
        volume = volumes[draw(len(volumes))]
        shape, foreground = volume.labels.shape, volume.foreground_voxels
        starts = [draw(max(n - patch, 0) + 1) for n in shape]
        organs = np.unique(foreground[:, 0])
        if len(organs) and draw(1000) < 500:
            organ = organs[draw(len(organs))]
            voxels = foreground[foreground[:, 0] == organ, 1:]
            wanted = voxels[draw(len(voxels))] - patch // 2
            starts = wanted.clip(0, [max(n - patch, 0) for n in shape])
        window = tuple(slice(start, start + patch) for start in starts)
        image, labels = volume.image[window], volume.labels[window]
        missing = [patch - n for n in image.shape]
        margins = [(n // 2, n - n // 2) for n in missing]
        image = np.pad(image, margins, constant_values=image.min())
        return *map(torch.tensor, (image, np.pad(labels, margins))), torch.tensor(volume.labelled)

    for _ in range(steps):
        images, labels, labelled = zip(*(one() for _ in range(batch_size)), strict=True)
        yield torch.stack(images)[:, None], torch.stack(labels), torch.stack(labelled)


def test_patches_are_those_of_the_plain_form_bit_for_bit():
    rng = np.random.default_rng(0)
    made = []
    for shape, organs in (((40, 41, 42), 5), ((17, 60, 20), 3), ((50, 24, 33), 0)):
        labels = (rng.random(shape) < 0.01) * rng.integers(organs + 1, size=shape)
        image = rng.normal(size=shape).astype(np.float32)
        labelled = np.arange(6) <= organs
        made.append(make_volume("x", "ct", image, labels.astype(np.uint8), labelled))
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    args = made, 24, 3, 40
    pairs = zip(patches(*args, draws[0]), plain_patches(*args, draws[1]), strict=True)
    for found, expected in pairs:
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.shape, a.is_contiguous()) == (b.dtype, b.shape, True)
            assert torch.equal(a, b)
    assert torch.equal(*(draw.get_state() for draw in draws))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("through", [iter, prefetch])
def test_a_single_voxel_that_is_no_number_is_found(value, through):
    image = noise((20, 20, 20))
    image[7, 8, 9] = value
    volume = make_volume("x", "ct", image, np.zeros(image.shape, np.uint8), np.ones(2, bool))
    with pytest.raises(FloatingPointError, match="NaN or infinite") as error:
        next(through(patches([volume], 20, 1, 1, torch.Generator())))
    assert error.value.__notes__ == ["case x"]


def test_the_next_batch_is_drawn_while_this_one_is_in_use():
    second_begun = threading.Event()

    def batches():
        yield (torch.zeros(1),)
        second_begun.set()
        yield (torch.ones(1),)

    following = prefetch(batches(), pin=False)
    [first] = next(following)
    assert second_begun.wait(timeout=10)
    assert first.item() == 0
    assert [batch[0].item() for batch in following] == [1]


@pytest.mark.parametrize("pin", [False, True])
def test_prefetching_changes_nothing_and_pins_every_part_if_wanted(pin, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: part + 1)  # pinning needs a GPU
    batches = [(torch.zeros(2), torch.ones(3)), (torch.full((1,), 4), torch.full((1,), 6))]
    for plain, early in zip(batches, prefetch(iter(batches), pin), strict=True):
        assert all(torch.equal(a + pin, b) for a, b in zip(plain, early, strict=True))
