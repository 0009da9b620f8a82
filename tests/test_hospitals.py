"""Who holds which cases: phantoms or folders, their sites, their splits, and what is refused."""

import gzip
import json
import shutil
import zlib
from collections import Counter

import nibabel
import numpy as np
import pytest
from conftest import edit, truncate, write_amos, write_nnunet, write_totalsegmentator

import fedgin
from config import Config
from data import CachedVolume, load_case, make_volume, normalize
from datasets import ORGANS, DataError, find_cases
from hospitals import (
    VAL_CASES,
    Hospital,
    find_sources,
    load_hospitals,
    record,
    validation_cases,
    warn_of_copies,
)
from phantom import phantom

TINY = ["--rounds", "1", "--local-steps", "1", "--batch-size", "2"]
TINY += ["--gin-probability", "1"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2"]
SPLITS = ("train", "val", "test")


def run(*args):
    return fedgin.main([*TINY, "--spacing", "12", *map(str, args)])


def on_phantoms(seed, **settings):
    by_seed, notes = load_hospitals(Config(seeds=(seed,), **settings))
    assert notes == []
    return [hospital for hospital in by_seed[seed] if hospital.modality]


def on_scans(out, **settings):
    """Hospitals and what was left out; folders given by ct, mri and test are lists of paths."""
    folders = {m: tuple(map(str, settings.pop(m, ()))) for m in ("ct", "mri", "test")}
    by_seed, left_out = load_hospitals(Config(out=str(out), spacing=12.0, **folders, **settings))
    return by_seed[42], left_out


def held(hospital):
    return {split: sorted(c.id for c in getattr(hospital, split)) for split in SPLITS}


# ---------------------------------------------------------------------------------------- phantoms


def test_phantoms_make_a_hospital_of_each_modality():
    mri, ct = on_phantoms(5)
    for hospital, modality in ((mri, "mri"), (ct, "ct")):
        assert (hospital.name, hospital.modality) == (modality, modality)
        assert [len(getattr(hospital, split)) for split in SPLITS] == [12, 4, 8]
        cases = [case for split in SPLITS for case in getattr(hospital, split)]
        assert {case.modality for case in cases} == {modality}
        for index, case in enumerate(cases):
            image, labels = phantom(5, modality, index)
            np.testing.assert_array_equal(case.labels, labels)
            np.testing.assert_array_equal(case.image, normalize(image, modality))
            assert case.labelled.all()


def test_sites_deal_the_same_cases_out():
    whole = on_phantoms(1)
    sites = on_phantoms(1, sites=3)
    assert [site.name for site in sites] == ["mri-1", "mri-2", "mri-3", "ct-1", "ct-2", "ct-3"]
    for hospital in whole:
        for split in SPLITS:
            dealt = [
                c.id for s in sites if s.modality == hospital.modality for c in getattr(s, split)
            ]
            assert sorted(dealt) == [case.id for case in getattr(hospital, split)]
    assert {len(site.train) for site in sites} == {4}
    with pytest.raises(DataError, match="--sites 13: mri has 12 training cases, too few"):
        on_phantoms(1, sites=13)


def test_organs_are_renumbered():
    [mri, _] = on_phantoms(5, organs=("spleen", "liver"))
    labels = phantom(5, "mri", 0)[1]
    np.testing.assert_array_equal(mri.train[0].labels == 1, labels == 3)
    np.testing.assert_array_equal(mri.train[0].labels == 2, labels == 1)


def test_each_seed_has_phantoms_of_its_own():
    by_seed, _ = load_hospitals(Config(seeds=(1, 2)))
    assert list(by_seed) == [1, 2]
    for seed, (mri, _, other) in by_seed.items():
        np.testing.assert_array_equal(mri.test[7].labels, phantom(seed, "mri", 23)[1])
        np.testing.assert_array_equal(other.test[8].labels, phantom(seed, "ct", 16, "other")[1])


def test_phantoms_of_another_scanner_are_tested_on_only():
    *_, other = load_hospitals(Config(seeds=(1,)))[0][1]
    assert (other.name, other.modality, other.train, other.val) == ("other-scanner", "", [], [])
    assert [case.modality for case in other.test] == ["mri"] * 8 + ["ct"] * 8
    for case, index in zip(other.test, [*range(16, 24)] * 2, strict=True):
        image, labels = phantom(1, case.modality, index, "other")
        np.testing.assert_array_equal(case.image, normalize(image, case.modality))
        np.testing.assert_array_equal(case.labels, labels)


# ------------------------------------------------------------------------------------------- scans


def test_folders_become_hospitals_by_their_own_splits(tmp_path, ct_folder, mri_folder):
    (mri, ct), left_out = on_scans(tmp_path / "out", ct=[ct_folder], mri=[mri_folder])
    assert left_out == []
    assert (mri.name, mri.modality) == ("Dataset001_MRI", "mri")
    assert (ct.name, ct.modality) == ("ct_set", "ct")
    assert held(ct) == {"train": ["s0000", "s0001"], "val": ["s0002"], "test": ["s0003"]}
    assert [len(getattr(mri, split)) for split in SPLITS] == [2, 1, 1]
    ids = sorted(id_ for part in held(mri).values() for id_ in part)
    assert ids == [f"case_00{i}" for i in range(4)]
    for hospital, folder in ((mri, mri_folder), (ct, ct_folder)):
        cases = {case.id: case for case in find_cases(folder)}
        for volume in (v for split in SPLITS for v in getattr(hospital, split)):
            expected = load_case(cases[volume.id], ORGANS, 12.0)
            assert (volume.case, volume.modality) == (cases[volume.id], hospital.modality)
            np.testing.assert_array_equal(volume.image, expected.image)
            np.testing.assert_array_equal(volume.labels, expected.labels)


def test_the_cache_lies_beside_the_results_unless_none_is_wanted(tmp_path, ct_folder):
    (ct,), _ = on_scans(tmp_path / "run/out", ct=[ct_folder])
    assert all(isinstance(case, CachedVolume) for case in ct.train)
    assert len(list((tmp_path / "run/cache").iterdir())) == 4
    (plain,), _ = on_scans(tmp_path / "other/out", ct=[ct_folder], no_cache=True)
    assert not any(isinstance(case, CachedVolume) for case in plain.train)
    assert not (tmp_path / "other").exists()
    assert held(plain) == held(ct)
    for a, b in zip(ct.train, plain.train, strict=True):
        np.testing.assert_array_equal(a.image, b.image)


def test_seeds_split_the_same_scans_differently(tmp_path):
    mri = write_nnunet(tmp_path / "mri", "mri", 12)
    settings = {"spacing": 12.0, "out": str(tmp_path / "out"), "mri": (str(mri),)}
    by_seed, _ = load_hospitals(Config(seeds=(1, 2, 3), **settings))
    splits = [held(hospital) for [hospital] in by_seed.values()]
    assert len({tuple(split["test"]) for split in splits}) > 1
    for split in splits:
        assert [len(split[part]) for part in SPLITS] == [9, 1, 2]
        assert len({id_ for part in split.values() for id_ in part}) == 12
    assert held(load_hospitals(Config(seeds=(2,), **settings))[0][2][0]) == splits[1]


def test_a_test_folder_is_only_tested_on(tmp_path, ct_folder, mri_folder):
    held_out = write_totalsegmentator(tmp_path / "held_out", "mri", 2, seed=9)
    hospitals, _ = on_scans(
        tmp_path / "out", ct=[ct_folder], mri=[mri_folder], test=[held_out], sites=2
    )
    names = ["Dataset001_MRI-1", "Dataset001_MRI-2", "ct_set-1", "ct_set-2", "held_out"]
    assert [hospital.name for hospital in hospitals] == names
    *training, held_out = hospitals
    assert held_out.modality == ""
    assert held(held_out) == {"train": [], "val": [], "test": ["s0000", "s0001"]}
    assert all(not hospital.test for hospital in training)
    assert Counter(h.modality for h in training for _ in h.train) == {"mri": 3, "ct": 2}


def test_folders_of_one_name_are_numbered(tmp_path, ct_folder):
    names = []
    for place, modality in (("a", "mri"), ("b", "ct"), ("b2", "ct")):
        write = write_totalsegmentator(tmp_path / place / "set", modality, 3)
        names.append(str(write))
    config = Config(mri=tuple(names[:1]), ct=(*names[1:], str(ct_folder)), out=str(tmp_path / "o"))
    sources = find_sources(config)
    assert [source.name for source in sources] == ["set-1", "set-2", "set-3", "ct_set"]
    assert [source.folder for source in sources] == [*names, str(ct_folder)]
    assert [source.modality for source in sources] == ["mri", "ct", "ct", "ct"]
    assert [len(source.cases) for source in sources] == [3, 3, 3, 4]


def test_two_hospitals_of_one_name_are_refused(tmp_path):
    a = write_totalsegmentator(tmp_path / "set", "mri", 3)
    b = write_totalsegmentator(tmp_path / "x/set-1", "ct", 3)
    c = write_totalsegmentator(tmp_path / "y/set", "ct", 3)
    for folders in ({"mri": [a], "ct": [b, c]}, {"mri": [a], "ct": [c, b]}):
        with pytest.raises(DataError, match="two hospitals would have the same name"):
            on_scans(tmp_path / "out", **folders)


def test_a_trailing_slash_changes_no_name(tmp_path, ct_folder):
    (ct,), _ = on_scans(tmp_path / "out", ct=[f"{ct_folder}/"])
    assert ct.name == "ct_set"


def test_one_scan_has_one_role(tmp_path, ct_folder, mri_folder):
    message = (
        "s0000/ct.nii.gz: is there twice, in two of the folders given, or under two names; a scan"
    )
    with pytest.raises(DataError, match=message):
        on_scans(tmp_path / "out", ct=[ct_folder], mri=[mri_folder], test=[ct_folder])
    (tmp_path / "link").symlink_to(ct_folder)
    with pytest.raises(DataError, match=message):
        on_scans(tmp_path / "out", ct=[ct_folder, tmp_path / "link"])
    assert not (tmp_path / "cache").exists()


def test_one_folder_may_hold_the_scans_of_both_modalities(tmp_path):
    amos = write_amos(write_amos(tmp_path / "amos", "ct", 3), "mri", 3)
    (mri, ct), _ = on_scans(tmp_path / "out", ct=[amos], mri=[amos])
    assert [mri.name, ct.name] == ["amos-1", "amos-2"]
    assert held(mri)["val"] == ["amos_0502", "amos_0503"]
    assert held(ct)["val"] == ["amos_0002", "amos_0003"]


def test_too_many_sites_are_refused(tmp_path, ct_folder):
    with pytest.raises(DataError, match="--sites 3: .*ct_set has 2 training cases, too few"):
        on_scans(tmp_path / "out", ct=[ct_folder], sites=3)


def test_the_layout_can_be_said(tmp_path):
    write_totalsegmentator(tmp_path / "both", "ct", 3)
    write_nnunet(tmp_path / "both", "ct", 4)
    with pytest.raises(DataError, match="--layout"):
        on_scans(tmp_path / "out", ct=[tmp_path / "both"])
    (ct,), _ = on_scans(tmp_path / "out", ct=[tmp_path / "both"], layout="nnunet")
    assert sorted(held(ct)["train"] + held(ct)["val"] + held(ct)["test"]) == [
        f"case_00{i}" for i in range(4)
    ]


def test_a_bad_case_is_named_or_left_out(tmp_path, ct_folder, mri_folder):
    mri = tmp_path / "mri"
    shutil.copytree(mri_folder, mri)
    truncate(mri / "imagesTr/case_001_0000.nii.gz")
    folders = {"ct": [ct_folder], "mri": [mri]}
    with pytest.raises(DataError, match=r"case_001_0000.nii.gz: cannot be read.*\n.*--skip-bad"):
        on_scans(tmp_path / "out", **folders)
    (mri, _), [reason] = on_scans(tmp_path / "out", **folders, skip_bad=True)
    assert "case_001_0000.nii.gz: cannot be read" in reason
    assert sorted(id_ for part in held(mri).values() for id_ in part) == [
        "case_000",
        "case_002",
        "case_003",
    ]


# ---------------------------------------------------------------------------------- partial labels


def test_organs_that_a_folder_lacks_need_partial_labels(tmp_path, ct_folder):
    labels = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}
    few = write_nnunet(tmp_path / "few", "mri", 4, labels=labels)
    folders = {"ct": [ct_folder], "mri": [few]}
    with pytest.raises(DataError, match="use --organs liver spleen or --partial-labels"):
        on_scans(tmp_path / "out", **folders)
    (mri, ct), _ = on_scans(tmp_path / "out", **folders, partial_labels=True)
    assert mri.train[0].labelled.tolist() == [True, True, False, True, False, False]
    assert ct.train[0].labelled.all()
    (mri, _), _ = on_scans(tmp_path / "out", **folders, organs=("spleen", "liver"))
    assert mri.train[0].labelled.all()


