"""Who trains on what in each arm and scenario."""

import math

import pytest
from test_fedgin import arm, config, hospitals

from arms import ARMS, check_arms, choose_cases, describe_shares, find_arm, label_arms
from datasets import DataError


def test_scenarios():
    limited = ["mri-only", "fl 1:5", "fedgin 1:5 p=1", "centralized+gin 1:5 p=1"]
    assert list(label_arms(config("--scenario", "limited"))) == limited
    complete = ["mri-only", "ct-only", "fl", "fedgin p=1", "centralized+gin p=1"]
    assert list(label_arms(config("--scenario", "complete"))) == complete
    assert list(label_arms(config("--scenario", "complete", "--arms", "ct-only"))) == ["ct-only"]


def test_arms_and_ratios():
    mri_and_ct = hospitals(1)

    def shares(label, *args):
        chosen = choose_cases(config(*args), arm(label, *args), mri_and_ct)
        return {name: (len(cases), steps) for name, (cases, steps) in chosen.items()}

    every = ["--arms", *ARMS]
    assert shares("mri-only") == shares("mri-only+gin p=1", *every) == {"mri": (2, 2)}
    assert shares("ct-only 1:5", *every) == {"ct": (10, 2)}
    assert shares("fedgin 1:5 p=1") == shares("fl 1:5") == {"mri": (2, 2), "ct": (10, 2)}
    pooled = shares("centralized 1:5", *every), shares("centralized+gin 1:5 p=1")
    assert pooled == ({"pooled": (12, 4)},) * 2
    assert shares("fl 1:2") == {"mri": (2, 2), "ct": (4, 2)}
    assert shares("fl all") == {"mri": (2, 2), "ct": (12, 2)}
    assert shares("fl 1:5", "--mri-cases", 1) == {"mri": (1, 2), "ct": (5, 2)}
    complete = config("--scenario", "complete")
    found = choose_cases(complete, label_arms(complete)["fl"], mri_and_ct)
    assert {name: len(cases) for name, (cases, _) in found.items()} == {"mri": 12, "ct": 12}


def test_a_pool_holds_the_cases_that_the_hospitals_would_train_on():
    by_hospital = choose_cases(config(), arm("fl 1:5"), hospitals(1))
    pooled = arm("centralized+gin 1:5 p=1")
    [(pool, _)] = choose_cases(config(), pooled, hospitals(1)).values()
    expected = [(case.modality, case.id) for cases, _ in by_hospital.values() for case in cases]
    assert [(case.modality, case.id) for case in pool] == expected


def test_ratios_and_shares_stand_behind_the_arms_that_differ_by_them():
    args = ["--arms", "mri-only", "fl", "fedgin"]
    assert list(label_arms(config(*args))) == ["mri-only", "fl 1:5", "fedgin 1:5 p=1"]
    found = label_arms(config(*args, "--ratios", "1:1", "all", "--gin-probability", 1, 0.5))
    assert list(found) == [
        *("mri-only", "fl 1:1", "fl all"),
        *("fedgin 1:1 p=1", "fedgin 1:1 p=0.5", "fedgin all p=1", "fedgin all p=0.5"),
    ]
    assert (found["fl 1:1"].ratio, found["fl all"].ratio) == (1, math.inf)
    assert (found["fl 1:1"].gin, found["fedgin 1:1 p=0.5"].gin) == (0, 0.5)
    assert list(label_arms(config("--arms", "mri-only", "fl", "--scenario", "complete"))) == [
        "mri-only",
        "fl",
    ]


def test_a_ratio_is_that_of_the_mri_cases_there_are():
    mri, ct = hospitals(1)
    few = [mri._replace(train=mri.train[:2]), mri._replace(name="b", train=mri.train[2:3]), ct]
    chosen = choose_cases(config("--mri-cases", 5), arm("fl 1:2"), few)
    assert {name: len(cases) for name, (cases, _) in chosen.items()} == {"mri": 2, "b": 1, "ct": 6}


def test_cases_come_from_the_hospitals_in_turns():
    settings = config("--mri-cases", 3)
    mri, ct = hospitals(1)
    small = mri._replace(name="small", train=mri.train[5:6])
    chosen = choose_cases(settings, arm("fl 1:1"), [mri, small, ct])
    ids = {name: [case.id for case in cases] for name, (cases, _) in chosen.items()}
    assert ids == {
        "mri": ["phantom00", "phantom01"],
        "small": ["phantom05"],
        "ct": ["phantom00", "phantom01", "phantom02"],
    }
    pooled = arm("centralized+gin 1:1 p=1")
    _, steps = choose_cases(settings, pooled, [mri, small, ct])["pooled"]
    assert steps == 6


def test_an_arm_without_cases_is_refused():
    def check(held, *names):
        check_arms(config("--arms", *names), held)

    with pytest.raises(DataError, match="arm fl 1:5 needs CT training cases .* --ct"):
        check({"mri"}, "fl")
    with pytest.raises(DataError, match="arm mri-only needs MRI training cases .* --mri"):
        check({"ct"}, "ct-only", "mri-only")
    with pytest.raises(DataError, match="arm fedgin 1:5 p=1 needs MRI training cases"):
        check({"ct"}, "fedgin")
    check({"mri"}, "mri-only+gin")
    check({"ct"}, "ct-only")
    only_ct = hospitals(1)[1:]
    [(cases, _)] = choose_cases(config(), ARMS["ct-only"]._replace(ratio=5), only_ct).values()
    assert len(cases) == 10


def test_shares_say_who_trains_on_what():
    settings = config("--ratios", "1:1", "1:5", "--mri-cases", 3, "--arms", "fl", "centralized")
    assert describe_shares(settings, hospitals(1)).splitlines() == [
        "mri: 12 cases to train, 4 to validate, 8 to test",
        "ct: 12 cases to train, 4 to validate, 8 to test",
        "fl 1:1:                     training cases: mri 3, ct 3",
        "fl 1:5:                     training cases: mri 3, ct 12",
        "centralized 1:1:            training cases: pooled 6",
        "centralized 1:5:            training cases: pooled 15",
    ]


def test_a_label_that_is_not_trained_is_refused_with_those_that_are():
    settings = config("--arms", "fl", "fedgin", "--scenario", "complete")
    assert find_arm(settings, "fedgin p=1").gin == 1
    with pytest.raises(ValueError, match="no arm is labelled 'fedgin'; there are fl, fedgin p=1"):
        find_arm(settings, "fedgin")
