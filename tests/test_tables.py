"""Means, deviations and tables by hand."""

import math

import pytest
from test_results import ORGANS, score

from config import Config
from tables import comparisons, mean, summarize, table, title


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
    assert summary["fl"]["mean"] == pytest.approx((0.65, math.sqrt(2 * 0.05**2)))
    lines = table(summary, ["liver"]).splitlines()
    assert lines[0].split("|")[1:4] == [" arm ", " MRI Dice      ", " CT Dice       "]
    assert lines[2] == "| fl  | 0.400 ± 0.283 | 0.900 ± 0.141 | 0.650 ± 0.071 | 0.40 / 0.90    |"
    row = cells(lines[6])
    assert row[:5] == ["fl", "4.0 ± 2.8", "9.0 ± 1.4", "0.200 ± 0.141", "0.450 ± 0.071"]
    assert row[5:] == ["1 / 1", "0 / 0", "0 / 0"]


def test_the_table_shows_what_was_not_scored():
    row = table(summarize([result(1, "ct", liver=0.5)], ["liver"]), ["liver"]).splitlines()[2]
    assert cells(row) == ["fl", "–", "0.500", "–", "– / 0.50"]


def test_what_was_missed_counts_and_what_is_unlabelled_does_not():
    found = [result(1, "mri", liver=0.5, spleen=0.5) for _ in range(3)]
    found[0]["scores"]["spleen"] = {"outcome": "missed", "dice": 0, "hd95": 99.0, "nsd": 0}
    found[1]["scores"]["spleen"] = {"outcome": "unlabelled"}
    summary = summarize(found, ORGANS)
    assert summary["fl"]["spleen", "mri"][0] == 0.25
    assert summary["fl"]["hd95", "mri"][0] == pytest.approx((5 + (99 + 5) / 2) / 2)
    row = cells(table(summary, ORGANS).splitlines()[-1])
    assert row[5:] == ["4 / 0", "1 / 0", "0 / 0"]


def compare(**dices):
    """comparisons of {arm: (Dice on MRI, Dice on CT)}, by line."""
    summary = {
        arm: {("dice", m): (d, math.nan) for m, d in zip(("mri", "ct"), pair, strict=True)}
        for arm, pair in dices.items()
    }
    return comparisons(summary).splitlines()


def test_comparisons_by_hand():
    arms = {"fl": (0.4, 0.8), "fedgin": (0.5, 0.6), "centralized+gin": (0.5, 0.0)}
    arms |= {"mri-only": (0.25, 0.1), "ct-only": (0.2, 0.75), "ct-only+gin": (0.1, 0.7)}
    assert compare(**arms) == [
        "- fedgin against FL: MRI Dice 0.500 to fl's 0.400 (+25%), CT Dice 0.600 to fl's 0.800 "
        "(-25%)",
        "- fedgin against the best local arm: MRI Dice 0.500 to mri-only's 0.250 (+100%), CT Dice "
        "0.600 to ct-only's 0.750 (-20%)",
        "- fedgin against centralized+gin: MRI Dice 0.500 to centralized+gin's 0.500 (+0%), CT "
        "Dice 0.600 to centralized+gin's 0.000",
    ]


def test_ratios_are_compared_with_the_same_ratio():
    arms = {"mri-only": (0.2, 0.1)}
    arms |= {"fl 1:1": (0.4, 0.5), "fedgin 1:1": (0.5, math.nan), "fedgin all": (0.6, 0.5)}
    assert compare(**arms) == [
        "- fedgin 1:1 against FL: MRI Dice 0.500 to fl 1:1's 0.400 (+25%)",
        "- fedgin 1:1 against the best local arm: MRI Dice 0.500 to mri-only's 0.200 (+150%)",
        "- fedgin all against the best local arm: MRI Dice 0.600 to mri-only's 0.200 (+200%), CT "
        "Dice 0.500 to mri-only's 0.100 (+400%)",
    ]
    assert compare(**{"fl": (0.4, 0.5), "centralized+gin": (0.5, 0.6)}) == []


def test_titles():
    assert title(Config(seeds=(1, 2)), "1:1 (2 : 2 cases)") == (
        "## Test scores, limited scenario, MRI : CT 1:1 (2 : 2 cases), seeds 1 2: PHANTOMS "
        "(synthetic volumes, not patients)"
    )
    on_scans = Config(scenario="complete", ct=("a",), mri=("b",))
    assert title(on_scans) == "## Test scores, complete scenario, seeds 42: scans"