def test_totalsegmentators_masks_may_be_partial_too(tmp_path, mri_folder):
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 3, organs=["liver", "kidneys"])
    folders = {"ct": [ct], "mri": [mri_folder]}
    with pytest.raises(DataError, match="use --organs liver kidneys or --partial-labels"):
        on_scans(tmp_path / "out", **folders)
    (_, ct), _ = on_scans(tmp_path / "out", **folders, partial_labels=True)
    assert ct.train[0].labelled.tolist() == [True, True, True, False, False, False]
    assert set(np.unique(ct.train[0].labels)) == {0, 1, 2}


def test_other_hospitals_may_label_what_these_lack_unless_they_are_alone(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}
    few = str(write_nnunet(tmp_path / "few", "mri", 4, labels=labels))
    settings = {"mri": (few,), "out": str(tmp_path / "out"), "spacing": 12.0}
    with pytest.raises(DataError, match="not one folder labels .*use --organs liver spleen"):
        load_hospitals(Config(**settings, partial_labels=True))
    by_seed, _ = load_hospitals(Config(**settings, partial_labels=True), alone=False)
    assert by_seed[42][0].train[0].labelled.tolist() == [True, True, False, True, False, False]
    with pytest.raises(DataError, match="not every folder labels"):
        load_hospitals(Config(**settings), alone=False)


