"""Sliding window against models whose answer is known; Dice by counting; the table by hand."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from evaluate import dice, hd95, nsd, score_case, sliding_window, summarize, table


def count_dice(pred, label):
    pairs = list(zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True))
    both, size = sum(p and t for p, t in pairs), sum(p + t for p, t in pairs)
    return 2 * both / size


def test_dice_by_counting():
    rng = np.random.default_rng(0)
    for shape in ((7,), (5, 6), (4, 5, 3)):
        pred, label = rng.random(shape) < 0.4, rng.random(shape) < 0.6
        assert dice(pred, label) == pytest.approx(count_dice(pred, label))
        assert dice(torch.tensor(pred), torch.tensor(label)) == dice(pred, label)


def test_dice_of_empty_masks():
    empty, full = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    assert math.isnan(dice(empty, empty))
    assert dice(empty, full) == dice(full, empty) == 0
    assert dice(full, full) == 1


def test_dice_refuses_other_input():
    with pytest.raises(ValueError, match="boolean"):
        dice(np.ones(3), np.ones(3, bool))
    with pytest.raises(ValueError, match="one shape"):
        dice(np.ones(3, bool), np.ones(1, bool))


@pytest.mark.parametrize("size", [(5, 6, 7), (8, 8, 8), (9, 16, 21), (8, 3, 30)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_that_copies_gives_the_volume_back(size, overlap, batch_size):
    volume = torch.randn(2, *size)
    patches = []

    def copy(x):
        assert x.shape == (batch_size, 2, 8, 8, 8)
        patches.append(x)
        return x

    torch.testing.assert_close(sliding_window(copy, volume, 8, overlap, batch_size), volume)
    assert patches


def test_windows_are_few_and_cover_the_volume():
    calls = []
    sliding_window(lambda x: calls.append(1) or x, torch.randn(1, 10, 4, 4), 4, 0.5, batch_size=1)
    assert len(calls) == 4  # starts 0, 2, 4, 6
    calls.clear()
    sliding_window(lambda x: calls.append(1) or x, torch.randn(1, 4, 3, 1), 4, 0.5, batch_size=1)
    assert len(calls) == 1


def test_blending_is_the_gaussian_mean_of_the_overlapping_patches():
    """A model that answers with the patch's number: each voxel is their weighted mean, by hand."""
    numbers = iter(range(100))

    def count(x):
        return torch.full_like(x, next(numbers))

    blended = sliding_window(count, torch.zeros(1, 6), patch_size=4, overlap=0.5, batch_size=1)[0]
    weight = [max(math.exp(-(((i - 1.5) / 0.5) ** 2) / 2), 1e-3) for i in range(4)]
    expected = [
        0,
        0,
        weight[0] / (weight[2] + weight[0]),
        weight[1] / (weight[3] + weight[1]),
        1,
        1,
    ]
    assert blended.tolist() == pytest.approx(expected, abs=1e-6)


def test_small_volumes_are_padded_with_their_minimum():
    seen = []
    sliding_window(lambda x: seen.append(x) or x, torch.full((1, 2, 2, 2), 3.0), 4)
    assert seen[0].unique().tolist() == [3.0]


def test_more_channels_may_come_out_than_go_in():
    volume = torch.randn(1, 9, 5, 6)
    out = sliding_window(lambda x: torch.cat([x, -x, 2 * x], dim=1), volume, (4, 4, 4))
    torch.testing.assert_close(out, torch.cat([volume, -volume, 2 * volume]))


def test_sliding_window_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="overlap"):
        sliding_window(lambda x: x, torch.zeros(1, 4, 4, 4), 4, overlap=1.0)
    with pytest.raises(ValueError, match="patch"):
        sliding_window(lambda x: x, torch.zeros(1, 4, 4, 4), (4, 4))


def blob(rng, shape, quantile):
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    return field > np.quantile(field, quantile)


def monai_distances(pred, label, spacing, tolerance):
    pred, label = (torch.tensor(mask)[None, None].float() for mask in (pred, label))
    settings = {"include_background": True, "spacing": list(spacing)}
    distance = compute_hausdorff_distance(pred, label, percentile=95, **settings)
    return distance.item(), compute_surface_dice(pred, label, [tolerance], **settings).item()


def assert_equals_monai(pred, label, spacing, tolerance=2.0):
    ours = hd95(pred, label, spacing), nsd(pred, label, spacing, tolerance)
    assert ours == pytest.approx(
        monai_distances(pred, label, spacing, tolerance), rel=1e-5, abs=1e-6
    )
    both = (torch.tensor(mask)[None, None].float() for mask in (pred, label))
    assert dice(pred, label) == pytest.approx(compute_dice(*both).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((20, 24, 18), (1, 1, 1)), ((20, 24, 18), (0.8, 0.7, 2.5)), ((30, 40), (1.5, 0.7))],
)
@pytest.mark.parametrize(
    "quantile", [0.6, 0.9, 0.98]
)  # from many components at a border to few voxels
def test_metrics_agree_with_monai(shape, spacing, quantile):
    rng = np.random.default_rng(3)
    for _ in range(3):
        assert_equals_monai(blob(rng, shape, quantile), blob(rng, shape, quantile), spacing)


def test_metrics_agree_with_monai_on_odd_masks():
    spacing = (1.0, 2.0, 3.0)
    empty = np.zeros((6, 7, 8), bool)
    one, other, full, slab = (empty.copy() for _ in range(4))
    one[0, 0, 0], other[5, 6, 7], full[:], slab[:, :, 3] = True, True, True, True
    for pred in (one, other, full, slab):
        for label in (one, other, full, slab):
            assert_equals_monai(pred, label, spacing, tolerance=3.0)
    assert hd95(one, other, spacing) == pytest.approx(math.sqrt(5**2 + 12**2 + 21**2))


