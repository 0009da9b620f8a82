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

# --------------------------------------------------------------------------------- the model's grid


def noise(shape):
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.5).astype(np.float32)


def one_hot(labels, classes):
    return (torch.from_numpy(labels == label).float() for label in range(classes))


def interpolate(volume, size):
    """Linear interpolation at the centres of `size` cells that fill the volume, by SciPy."""
    centres = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(volume.shape, size, strict=True)]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"))
    return ndimage.map_coordinates(volume, grid, order=1, mode="nearest")


@pytest.mark.parametrize(
    ("spacing", "target", "size"),
    [
        ((1.5, 2.5, 6.0), 3.0, (10, 13, 18)),  # 30 / 3, 40 / 3 and 54 / 3 mm
        ((1.5, 2.5, 6.0), 1.0, (30, 40, 54)),
        ((1.5, 2.5, 6.0), 3.5, (9, 11, 15)),  # 8.6, 11.4 and 15.4, rounded
        ((0.1, 0.1, 0.1), 9.0, (1, 1, 1)),
    ],
)
def test_images_are_resampled_as_by_scipy(spacing, target, size):
    image = noise((20, 16, 9))
    resampled = resample_image(image, spacing, target)
    assert resampled.shape == size
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, interpolate(image, size), atol=1e-5)


def test_an_image_on_the_grid_stays_as_it_is():
    image = noise((20, 16, 9))
    np.testing.assert_array_equal(resample_image(image, (3.0, 3.0, 3.0), 3.0), image)


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


def test_labels_survive_the_way_to_another_grid_and_back():
    labels = make_phantom(3, "ct", 0)[1].repeat(3, 0).repeat(3, 1).repeat(2, 2)
    coarse = resample_labels(one_hot(labels, 6), (64, 70, 50))
    back = resample_labels(one_hot(coarse, 6), labels.shape)
    liver = 2 * ((back == 1) & (labels == 1)).sum() / ((back == 1).sum() + (labels == 1).sum())
    assert liver > 0.97
    for label in range(1, 6):
        centre, restored = (np.argwhere(x == label).mean(0) for x in (labels, back))
        np.testing.assert_allclose(restored, centre, atol=1.0)


# ----------------------------------------------------------------------------------------- volumes


def test_foreground_voxels_are_of_their_organ_and_the_same_each_time():
    image, labels = make_phantom(1, "ct", 0)
    labels = labels.repeat(2, 0)
    volume = make_volume("x", "ct", image.repeat(2, 0), labels, np.ones(6, bool))
    organ, *voxel = volume.foreground_voxels.T
    np.testing.assert_array_equal(labels[tuple(voxel)], organ)
    assert len(np.unique(volume.foreground_voxels, axis=0)) == len(organ)
    counts = [min((labels == n).sum(), data.VOXELS_PER_ORGAN) for n in range(6)]
    np.testing.assert_array_equal(np.bincount(organ)[1:], counts[1:])
    assert (labels == 1).sum() > data.VOXELS_PER_ORGAN
    again = make_volume("y", "ct", image.repeat(2, 0), labels, np.ones(6, bool))
    np.testing.assert_array_equal(again.foreground_voxels, volume.foreground_voxels)


def test_a_scan_on_the_models_grid_is_resampled_and_normalized():
    scan = 100 * noise((20, 16, 9))
    for modality in ("ct", "mri"):
        found = to_model_grid(scan, (1.5, 2.5, 6.0), modality, 3.0)
        expected = normalize(interpolate(scan, (10, 13, 18)), modality)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert found.dtype == np.float32