# ---------------------------------------------------------------------------- what a run remembers


def test_the_record_says_which_case_went_where_and_what_its_files_were(tmp_path, mri_folder):
    mri = tmp_path / "mri"
    shutil.copytree(mri_folder, mri)
    settings = {"spacing": 12.0, "out": str(tmp_path / "out"), "mri": (str(mri),)}
    config = Config(seeds=(1, 2), **settings)
    by_seed, _ = load_hospitals(config)
    found = record(by_seed, config.organs)
    assert found.keys() == {"mri"}
    for seed in (1, 2):
        splits = {part: sorted(ids) for part, ids in found["mri"]["splits"][seed].items()}
        assert splits == held(by_seed[seed][0])
    files = [mri / f"{part}/case_002{end}.nii.gz" for part, end in (("imagesTr", "_0000"),)]
    files.append(mri / "labelsTr/case_002.nii.gz")
    assert sorted(found["mri"]["files"]) == [f"case_00{i}" for i in range(4)]
    stamps = [
        (path.stat().st_size, zlib.crc32(gzip.decompress(path.read_bytes()))) for path in files
    ]
    assert found["mri"]["files"]["case_002"] == stamps
    truncate(files[0])
    assert record(by_seed, config.organs)["mri"]["files"]["case_002"] != stamps


