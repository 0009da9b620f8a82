"""Means, deviations and tables by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from test_results import ORGANS, score

from config import Config
from datasets import ORGANS as ALL_ORGANS
from tables import comparisons, mean, paired_difference, report, summarize, tables, title


def result(seed, modality, arm="fl", **dices):
    return {**score("x", **dices), "arm": arm, "seed": seed, "modality": modality}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_leave_out_what_was_not_scored():
    assert mean([1.0, math.nan, 4.0]) == 2.5
    assert math.isnan(mean([math.nan]))
    assert math.isnan(mean([]))


def test_means_and_deviations_by_hand():
    # liver (0.5 + 1.0) / 2, spleen scored once: the mean over organs of the means over cases
    found = [result(1, "mri", liver=0.5, spleen=None), result(1, "mri", liver=1.0, spleen=0.25)]
    summary = summarize(found, ["liver", "spleen"])["fl"]
    assert summary["dice", "mri"][0] == pytest.approx((0.75 + 0.25) / 2)
    assert summary["hd95", "mri"][0] == pytest.approx((7.5 + 2.5) / 2)
    counts = [summary[outcome, "mri"][0] for outcome in ("scored", "missed", "absent")]
    assert counts == [3, 0, 1]
    found = [result(s, m, liver=d) for s, m, d in ((1, "mri", 0.2), (2, "mri", 0.6))]
    found += [result(s, m, liver=d) for s, m, d in ((1, "ct", 1.0), (2, "ct", 0.8))]
    summary = summarize(found, ["liver"])
    assert summary["fl"]["dice", "mri"] == pytest.approx((0.4, math.sqrt(0.08)))
    assert summary["fl"]["dice", "ct"] == pytest.approx((0.9, math.sqrt(0.02)))
    rows = [cells(line) for line in tables(found, ["liver"]).splitlines()]
    assert rows[0] == ["arm", "MRI Dice", "CT Dice", "scored MRI / CT", "missed", "absent"]
    assert rows[2] == ["fl", "0.400 ± 0.283", "0.900 ± 0.141", "1 / 1", "0 / 0", "0 / 0"]
    assert rows[4] == ["arm", "MRI HD95 mm", "CT HD95 mm", "MRI NSD", "CT NSD"]
    assert rows[6] == ["fl", "4.0 ± 2.8", "9.0 ± 1.4", "0.200 ± 0.141", "0.450 ± 0.071"]
    assert rows[8:] == [["MRI / CT Dice", "liver"], ["-" * 13, "-" * 11], ["fl", "0.40 / 0.90"]]


def test_the_table_shows_what_was_not_scored():
    rows = [cells(line) for line in tables([result(1, "ct", liver=0.5)], ["liver"]).splitlines()]
    assert rows[2] == ["fl", "–", "0.500", "0 / 1", "0 / 0", "0 / 0"]
    assert rows[-1] == ["fl", "– / 0.50"]


def test_tables_fit_a_terminal_of_100_columns():
    """The widest of arms with a deviation and with intervals that span 0."""
    found = [
        result(seed, m, arm, **dict.fromkeys(ALL_ORGANS, d)) | {"case": case}
        for arm in ("fedgin 1:5 p=0.25", "centralized+gin 1:5 p=0.25")
        for seed, d in ((1, 0.5), (2, 12.5))
        for m in ("mri", "ct")
        for case in "ab"
    ]
    shown = report(found, ALL_ORGANS)
    assert "fedgin 1:5 p=0.25 − centralized+gin" in shown
    assert max(map(len, shown.splitlines())) == 100


def test_what_was_missed_counts_and_what_is_unlabelled_does_not():
    found = [result(1, "mri", liver=0.5, spleen=0.5) for _ in range(3)]
    found[0]["scores"]["spleen"] = {"outcome": "missed", "dice": 0, "hd95": 99.0, "nsd": 0}
    found[1]["scores"]["spleen"] = {"outcome": "unlabelled"}
    summary = summarize(found, ORGANS)
    assert summary["fl"]["spleen", "mri"][0] == 0.25
    assert summary["fl"]["hd95", "mri"][0] == pytest.approx((5 + (99 + 5) / 2) / 2)
    assert cells(tables(found, ORGANS).splitlines()[2])[3:] == ["5 / 0", "1 / 0", "0 / 0"]


def on_cases(arm, dices, modality="mri", seed=1):
    """Results of an arm on cases 0, 1, …, whose organ has the Dice given."""
    found = [{**score(str(n), liver=d), "modality": modality} for n, d in enumerate(dices)]
    return [{**one, "arm": arm, "seed": seed} for one in found]


def test_a_paired_difference_by_hand():
    """Of cases that differ by 0.1 and 0.3: bootstrap means 0.1, 0.2 and 0.3 with 1/4, 1/2, 1/4."""
    found = on_cases("a", (0.6, 0.9)) + on_cases("b", (0.5, 0.6))
    low, middle, high = paired_difference(found, "a", "b", "mri")
    assert (low, middle, high) == pytest.approx((0.1, 0.2, 0.3))
    assert paired_difference(found, "b", "a", "mri") == pytest.approx((-0.3, -0.2, -0.1))
    assert all(map(math.isnan, paired_difference(found, "a", "b", "ct")))
    assert all(map(math.isnan, paired_difference(on_cases("a", (1,)) * 2, "a", "a", "mri")))


def test_a_paired_difference_averages_seeds_then_cases_then_organs():
    found = []
    for seed, liver, spleen in ((1, 0.5, 0.25), (2, 0.75, 0.25)):
        for arm, sign in (("a", 0), ("b", 1)):
            both = score("x", liver=liver * (1 - sign), spleen=spleen * (1 - sign))
            only = score("y", liver=1.0 - sign, spleen=None)
            found += [{**one, "arm": arm, "seed": seed, "modality": "ct"} for one in (both, only)]
    _, middle, _ = paired_difference(found, "a", "b", "ct")
    liver = ((0.5 + 0.75) / 2 + 1.0) / 2
    assert middle == pytest.approx((liver + 0.25) / 2)


def test_cases_of_two_hospitals_may_have_one_id():
    here = on_cases("a", (0.6,)) + on_cases("b", (0.5,))
    there = on_cases("a", (0.9,)) + on_cases("b", (0.6,))
    found = here + [{**one, "hospital": "there"} for one in there]
    assert paired_difference(found, "a", "b", "mri") == pytest.approx((0.1, 0.2, 0.3))


def test_the_interval_is_scipys():
    """scipy's percentile bootstrap of one organ, on other draws."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.4, 0.9, 40), rng.uniform(0.3, 0.9, 40)
    low, middle, high = paired_difference(on_cases("a", a) + on_cases("b", b), "a", "b", "mri")
    assert middle == pytest.approx((a - b).mean())
    expected = stats.bootstrap((a - b,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.005)


def test_comparisons_by_hand():
    arms = {"mri-only": 0.1, "fl 1:5": 0.5, "fedgin 1:5 p=1": 0.3, "fedgin 1:5 p=0.5": 0.6}
    arms |= {"centralized+gin 1:5 p=1": 0.3, "centralized 1:5": 0.9, "fl 1:1": 0.2}
    arms |= {"ct-only 1:5": 0.3}
    found = [row for arm, d in arms.items() for row in on_cases(arm, (d, d + 0.1))]
    table, note = comparisons(found).split("\n\n")
    assert note == "\\* not distinguishable: the interval spans 0"
    rows = [cells(line) for line in table.splitlines()]
    assert rows[0] == ["difference in Dice [95 %]", "MRI", "CT"]
    assert rows[2:] == [
        ["fedgin 1:5 p=1 − mri-only", "+0.200 [0.200, 0.200]", "–"],
        ["fedgin 1:5 p=1 − fl", "-0.200 [-0.200, -0.200]", "–"],
        ["fedgin 1:5 p=1 − centralized+gin", "+0.000 [0.000, 0.000]*", "–"],
        ["fedgin 1:5 p=1 − ct-only", "+0.000 [0.000, 0.000]*", "–"],
        ["fedgin 1:5 p=0.5 − mri-only", "+0.500 [0.500, 0.500]", "–"],
        ["fedgin 1:5 p=0.5 − fl", "+0.100 [0.100, 0.100]", "–"],
        ["fedgin 1:5 p=0.5 − ct-only", "+0.300 [0.300, 0.300]", "–"],
    ]
    assert comparisons(on_cases("fl", (0.5, 0.6))) == ""


def test_own_and_other_scanners_have_tables_of_their_own():
    own, other = on_cases("fl", (0.25, 0.25)), on_cases("fl", (0.75, 0.75))
    other = [{**one, "hospital": "far", "scanner": "other"} for one in other]
    lines = report(own + other, ORGANS[:1]).splitlines()
    assert lines[0] == "### Scanners of the hospitals that train: mri"
    assert cells(lines[4])[:2] == ["fl", "0.250"]
    second = lines.index("### Scanners of others: far")
    assert cells(lines[second + 4])[:2] == ["fl", "0.750"]
    assert report(other, ORGANS[:1]).splitlines() == lines[second:]


def test_titles():
    found = [result(seed, "mri", liver=1.0) for seed in (2, 1, 2)]
    assert title(Config(seeds=(1,)), found) == (
        "## Test scores, limited scenario, seeds 2 1: PHANTOMS (synthetic volumes, not patients)"
    )
    on_scans = Config(scenario="complete", ct=("a",), mri=("b",))
    assert title(on_scans, found) == "## Test scores, complete scenario, seeds 2 1: scans"
