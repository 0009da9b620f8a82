"""Sliding window against models whose answer is known; Dice by counting; the table by hand."""

import math

import numpy as np
import pytest
import torch

from evaluate import dice, mean_dice, score_case, sliding_window, summarize, table


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


def test_scores_means_and_deviations_by_hand():
    truth = np.array([0, 1, 1, 2])
    assert score_case(np.array([0, 1, 0, 2]), truth, ["liver", "spleen"]) == {
        "liver": pytest.approx(2 / 3),
        "spleen": 1,
    }
    # liver (0.5 + 1.0) / 2, spleen scored once: the mean over organs of the means over cases
    scores = [{"liver": 0.5, "spleen": math.nan}, {"liver": 1.0, "spleen": 0.25}]
    assert mean_dice(scores) == pytest.approx((0.75 + 0.25) / 2)

    def result(seed, modality, liver):
        return {"arm": "fl", "seed": seed, "modality": modality, "dice": {"liver": liver}}

    results = [
        result(1, "mri", 0.2),
        result(2, "mri", 0.6),
        result(1, "ct", 1.0),
        result(2, "ct", 0.8),
    ]
    summary = summarize(results, ["liver"])
    assert summary["fl"]["mri"] == pytest.approx((0.4, math.sqrt(0.08)))
    assert summary["fl"]["ct"] == pytest.approx((0.9, math.sqrt(0.02)))
    assert summary["fl"]["mean"] == pytest.approx((0.65, math.sqrt(2 * 0.05**2)))
    lines = table(summary, ["liver"]).splitlines()
    assert lines[0].split("|")[1:4] == [" arm ", " MRI Dice      ", " CT Dice       "]
    assert lines[2] == "| fl  | 0.400 ± 0.283 | 0.900 ± 0.141 | 0.650 ± 0.071 | 0.40 / 0.90    |"


def test_the_table_shows_what_was_not_scored():
    results = [{"arm": "fl", "seed": 1, "modality": "ct", "dice": {"liver": 0.5}}]
    row = table(summarize(results, ["liver"]), ["liver"]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "fl",
        "–",
        "0.500",
        "–",
        "– / 0.50",
    ]