def test_the_record_of_phantoms_has_no_files():
    found = record({1: on_phantoms(1)}, ORGANS)
    assert found.keys() == {"mri", "ct"}
    assert found["ct"]["files"] == {}
    assert found["ct"]["splits"][1]["val"] == [f"phantom{i}" for i in range(12, 16)]


# --------------------------------------------------------------------------- runs on such folders


def read_results(out):
    return json.loads((out / "results.json").read_text())["results"]


def test_a_bad_case_stops_the_run_or_is_left_out(tmp_path, ct_folder, mri_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    truncate(tmp_path / "mri/imagesTr/case_001_0000.nii.gz")
    args = ["--ct", ct_folder, "--mri", tmp_path / "mri", "--arms", "fl", "--out", tmp_path / "out"]
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert "case_001_0000.nii.gz: cannot be read" in error
    assert "--skip-bad" in error
    assert not (tmp_path / "out").exists()
    assert run(*args, "--skip-bad") == 0
    assert "left out: " in capsys.readouterr().out
    splits = json.loads((tmp_path / "out/hospitals/mri.json").read_text())["splits"]["42"]
    assert sorted(id_ for part in splits.values() for id_ in part) == [
        "case_000",
        "case_002",
        "case_003",
    ]


def test_a_scan_of_two_roles_stops_the_run(tmp_path, ct_folder, mri_folder, capsys):
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", ct_folder]
    assert run(*args, "--out", tmp_path / "out") == 2
    assert "is there twice, in two of the folders given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_partial_labels_train_each_hospital_on_what_it_has(tmp_path, ct_folder, capsys):
    labels = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}
    few = write_nnunet(tmp_path / "few", "mri", 4, labels=labels)
    args = ["--ct", ct_folder, "--mri", few, "--arms", "fedgin", "centralized"]
    args += ["--out", tmp_path / "out"]
    assert run(*args) == 2
    assert "--partial-labels" in capsys.readouterr().err
    assert run(*args, "--partial-labels") == 0
    results = read_results(tmp_path / "out")
    assert {result["modality"] for result in results} == {"mri", "ct"}
    for result in results:
        outcomes = {organ: s["outcome"] == "unlabelled" for organ, s in result["scores"].items()}
        lacking = result["modality"] == "mri"
        assert outcomes == {o: lacking and o not in ("liver", "spleen") for o in ORGANS}
    assert "– / 0" in (tmp_path / "out/results.md").read_text()