def brute_force_surface(mask):
    padded = np.pad(mask, 1)
    surface = []
    for voxel in np.argwhere(padded):
        steps = [
            s * np.eye(mask.ndim, dtype=int)[axis] for axis in range(mask.ndim) for s in (1, -1)
        ]
        if not all(padded[tuple(voxel + step)] for step in steps):
            surface.append(voxel - 1)
    return np.array(surface)


def test_distances_by_brute_force():
    rng, spacing = np.random.default_rng(5), np.array([1.0, 0.5, 4.0])
    pred, label = blob(rng, (9, 10, 6), 0.8), blob(rng, (9, 10, 6), 0.7)
    a, b = brute_force_surface(pred) * spacing, brute_force_surface(label) * spacing
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    there, back = np.sort(distances.min(1)), np.sort(distances.min(0))
    assert hd95(pred, label, spacing) == pytest.approx(
        max(np.percentile(d, 95) for d in (there, back))
    )
    within = (there <= 1.0).sum() + (back <= 1.0).sum()
    assert nsd(pred, label, spacing, 1.0) == pytest.approx(within / (len(a) + len(b)))


def test_distances_of_empty_masks():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert math.isnan(hd95(empty, empty, (1, 1)))
    assert math.isnan(nsd(empty, empty, (1, 1), 2))
    for masks in ((empty, full), (full, empty)):
        assert hd95(*masks, (2, 0.5)) == pytest.approx(math.hypot(6, 2))  # the diagonal
        assert nsd(*masks, (2, 0.5), 2) == 0
    with pytest.raises(ValueError, match="spacing"):
        hd95(full, full, (1, 1, 1))
    with pytest.raises(ValueError, match="spacing"):
        nsd(full, full, (1, 0), 2)


def test_scores_of_a_case_by_hand():
    truth = np.array([[0, 1, 1, 2, 0, 0]])
    pred = np.array([[0, 1, 0, 0, 3, 0]])
    organs = ["liver", "spleen", "pancreas", "kidneys", "gallbladder"]
    scores = score_case(pred, truth, organs, (1.0, 2.0), labelled=[True] * 5 + [False])
    liver = {
        "outcome": "scored",
        "dice": pytest.approx(2 / 3),
        "hd95": pytest.approx(1.9),
        "nsd": 1,
    }
    assert scores["liver"] == liver  # directions {0} and {0, 2}, whose 95th percentile is 1.9
    diagonal = pytest.approx(math.hypot(1, 12))
    missed = {"outcome": "missed", "dice": 0, "hd95": diagonal, "nsd": 0}
    assert scores["spleen"] == missed
    assert scores["pancreas"] == {**missed, "outcome": "scored"}  # it is not there: a false alarm
    assert scores["kidneys"] == {"outcome": "absent"}
    assert scores["gallbladder"] == {"outcome": "unlabelled"}


def result(seed, modality, **organs):
    scores = {
        organ: {"outcome": "scored", "dice": d, "hd95": 10 * d, "nsd": d / 2}
        if d is not None
        else {"outcome": "absent"}
        for organ, d in organs.items()
    }
    return {"arm": "fl", "seed": seed, "modality": modality, "case": "x", "scores": scores}


def test_means_and_deviations_by_hand():
    # liver (0.5 + 1.0) / 2, spleen scored once: the mean over organs of the means over cases
    results = [result(1, "mri", liver=0.5, spleen=None), result(1, "mri", liver=1.0, spleen=0.25)]
    summary = summarize(results, ["liver", "spleen"])["fl"]
    assert summary["dice", "mri"][0] == pytest.approx((0.75 + 0.25) / 2)
    assert summary["hd95", "mri"][0] == pytest.approx((7.5 + 2.5) / 2)
    counts = [summary[outcome, "mri"][0] for outcome in ("scored", "missed", "absent")]
    assert counts == [3, 0, 1]
    results = [result(s, m, liver=d) for s, m, d in ((1, "mri", 0.2), (2, "mri", 0.6))]
    results += [result(s, m, liver=d) for s, m, d in ((1, "ct", 1.0), (2, "ct", 0.8))]
    summary = summarize(results, ["liver"])
    assert summary["fl"]["dice", "mri"] == pytest.approx((0.4, math.sqrt(0.08)))
    assert summary["fl"]["dice", "ct"] == pytest.approx((0.9, math.sqrt(0.02)))
    assert summary["fl"]["mean"] == pytest.approx((0.65, math.sqrt(2 * 0.05**2)))
    lines = table(summary, ["liver"]).splitlines()
    assert lines[0].split("|")[1:4] == [" arm ", " MRI Dice      ", " CT Dice       "]
    assert lines[2] == "| fl  | 0.400 ± 0.283 | 0.900 ± 0.141 | 0.650 ± 0.071 | 0.40 / 0.90    |"
    cells = [cell.strip() for cell in lines[6].strip("|").split("|")]
    assert cells[:5] == ["fl", "4.0 ± 2.8", "9.0 ± 1.4", "0.200 ± 0.141", "0.450 ± 0.071"]
    assert cells[5:] == ["1 / 1", "0 / 0", "0 / 0"]


def test_the_table_shows_what_was_not_scored():
    row = table(summarize([result(1, "ct", liver=0.5)], ["liver"]), ["liver"]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "fl",
        "–",
        "0.500",
        "–",
        "– / 0.50",
    ]
