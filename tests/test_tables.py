"""Means, deviations and tables by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from scans.organs import ORGANS as ALL_ORGANS
from study.config import Training
from study.tables import (
    SCORE,
    comparisons,
    details,
    mean,
    paired_difference,
    score_rows,
    screen,
    summarize,
    tables,
    training_of,
)

ORGANS = ("liver", "spleen")
OF_CASE = {"hospital": "mri", "scanner": "seen"}


def result(seed, modality, arm="fl", case="x", **dices):
    """Rows of a case, one per organ: Dice d, HD95 10 d, NSD d / 2; None for an absent organ.

    arm: a name, or a name, a ratio and p.
    """
    found = {organ: {"outcome": "absent"} for organ in dices}
    for organ, d in dices.items():
        if d is not None:
            found[organ] = {"outcome": "scored", "dice": d, "hd95": 10 * d, "nsd": d / 2}
    name, ratio, p = (arm, "", None) if isinstance(arm, str) else arm
    row = {"seed": seed, "modality": modality, "arm": name, "ratio": ratio, "p": p, "case": case}
    return score_rows({**OF_CASE, **row}, found)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_and_deviations_by_hand():
    # liver (0.5 + 1.0) / 2, spleen scored once: the mean over organs of the means over cases
    found = result(1, "mri", liver=0.5, spleen=None) + result(1, "mri", liver=1.0, spleen=0.25)
    summary = summarize(found, ["liver", "spleen"])["fl"]
    assert summary["dice", "mri"][0] == pytest.approx((0.75 + 0.25) / 2)
    assert summary["hd95", "mri"][0] == pytest.approx((7.5 + 2.5) / 2)
    counts = [summary[outcome, "mri"][0] for outcome in ("scored", "missed", "absent")]
    assert counts == [3, 0, 1]
    found = []
    for seed, modality, d in ((1, "mri", 0.2), (2, "mri", 0.6), (1, "ct", 1.0), (2, "ct", 0.8)):
        found += result(seed, modality, liver=d)
    summary = summarize(found, ["liver"])
    assert summary["fl"]["dice", "mri"] == pytest.approx((0.4, math.sqrt(0.08)))
    assert summary["fl"]["dice", "ct"] == pytest.approx((0.9, math.sqrt(0.02)))
    rows = [cells(line) for line in tables(found, ["liver"]).splitlines()]
    assert rows[0] == ["arm", "MRI Dice", "CT Dice", "scored MRI / CT", "missed", "absent"]
    assert rows[2] == ["fl", "0.400 ± 0.283", "0.900 ± 0.141", "2 / 2", "0 / 0", "0 / 0"]
    assert rows[4] == ["arm", "MRI HD95 mm", "CT HD95 mm", "MRI NSD", "CT NSD"]
    assert rows[6] == ["fl", "4.0 ± 2.8", "9.0 ± 1.4", "0.200 ± 0.141", "0.450 ± 0.071"]
    assert rows[8:] == [["MRI / CT Dice", "liver"], ["-" * 13, "-" * 11], ["fl", "0.40 / 0.90"]]
    found += [{**score, "seed": 3, "outcome": "missed"} for score in result(3, "mri", liver=0.0)]
    [counted] = [line for line in tables(found, ["liver"]).splitlines() if "/ 0 " in line]
    assert cells(counted)[3:] == ["3 / 2", "1 / 0", "0 / 0"]  # one missed organ of one seed


def test_what_was_not_scored_is_left_out():
    assert mean([1.0, math.nan, 4.0]) == 2.5
    assert math.isnan(mean([math.nan]))
    assert math.isnan(mean([]))
    rows = [cells(line) for line in tables(result(1, "ct", liver=0.5), ["liver"]).splitlines()]
    assert rows[2] == ["fl", "–", "0.500", "0 / 1", "0 / 0", "0 / 0"]
    assert rows[-1] == ["fl", "– / 0.50"]


def test_tables_fit_a_terminal_of_100_columns():
    """The widest of arms with a deviation and with intervals that span 0.

    At a ratio, the table of four columns takes three more columns on the screen.
    """
    found = [
        row
        for arm in ("fedgin", "centralized+gin")
        for seed, d in ((1, 0.5), (2, 12.5))
        for m in ("mri", "ct")
        for case in "ab"
        for row in result(seed, m, (arm, "1:5", 0.25), case, **dict.fromkeys(ALL_ORGANS, d))
    ]
    shown = details(found, ALL_ORGANS)
    assert "fedgin 1:5 p=0.25 − centralized+gin" in shown
    assert max(map(len, shown.splitlines())) == 100
    found = [{**row, "ratio": ""} for row in found]
    assert max(map(len, screen(found + of_other(found), ALL_ORGANS).splitlines())) == 99


def test_what_was_missed_counts_and_what_is_unlabelled_does_not():
    (liver, _), (_, spleen) = (result(1, "mri", liver=0.5, spleen=0.5) for _ in range(2))
    missed = {**spleen, "outcome": "missed", "dice": 0, "hd95": 99.0, "nsd": 0}
    nothing = dict.fromkeys(("dice", "hd95", "nsd"), math.nan)
    unlabelled = {**spleen, "outcome": "unlabelled", **nothing}
    found = [liver, missed, liver, unlabelled, liver, spleen]
    summary = summarize(found, ORGANS)
    assert summary["fl"]["spleen", "mri"][0] == 0.25
    assert summary["fl"]["hd95", "mri"][0] == pytest.approx((5 + (99 + 5) / 2) / 2)
    assert cells(tables(found, ORGANS).splitlines()[2])[3:] == ["5 / 0", "1 / 0", "0 / 0"]


def on_cases(arm, dices, modality="mri", seed=1):
    """Rows of an arm on cases 0, 1, …, whose organ has the Dice given."""
    return [
        row for n, d in enumerate(dices) for row in result(seed, modality, arm, str(n), liver=d)
    ]


def test_a_paired_difference_by_hand():
    """Of cases that differ by 0.1 and 0.3: bootstrap means 0.1, 0.2 and 0.3 with 1/4, 1/2, 1/4."""
    a, b = on_cases("a", (0.6, 0.9)), on_cases("b", (0.5, 0.6))
    low, middle, high = paired_difference(a, b, "mri")
    assert (low, middle, high) == pytest.approx((0.1, 0.2, 0.3))
    assert paired_difference(b, a, "mri") == pytest.approx((-0.3, -0.2, -0.1))
    assert all(map(math.isnan, paired_difference(a, b, "ct")))
    one = on_cases("a", (1,))
    assert all(map(math.isnan, paired_difference(one * 2, one, "mri")))


def test_a_paired_difference_averages_seeds_then_cases_then_organs():
    found = {"a": [], "b": []}
    for seed, liver, spleen in ((1, 0.5, 0.25), (2, 0.75, 0.25)):
        for arm, share in (("a", 1), ("b", 0)):
            found[arm] += result(seed, "ct", arm, "x", liver=liver * share, spleen=spleen * share)
            found[arm] += result(seed, "ct", arm, "y", liver=1.0 * share, spleen=None)
    _, middle, _ = paired_difference(found["a"], found["b"], "ct")
    liver = ((0.5 + 0.75) / 2 + 1.0) / 2
    assert middle == pytest.approx((liver + 0.25) / 2)


def elsewhere(rows, hospital="there", scanner="seen"):
    return [{**row, "hospital": hospital, "scanner": scanner} for row in rows]


def of_other(rows):
    return elsewhere(rows, "far", "unseen")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (  # cases of two hospitals may have one id
            on_cases("a", (0.6,)) + elsewhere(on_cases("a", (0.9,))),
            on_cases("b", (0.5,)) + elsewhere(on_cases("b", (0.6,))),
        ),
        (  # a seed or case that only one arm has does not count
            on_cases("a", (0.6, 0.9, 0.1)) + on_cases("a", (0.0, 0.0), seed=2),
            on_cases("b", (0.5, 0.6)) + on_cases("b", (1.0,), seed=3),
        ),
    ],
)
def test_a_case_is_compared_with_itself(a, b):
    assert paired_difference(a, b, "mri") == pytest.approx((0.1, 0.2, 0.3))


def test_the_interval_is_scipys():
    """scipy's percentile bootstrap of one organ, on other draws."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.4, 0.9, 40), rng.uniform(0.3, 0.9, 40)
    low, middle, high = paired_difference(on_cases("a", a), on_cases("b", b), "mri")
    assert middle == pytest.approx((a - b).mean())
    expected = stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", random_state=rng
    )
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.005)


