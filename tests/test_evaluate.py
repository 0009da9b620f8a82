"""Sliding window against models whose answer is known; metrics by counting and by MONAI's."""

import math

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

import evaluate
from evaluate import dice, dice_by_label, hd95, hd95_and_nsd, nsd, score_case, sliding_window


def count_dice(prediction, target):
    pairs = list(zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    both, size = sum(p and t for p, t in pairs), sum(p + t for p, t in pairs)
    return 2 * both / size


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 5, 3)])
def test_dice_by_counting(shape):
    rng = np.random.default_rng(0)
    prediction, target = rng.random(shape) < 0.4, rng.random(shape) < 0.6
    assert dice(prediction, target) == pytest.approx(count_dice(prediction, target))
    scores = torch.tensor(prediction * 1.0, requires_grad=True)  # its mask is part of a graph
    assert dice(scores > 0.5, target) == dice(prediction, target)


@pytest.mark.parametrize("metric", [dice, lambda *masks: hd95(*masks, [1])])
@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ((np.ones(3), np.ones(3, bool)), "boolean"),
        ((np.ones(3, bool), np.ones(3)), "boolean"),
        ((np.ones(3, bool), np.ones(1, bool)), r"one shape, not bool \(3,\) and bool \(1,\)"),
        ((torch.ones(3, requires_grad=True),) * 2, "two boolean arrays"),  # no error of NumPy's
    ],
)
def test_other_masks_are_refused(metric, masks, message):
    with pytest.raises(ValueError, match=message):
        metric(*masks)


def test_dice_by_label_is_dice_organ_by_organ():
    rng, classes = np.random.default_rng(0), 20  # more pairs of labels than a byte holds
    for dtype in (np.uint8, np.int64):
        target, prediction = (rng.integers(classes, size=(9, 8, 7)).astype(dtype) for _ in range(2))
        target[target == 3] = prediction[prediction == 5] = prediction[prediction == 6] = 0
        target[target == 6] = 0
        found = dice_by_label(prediction, target, classes)
        pairs = ((prediction == label, target == label) for label in range(1, classes))
        expected = [dice(*masks) if masks[1].any() else math.nan for masks in pairs]
        np.testing.assert_array_equal(found, expected)  # to the bit
        assert np.flatnonzero(np.isnan(found)).tolist() == [2, 5]


