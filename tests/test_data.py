"""Cases become volumes on the model's grid, and patches are drawn from them."""

import shutil
import threading
import time

import nibabel
import numpy as np
import pytest
import torch
from conftest import (
    awkward_affine,
    save,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)
from scipy import ndimage

import data
from cases import read_usable
from data import (
    cache_bytes,
    check_disk,
    load_case,
    load_cases,
    make_volume,
    normalize,
    patches,
    prefetch,
    read_target,
)
from datasets import ORGANS, DataError, find_cases
from phantom import SPACING, phantom

WRITERS = {
    "totalsegmentator": write_totalsegmentator,
    "nnunet": write_nnunet,
    "amos": write_amos,
}


# ----------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_comes_back(layout, modality, tmp_path):
    WRITERS[layout](tmp_path, modality, 2)
    cases = find_cases(tmp_path, modality)
    assert {case.layout for case in cases} == {layout}
    assert [case.modality for case in cases] == [modality] * 2
    for index, case in enumerate(cases):
        image, labels = phantom(1, modality, index)
        volume = load_case(case, ORGANS, SPACING)
        assert (volume.id, volume.modality, volume.case) == (case.id, modality, case)
        np.testing.assert_array_equal(volume.labels, labels)
        np.testing.assert_array_equal(read_target(volume, SPACING)[0], labels)
        np.testing.assert_allclose(volume.image, normalize(image, modality), atol=1e-4)
        assert volume.labelled.all()


@pytest.mark.parametrize("codes", ["LPS", "ASR", "PIL", "SLA"])
def test_any_orientation_comes_back_canonical(codes, tmp_path):
    image, labels = phantom(1, "ct", 0)
    write_totalsegmentator(tmp_path, "ct", 1)
    for path in tmp_path.rglob("*.nii.gz"):
        nifti = nibabel.load(path)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(nifti.affine),
            nibabel.orientations.axcodes2ornt(tuple(codes)),
        )
        nibabel.save(nifti.as_reoriented(turn), path)
    volume = load_case(find_cases(tmp_path)[0], ORGANS, SPACING)
    np.testing.assert_array_equal(volume.labels, labels)
    np.testing.assert_allclose(volume.image, normalize(image, "ct"), atol=1e-4)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_comes_back_through_awkward_affines(layout, tmp_path):
    WRITERS[layout](tmp_path, "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    volume = load_case(find_cases(tmp_path)[0], ORGANS, SPACING)
    labels = phantom(1, "mri", 0)[1]
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
    volume = load_case(find_cases(tmp_path)[0], ORGANS[:1], 3.0)
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
    target, spacing = read_target(volume, 3.0)
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
    volumes, _ = load_cases([case], ORGANS, 12.0, tmp_path / "cache" if cached else None)
    shutil.rmtree(tmp_path / "mri")
    target, spacing = read_target(volumes[case.image], 12.0)
    np.testing.assert_array_equal(target, labels)
    assert (target.dtype, spacing) == (np.uint8, scan.spacing)
    assert len(set(spacing)) == 3
    assert len(volumes[case.image].target) < labels.size / 4


def test_what_was_made_is_scored_on_the_models_grid():
    volume = make_volume("x", "ct", *phantom(1, "ct", 0), np.ones(6, bool))
    target, spacing = read_target(volume, 9.0)
    np.testing.assert_array_equal(target, phantom(1, "ct", 0)[1])
    assert spacing == (9.0, 9.0, 9.0)


def test_a_volume_knows_what_its_data_set_labels(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1}
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1, labels=labels))
    volume = load_case(case, ["pancreas", "spleen"], SPACING)
    assert volume.labelled.tolist() == [True, False, True]
    np.testing.assert_array_equal(volume.labels, 2 * (phantom(1, "mri", 0)[1] == 3))


def test_foreground_voxels_are_of_their_organ_and_the_same_each_time():
    image, labels = phantom(1, "ct", 0)
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