def test_comparisons_by_hand():
    """By the fields of a training: of the arms beside FedGIN, those at its ratio and p."""
    arms = {
        ("mri-only", "", None): 0.1,
        ("fl", "1:5", None): 0.5,
        ("fedgin", "1:5", 1.0): 0.3,
        ("fedgin", "1:5", 0.5): 0.6,
        ("centralized+gin", "1:5", 1.0): 0.3,
        ("centralized", "1:5", None): 0.9,
        ("fl", "1:1", None): 0.2,
        ("ct-only", "1:5", None): 0.3,
        ("ct-only", "1:1", None): 0.7,
    }
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
    assert comparisons([row for row in found if row["arm"].startswith("cent")]) == ""
    alone = [row for row in found if (row["arm"], row["p"]) in (("fedgin", 0.5), ("ct-only", None))]
    assert "*" not in comparisons(alone)
    assert "not distinguishable" not in comparisons(alone)


def test_comparisons_where_all_cases_take_part_and_over_seeds():
    arms = {("ct-only", "", None): 0.1, ("fedgin", "", 1.0): 0.5, ("fl", "1:5", None): 0.2}
    found = [row for arm, d in arms.items() for row in on_cases(arm, (d, d), "ct")]
    found += on_cases(("fedgin", "", 1.0), (0.7, 0.7), "ct", seed=2)
    found += on_cases(("ct-only", "", None), (0.1, 0.1), "ct", seed=2)
    rows = [cells(line) for line in comparisons(found).splitlines()]
    assert rows[2:] == [["fedgin p=1 − ct-only", "–", "+0.500 [0.500, 0.500]"]]