def test_amos_is_the_test_set_of_both(tmp_path, ct_folder, mri_folder):
    write_amos(tmp_path / "amos", "ct", 2)
    write_amos(tmp_path / "amos", "mri", 2)
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", tmp_path / "amos", "--arms", "fl"]
    assert run(*args, "--out", tmp_path / "out") == 0
    results = read_results(tmp_path / "out")
    assert {(r["hospital"], r["modality"], r["case"]) for r in results} == {
        ("amos", "ct", "amos_0001"),
        ("amos", "ct", "amos_0002"),
        ("amos", "mri", "amos_0501"),
        ("amos", "mri", "amos_0502"),
    }
    amos, ct_set = (
        json.loads((tmp_path / f"out/hospitals/{name}.json").read_text())["splits"]["42"]
        for name in ("amos", "ct_set")
    )
    assert amos["train"] == amos["val"] == ct_set["test"] == []


def test_scans_without_any_organ_are_tested_on_only(tmp_path, mri_folder):
    """Two heads in a whole-body set: neither trains or validates, and n_k does not count them."""
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 6, ["train"] * 3 + ["val"] * 2 + ["test"])
    for id_ in ("s0000", "s0003", "s0005"):
        for mask in (ct / id_ / "segmentations").iterdir():
            edit(mask, np.zeros((32, 32, 32), np.uint8))
    config = Config(ct=(str(ct),), mri=(str(mri_folder),), spacing=12, cache=str(tmp_path / "c"))
    by_seed, left_out = load_hospitals(config)
    [hospital] = [h for h in by_seed[42] if h.modality == "ct"]
    parts = hospital.train, hospital.val, hospital.test
    assert [[case.id for case in part] for part in parts] == [
        ["s0001", "s0002"],
        ["s0004"],
        ["s0005"],
    ]
    assert left_out == [
        "left out: ct, train: 1 scans without any organ",
        "left out: ct, val: 1 scans without any organ",
    ]


# ------------------------------------------------------------------------------ validation, copies


def held_by(*organs):
    """A hospital whose validation cases hold the organs that are given for each."""
    cases = []
    for n, found in enumerate(organs):
        labels = np.zeros((4, 4, 4), np.uint8)
        labels[0, 0, : len(found)] = found
        known = np.ones(6, dtype=bool)
        cases.append(make_volume(f"case{n}", "ct", labels.astype(np.float32), labels, known))
    return Hospital("a", "ct", cases[:1], cases, [])


def test_a_round_is_validated_on_a_few_cases_that_hold_every_organ():
    """Of 40 cases with a liver, one each has a spleen and a pancreas, and one is empty."""
    hospital = held_by((3,), *[(1,)] * 38, (1, 4), ())
    for seed in range(5):
        chosen = [int(case.id[4:]) for case in validation_cases(seed, [hospital])]
        assert len(chosen) == VAL_CASES == 8
        assert chosen == sorted(chosen)
        assert {0, 39} < set(chosen)
        assert 40 not in chosen
        assert [int(case.id[4:]) for case in validation_cases(seed, [hospital])] == chosen
    others = {tuple(case.id for case in validation_cases(s, [hospital])) for s in range(5)}
    assert len(others) == 5


def test_few_validation_cases_are_all_taken_and_training_cases_stand_in_for_none():
    few = held_by((1,), (2,), ())
    assert validation_cases(1, [few, few]) == [*few.val, *few.val]
    assert validation_cases(1, [few._replace(val=[])]) == few.train
    assert validation_cases(1, [few._replace(val=[], train=[])]) == []


def test_copies_of_training_scans_in_a_test_folder_are_warned_of(tmp_path, ct_folder, mri_folder):
    """By content: under another name, but not if a voxel differs."""
    test = write_nnunet(tmp_path / "held_out", "ct", 3, seed=8)
    folders = {"ct": (str(ct_folder),), "mri": (str(mri_folder),), "test": (str(test),)}
    sources = find_sources(Config(**folders, spacing=12.0))
    assert warn_of_copies(sources) == []
    scan = test / "imagesTr/case_001_0000.nii.gz"
    shutil.copy(ct_folder / "s0002/ct.nii.gz", scan)
    found = warn_of_copies(sources)
    copied = f"{scan} is a copy of {ct_folder}/s0002/ct.nii.gz"
    assert found == [f"WARNING: what is trained on is tested on: {copied}"]
    array = np.asarray(nibabel.load(scan).dataobj).copy()
    array[0, 0, 0] += 1
    edit(scan, array)
    assert warn_of_copies(sources) == []