def test_normalization_by_modality():
    image = np.linspace(-1000, 1000, 2001, dtype=np.float32)
    ct = normalize(image, "ct")
    clipped = image.clip(-160, 240)
    np.testing.assert_allclose(ct, (clipped - clipped.mean()) / clipped.std(), rtol=1e-4, atol=1e-5)
    mri = normalize(image, "mri")
    low, high = np.sort(image)[[10, 1990]]  # 0.5 and 99.5 % of 2001 values
    clipped = image.clip(low, high)
    np.testing.assert_allclose(
        mri, (clipped - clipped.mean()) / clipped.std(), rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(normalize(np.ones((3, 3), np.float32), "mri")).all()


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


# ----------------------------------------------------------------------------------------- patches


def numbered_volume(shape, organ_at=()):
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    for label, voxel in enumerate(organ_at, start=1):
        labels[voxel] = label
    return make_volume("x", "ct", image, labels, np.array([True, True, False]))


def test_patches_are_windows_of_the_volume():
    volume = numbered_volume((10, 12, 9), [(1, 2, 3), (9, 9, 8)])
    generator = torch.Generator().manual_seed(0)
    for images, labels, labelled in patches([volume], 4, 3, 5, generator):
        assert images.shape == (3, 1, 4, 4, 4)
        assert labels.shape == (3, 4, 4, 4)
        assert labelled.tolist() == [[True, True, False]] * 3
        assert (images.dtype, labels.dtype) == (torch.float32, torch.uint8)
        for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
            corner = np.unravel_index(int(image[0, 0, 0]), volume.image.shape)
            window = tuple(slice(c, c + 4) for c in corner)
            np.testing.assert_array_equal(image, volume.image[window])
            np.testing.assert_array_equal(label, volume.labels[window])


def test_half_of_the_patches_is_centred_on_organs_each_as_often():
    volume = numbered_volume((64, 64, 64), [(5, 5, 5), (40, 40, 40)])
    volume.labels[38:42, 38:42, 38:42] = 2  # the second organ is far larger
    volume = make_volume("x", "ct", volume.image, volume.labels, volume.labelled)
    seen = np.zeros(2)
    for _, labels, _ in patches([volume], 4, 10, 100, torch.Generator().manual_seed(0)):
        seen += [(labels == label).flatten(1).any(1).sum() for label in (1, 2)]
    np.testing.assert_allclose(seen / 1000, [0.25, 0.25], atol=0.05)


def test_cases_are_drawn_with_equal_chance():
    volumes = [numbered_volume((n, 8, 8)) for n in (8, 16, 32)]
    volumes = [v._replace(image=np.full_like(v.image, i)) for i, v in enumerate(volumes)]
    seen = torch.zeros(3)
    for images, *_ in patches(volumes, 4, 10, 90, torch.Generator().manual_seed(0)):
        seen += torch.bincount(images[:, 0, 0, 0, 0].long(), minlength=3)
    np.testing.assert_allclose(seen / 900, [1 / 3] * 3, atol=0.05)


def test_small_volumes_are_padded_and_any_can_be_drawn():
    small, empty = numbered_volume((3, 8, 5), [(1, 1, 1)]), numbered_volume((8, 8, 8))
    small = small._replace(image=small.image + 7)
    generator = torch.Generator().manual_seed(0)
    sums = set()
    for images, labels, _ in patches([small, empty], 8, 1, 20, generator):
        if labels.any():
            assert images.min() == 7
            assert (images != 7).sum() <= small.image.size
        sums.add(float(images.sum()))
    assert len(sums) > 1


def test_patches_depend_on_the_generator_alone():
    volume = numbered_volume((20, 20, 20), [(3, 3, 3)])
    runs = [
        [
            x.sum().item()
            for x, *_ in patches([volume], 8, 2, 6, torch.Generator().manual_seed(seed))
        ]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


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
def test_a_single_voxel_that_is_no_number_is_found(value):
    volume = numbered_volume((20, 20, 20), [(3, 3, 3)])
    volume.image[7, 8, 9] = value
    with pytest.raises(FloatingPointError, match="NaN or infinite") as error:
        next(patches([volume], 20, 1, 1, torch.Generator().manual_seed(1)))
    assert error.value.__notes__ == ["case x"]


def test_prefetching_changes_nothing_and_passes_errors_on():
    volume = numbered_volume((20, 20, 20), [(3, 3, 3)])

    def drawn(volumes):
        return patches(volumes, 8, 2, 6, torch.Generator().manual_seed(1))

    pairs = list(zip(drawn([volume]), prefetch(drawn([volume]), pin=False), strict=True))
    assert len(pairs) == 6
    assert all(
        torch.equal(a, b) for plain, early in pairs for a, b in zip(plain, early, strict=True)
    )
    poisoned = volume._replace(image=np.full_like(volume.image, np.nan))
    with pytest.raises(FloatingPointError, match="NaN") as error:
        list(prefetch(drawn([poisoned]), pin=False))
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


def test_every_part_of_a_batch_is_pinned_if_wanted(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: part + 1)  # as no GPU may be here
    batches = [(torch.zeros(2), torch.ones(3)), (torch.full((1,), 4), torch.full((1,), 6))]
    pinned = list(prefetch(iter(batches), pin=True))
    for a, b in zip(batches, pinned, strict=True):
        assert all(torch.equal(x + 1, y) for x, y in zip(a, b, strict=True))