def test_own_and_other_scanners_have_tables_of_their_own():
    own, other = on_cases("fl", (0.25, 0.25)), of_other(on_cases("fl", (0.75, 0.75)))
    lines = details(own + other, ORGANS[:1]).splitlines()
    assert lines[0] == "### Seen scanners: mri"
    assert cells(lines[4])[:2] == ["fl", "0.250"]
    second = lines.index("### Unseen scanners: far")
    assert cells(lines[second + 4])[:2] == ["fl", "0.750"]
    assert details(other, ORGANS[:1]).splitlines() == lines[second:]
    assert details([], ORGANS) == ""


def test_the_screen_by_hand():
    """Two seeds; seen and unseen scanners; what an arm lacks; the missed of all of its rows."""
    gin = ("fedgin", "1:5", 1.0)
    found = [
        *result(1, "mri", liver=0.2, spleen=0.4),
        *result(2, "mri", liver=0.6, spleen=0.8),
        *result(1, "ct", liver=0.5, spleen=None),
        *of_other(result(1, "ct", liver=0.25, spleen=0.75)),
        *result(1, "mri", gin, liver=0.9, spleen=0.7),
        *of_other(result(1, "mri", gin, liver=0.125, spleen=0.125)),
    ]
    missed = {**found[0], "case": "y", "outcome": "missed", "dice": 0.0, "hd95": 99.0, "nsd": 0.0}
    found += [missed, *of_other([missed])]
    table = screen(found, ORGANS)
    # fl, MRI, seed 1: liver (0.2 + 0) / 2, spleen 0.4; seed 2: (0.6 + 0.8) / 2
    middle, spread = (0.25 + 0.7) / 2, (0.7 - 0.25) / math.sqrt(2)
    assert [cells(line) for line in table.split("\n\n")[0].splitlines()] == [
        ["Dice", "MRI seen", "CT seen", "MRI unseen", "CT unseen", "missed"],
        ["-" * 14, "-" * 13, "-" * 7, "-" * 10, "-" * 9, "-" * 6],
        ["fl", f"{middle:.3f} ± {spread:.3f}", "0.500", "0.000", "0.500", "2"],
        ["fedgin 1:5 p=1", "0.800", "–", "0.125", "–", "0"],
    ]
    assert comparisons(found) == ""  # fl is at another ratio
    assert len(table.split("\n\n")) == 1


def test_the_screen_has_columns_of_scanners_that_were_tested_on_and_compares_on_the_first():
    fl, gin = ("fl", "1:5", None), ("fedgin", "1:5", 1.0)
    own = on_cases(fl, (0.25, 0.25), "ct") + on_cases(gin, (0.5, 0.5), "ct")
    other = of_other(on_cases(fl, (0.75, 0.75)) + on_cases(gin, (0.5, 0.5)))
    on_own = ["fedgin 1:5 p=1 − fl", "–", "+0.250 [0.250, 0.250]"]
    on_other = ["fedgin 1:5 p=1 − fl", "-0.250 [-0.250, -0.250]", "–"]
    for found, columns, scanner, compared in (
        (own, ["CT seen"], "seen", on_own),
        (own + other, ["CT seen", "MRI unseen"], "seen", on_own),
        (other, ["MRI unseen"], "unseen", on_other),
    ):
        table, comparison = screen(found, ORGANS[:1]).split("\n\n")
        assert cells(table.splitlines()[0]) == ["Dice", *columns, "missed"]
        heading, _, row = map(cells, comparison.splitlines())
        assert heading == [f"difference in Dice, {scanner} [95 %]", "MRI", "CT"]
        assert row == compared
    assert cells(screen([], ORGANS).splitlines()[0]) == ["Dice", "missed"]


def test_a_score_has_a_column_for_everything_that_is_known_of_it():
    [row] = result(7, "ct", ("fedgin", "1:5", 0.25), liver=0.3)
    [absent] = result(7, "ct", liver=None)
    assert set(row) == set(absent) == set(SCORE)
    assert training_of(row) == Training(7, "fedgin", "1:5", 0.25)