@pytest.mark.parametrize("name", ["ct", "segmentations/liver"])
def test_a_bad_file_is_named(name, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    truncate(tmp_path / "s0000" / f"{name}.nii.gz")
    with pytest.raises(DataError, match=f"s0000/{name}.nii.gz: cannot be read"):
        load_case(case, ORGANS, SPACING)


# -------------------------------------------------------------------------------------- many cases


def test_many_cases_come_back_in_order(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 16)
    cases = find_cases(tmp_path / "ct")
    volumes, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    assert list(volumes) == [case.image for case in cases]
    for index in (0, 15):
        plain = load_case(cases[index], ORGANS, 12.0)
        np.testing.assert_array_equal(volumes[cases[index].image].image, plain.image)


def test_bad_cases_and_repeated_ids_stop_the_loading_or_are_left_out(tmp_path):
    cases = find_cases(write_nnunet(tmp_path, "mri", 3))
    truncate(cases[1].image)
    bad = f"{cases[1].image}: cannot be read"
    with pytest.raises(DataError, match=rf"{bad}(?s:.*)\(--skip-bad leaves such cases out\)"):
        load_cases(cases, ORGANS, 12.0)
    again = cases[0]._replace(image=tmp_path / "again.nii.gz")
    with pytest.raises(DataError, match=f"{again.image}: the id case_000 stands in this folder"):
        load_cases([cases[0], again], ORGANS, 12.0)
    volumes, left_out = load_cases([*cases, again], ORGANS, 12.0, skip_bad=True)
    assert list(volumes) == [cases[0].image, cases[2].image]
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

    monkeypatch.setattr(data, "load_case", load)
    with pytest.raises(DataError, match="case_000 is bad"):
        load_cases(cases, ORGANS, 12.0)
    assert len(read) < 100
    count = len(read)
    time.sleep(0.05)
    assert len(read) == count


def in_the_cache(cache):
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("spacing", [4.0, SPACING])
def test_headers_tell_what_the_cache_will_take(spacing, tmp_path):
    cases, cache = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 2)), tmp_path / "cache"
    load_cases(cases, ORGANS, spacing, cache)
    foreground = 2 * len(ORGANS) * 16 * data.VOXELS_PER_ORGAN  # at most, and here much of it all
    found = in_the_cache(cache)
    assert found <= cache_bytes(cases, ORGANS, spacing) <= 1.1 * found + foreground


def test_the_disk_must_hold_what_the_cache_lacks(tmp_path, monkeypatch):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 3))
    cache = tmp_path / "a/cache"
    wanted = [cache_bytes(cases[:n], ORGANS, 2.0) for n in range(4)]
    asked, free = [], wanted[2]

    def disk_usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(10 * free, 9 * free, free)

    monkeypatch.setattr(data.shutil, "disk_usage", disk_usage)
    with pytest.raises(DataError, match=r"3 preprocessed .* [\d.]+ GB in .*/a/cache, [\d.]+ GB"):
        check_disk(cases, ORGANS, 2.0, cache)
    assert asked == [tmp_path]  # the folder that is there
    assert check_disk(cases[:2], ORGANS, 2.0, cache).startswith("2 preprocessed scans take 0.0")
    load_cases(cases[:1], ORGANS, 2.0, cache)
    free = wanted[1]
    with pytest.raises(DataError, match="2 preprocessed scans"):
        check_disk(cases, ORGANS, 2.0, cache)
    free = wanted[2]
    assert check_disk(cases, ORGANS, 2.0, cache).startswith("2 preprocessed scans")
    assert check_disk(cases[:1], ORGANS, 2.0, cache) == ""
    assert asked[-1] == cache
    truncate(cases[1].image)  # which reading will say
    assert check_disk(cases, ORGANS, 2.0, cache).startswith("2 preprocessed scans")


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
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
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
        yield torch.stack(images)[:, None], torch.stack(labels).long(), torch.stack(labelled)


def test_patches_are_those_of_the_plain_form_bit_for_bit(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 2)
    cached, _ = load_cases(find_cases(tmp_path / "ct"), ORGANS, 6.0, tmp_path / "cache")
    rng = np.random.default_rng(0)
    made = []
    for shape, organs in (((40, 41, 42), 5), ((17, 60, 20), 3), ((50, 24, 33), 0)):
        labels = (rng.random(shape) < 0.01) * rng.integers(organs + 1, size=shape)
        image = rng.normal(size=shape).astype(np.float32)
        labelled = np.arange(6) <= organs
        made.append(make_volume("x", "ct", image, labels.astype(np.uint8), labelled))
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    args = [*cached.values(), *made], 24, 3, 40
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
    with pytest.raises(DataError, match="case x: .* NaN or infinite"):
        next(patches([volume], 20, 1, 1, torch.Generator().manual_seed(1)))


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
    with pytest.raises(DataError, match="case x: .* NaN"):
        list(prefetch(drawn([poisoned]), pin=False))


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