@pytest.mark.parametrize("size", [(5, 6, 7), (8, 8, 8), (9, 16, 21), (8, 3, 30)])
@pytest.mark.parametrize(("overlap", "batch_size"), [(0.0, 3), (0.5, 1), (0.7, 3)])
def test_a_model_that_copies_gives_the_volume_back(size, overlap, batch_size):
    volume, shapes = torch.randn(2, *size), set()
    found = sliding_window(lambda x: shapes.add(x.shape) or x, volume, 8, overlap, batch_size)
    torch.testing.assert_close(found, volume)
    assert shapes == {(batch_size, 2, 8, 8, 8)}


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("more", [(0, 0, 0), (1, 2, 1), (-5, 1, -7), (-2, -1, 3)])
def test_equals_monais_sliding_window(more, overlap):
    """Where both cut the same windows: axes whole steps longer than a patch, or voxels shorter."""
    torch.manual_seed(0)
    patch = (8, 4, 12)
    steps = [int(p * (1 - overlap)) if n > 0 else 1 for p, n in zip(patch, more, strict=True)]
    size = [p + n * step for p, n, step in zip(patch, more, steps, strict=True)]
    volume, place, seen = torch.randn(2, *size), torch.randn(patch), []

    def model(x):
        seen.append(x)
        x = x * place  # the answer depends on where in the patch a voxel lies
        return torch.cat([x, x.sum(1, keepdim=True).cos()], dim=1)

    found = sliding_window(model, volume, patch, overlap, batch_size=1)
    ours, padding = seen.copy(), {"mode": "gaussian", "cval": float(volume.min())}
    seen.clear()
    expected = sliding_window_inference(volume[None], patch, 1, model, overlap, **padding)[0]
    assert torch.equal(torch.cat(ours), torch.cat(seen))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "patch", "windows"),
    [
        ((10, 4, 4), 4, 4),  # starts 0, 2, 4, 6
        ((4, 3, 1), 4, 1),
        ((10,), 5, 4),  # steps of 2
        ((3,), 2, 2),
        ((3,), 1, 3),
    ],
)
def test_windows_are_few_and_cover_the_volume(size, patch, windows):
    calls = []
    sliding_window(lambda x: calls.append(1) or x, torch.randn(1, *size), patch, 0.5, 1)
    assert len(calls) == windows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_patches_overlap_by_half_and_come_in_pairs_and_are_blended_in_float32(dtype):
    volume = torch.randn(1, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, shapes = torch.ones((), dtype=dtype, requires_grad=True), []
    found = sliding_window(lambda x: shapes.append(x.shape) or one * x, volume, 8)
    assert shapes == [(2, 1, 8)] * 3  # starts 0, 4, 8, 12 and 16, and the last one again
    assert not found.requires_grad
    torch.testing.assert_close(found, volume.float(), rtol=1e-6, atol=1e-6)


def test_blending_is_the_gaussian_mean_of_the_overlapping_patches():
    """A model that answers with the patch's number: each voxel is their weighted mean, by hand."""
    numbers = iter(range(100))

    def count(x):
        return torch.full_like(x, next(numbers))

    blended = sliding_window(count, torch.zeros(1, 6), patch_size=4, overlap=0.5, batch_size=1)[0]
    weight = [max(math.exp(-(((i - 1.5) / 0.5) ** 2) / 2), 1e-3) for i in range(4)]
    shares = [weight[i] / (weight[i + 2] + weight[i]) for i in (0, 1)]
    assert blended.tolist() == pytest.approx([0, 0, *shares, 1, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("patch", "overlap"), [(4, 1.0), ((4, 4), 0.5), ((4, 4, 0), 0.5), (0, 0.5)]
)
def test_sliding_window_refuses_what_cannot_work(patch, overlap):
    with pytest.raises(ValueError, match=r"overlap .* must lie in \[0, 1\), patch .* fit"):
        sliding_window(lambda x: x, torch.zeros(1, 4, 4, 4), patch, overlap)


@pytest.mark.parametrize("part", [(..., slice(1)), (..., 0), (slice(None), slice(None), slice(1))])
def test_a_model_that_changes_the_size_is_refused(part):
    with pytest.raises(ValueError, match="the model turned patches of .* into"):
        sliding_window(lambda x: x[part], torch.randn(1, 8, 8, 8), 4)


def blob(rng, shape, quantile):
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    return field > np.quantile(field, quantile)


def assert_equals_monai(prediction, target, spacing, tolerance=2.0):
    found = hd95(prediction, target, spacing), nsd(prediction, target, spacing, tolerance)
    both = [torch.tensor(mask)[None, None].float() for mask in (prediction, target)]
    settings = {"include_background": True, "spacing": list(spacing)}
    distance = compute_hausdorff_distance(*both, percentile=95, **settings).item()
    share = compute_surface_dice(*both, [tolerance], **settings).item()
    assert found == pytest.approx((distance, share), rel=1e-5, abs=1e-6)
    assert dice(prediction, target) == pytest.approx(compute_dice(*both).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((20, 24, 18), (1, 1, 1)), ((20, 24, 18), (0.8, 0.7, 2.5)), ((30, 40), (1.5, 0.7))],
)
@pytest.mark.parametrize("quantile", [0.6, 0.9, 0.98])  # many parts at a border to few voxels
def test_metrics_agree_with_monai(shape, spacing, quantile):
    rng = np.random.default_rng(3)
    for _ in range(3):
        assert_equals_monai(blob(rng, shape, quantile), blob(rng, shape, quantile), spacing)


def test_metrics_agree_with_monai_on_odd_masks():
    spacing = (1.0, 2.0, 3.0)
    empty = np.zeros((6, 7, 8), bool)
    one, other, full, slab = (empty.copy() for _ in range(4))
    one[0, 0, 0], other[5, 6, 7], full[:], slab[:, :, 3] = True, True, True, True
    for prediction in (one, other, full, slab):
        for target in (one, other, full, slab):
            assert_equals_monai(prediction, target, spacing, tolerance=3.0)
    assert hd95(one, other, spacing) == pytest.approx(math.sqrt(5**2 + 12**2 + 21**2))


def surface(mask, spacing):
    """Where in mm the voxels with a face neighbour outside lie, looked at one by one."""
    padded, steps = np.pad(mask, 1), np.eye(mask.ndim, dtype=int)
    steps = [*steps, *-steps]
    at = [v for v in np.argwhere(padded) if not all(padded[tuple(v + step)] for step in steps)]
    return np.array(at) * spacing


@pytest.mark.parametrize("mm", [0.2, 0.4, 0.5, 1.0, 2.0])
def test_a_surface_at_the_tolerance_counts_although_a_header_rounds_the_voxel_size(mm):
    """float32 makes 0.2 mm 0.200000003; a cube shifted by the tolerance is within it."""
    n = round(2 / mm)
    target = np.zeros((n + 6, 6, 6), dtype=bool)
    target[1:5, 1:5, 1:5] = True
    spacing = (float(np.float32(mm)) * (1 + 1e-7), mm, mm)
    assert nsd(np.roll(target, n, axis=0), target, spacing, 2.0) == 1
    assert nsd(np.roll(target, n, axis=0), target, spacing, 1.999) < 1


def test_distances_by_brute_force():
    rng, spacing = np.random.default_rng(5), np.array([1.0, 0.5, 4.0])
    masks = blob(rng, (9, 10, 6), 0.8), blob(rng, (9, 10, 6), 0.7)
    a, b = (surface(mask, spacing) for mask in masks)
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    there, back = distances.min(1), distances.min(0)
    farthest = max(np.percentile(there, 95), np.percentile(back, 95))
    assert hd95(*masks, spacing) == pytest.approx(farthest)
    within = (there <= 1.0).sum() + (back <= 1.0).sum()
    assert nsd(*masks, spacing, 1.0) == pytest.approx(within / (len(a) + len(b)))


def test_empty_masks():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    for metric in (dice, lambda *m: hd95(*m, (1, 1)), lambda *m: nsd(*m, (1, 1), 2)):
        assert math.isnan(metric(empty, empty))
    for masks in ((empty, full), (full, empty)):
        assert dice(*masks) == nsd(*masks, (2, 0.5), 2) == 0
        assert hd95(*masks, (2, 0.5)) == pytest.approx(math.hypot(6, 2))  # the diagonal
    assert dice(full, full) == 1


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 0)])
def test_spacing_that_cannot_be_is_refused(spacing):
    full = np.ones((3, 4), bool)
    for metric in (hd95, lambda *args: nsd(*args, 2)):
        with pytest.raises(ValueError, match="spacing"):
            metric(full, full, spacing)


def test_a_case_is_scored_as_its_organs_are_by_themselves(monkeypatch):
    """To the bit; organs at the rim, in several parts, and missing on either side or both."""
    rng, spacing, shape = np.random.default_rng(7), (0.8, 0.7, 2.5), (30, 26, 22)
    maps = [np.zeros(shape, np.uint8) for _ in range(2)]
    for label in (1, 2, 3, 5):
        for labels in maps:
            labels[:24, 3:][blob(rng, (24, 23, 22), 0.9)] = label
    maps[0][maps[0] == 2] = maps[1][maps[1] == 5] = 0
    for labels, label in zip(maps, (3, 1), strict=True):  # each goes beyond the other one
        labels[12:][labels[12:] == label] = 0
    looks, whole, find_objects = [], {}, ndimage.find_objects
    for label, organ in enumerate("abcde", start=1):
        masks = [labels == label for labels in maps]
        distance, share = hd95_and_nsd(*masks, spacing, 2.0)
        outcome = "scored" if masks[0].any() else "missed"
        whole[organ] = {"outcome": outcome, "dice": dice(*masks), "hd95": distance, "nsd": share}
    whole["d"] = {"outcome": "absent"}

    def counted(labels, *args):
        looks.append(labels.size)
        return find_objects(labels, *args)

    monkeypatch.setattr(ndimage, "find_objects", counted)
    assert score_case(*maps, "abcde", spacing) == whole
    assert whole["b"]["outcome"] == "missed"
    assert looks.count(maps[0].size) == 2  # one pass over each label map, not one per organ


def test_scores_of_a_case_by_hand():
    target = np.array([[0, 1, 1, 2, 0, 0]])
    prediction = np.array([[0, 1, 0, 0, 3, 0]])
    organs = ["liver", "spleen", "pancreas", "kidneys", "gallbladder"]
    scores = score_case(prediction, target, organs, (1.0, 2.0), labelled=[True] * 5 + [False])
    distance = pytest.approx(1.9)  # the directions are {0} and {0, 2}: 95th percentiles 0 and 1.9
    missed = {"outcome": "missed", "dice": 0, "hd95": pytest.approx(math.hypot(1, 12)), "nsd": 0}
    assert scores == {
        "liver": {"outcome": "scored", "dice": pytest.approx(2 / 3), "hd95": distance, "nsd": 1},
        "spleen": missed,
        "pancreas": {**missed, "outcome": "scored"},  # it is not there: a false alarm
        "kidneys": {"outcome": "absent"},
        "gallbladder": {"outcome": "unlabelled"},
    }
    scores = score_case(prediction, target, organs, (1.0, 2.5))
    assert scores["gallbladder"] == {"outcome": "absent"}  # where all are labelled
    assert scores["liver"]["nsd"] == pytest.approx(2 / 3)  # within 2 mm
    assert score_case(prediction, target, organs, (1.0, 2.5), 2.5)["liver"]["nsd"] == 1


def test_distances_take_as_many_threads_as_the_process_may_use(monkeypatch):
    used = []

    class Tree(evaluate.cKDTree):
        def query(self, points, workers):
            used.append(workers)
            return super().query(points, workers=workers)

    monkeypatch.setattr(evaluate, "cKDTree", Tree)
    monkeypatch.setattr(evaluate.os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    mask = np.zeros((5, 5, 5), bool)
    mask[1:4, 1:4, 1:4] = True
    assert hd95(mask, np.roll(mask, 1, 0), (1, 1, 1)) == 1
    assert used == [3, 3]
