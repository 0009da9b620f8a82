"""Who holds which cases: phantoms or folders, their sites, their splits, and what is refused."""

import csv
import dataclasses
import gzip
import json
import shutil
import zlib
from collections import Counter

import nibabel
import numpy as np
import pytest
from conftest import (
    edit,
    make_forms_disagree,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

import fedgin
from data import make_volume, normalize
from scans.cache import CachedVolume
from scans.cases import PreparedCase, load_case
from scans.files import DataError
from scans.layouts import ORGANS, find_cases
from scans.phantom import SPACING, make_phantom
from study import hospitals as hospitals_module
from study.config import Config
from study.hospitals import (
    VAL_CASES,
    Hospital,
    find_sources,
    load_hospitals,
    record,
    validation_cases,
)

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
    """Hospitals, and what of them is left out or odd; ct, mri and test are lists of paths."""
    folders = {m: tuple(map(str, settings.pop(m, ()))) for m in ("ct", "mri", "test")}
    by_seed, notes = load_hospitals(Config(out=str(out), spacing=12.0, **folders, **settings))
    return by_seed[42], [note for note in notes if not note.endswith(" are free")]


def held(hospital):
    return {split: sorted(c.volume.id for c in getattr(hospital, split)) for split in SPLITS}


# ---------------------------------------------------------------------------------------- phantoms


def test_phantoms_make_a_hospital_of_each_modality():
    mri, ct = on_phantoms(5)
    for hospital, modality in ((mri, "mri"), (ct, "ct")):
        assert (hospital.name, hospital.modality) == (modality, modality)
        assert [len(getattr(hospital, split)) for split in SPLITS] == [12, 4, 8]
        cases = [case for split in SPLITS for case in getattr(hospital, split)]
        assert {case.volume.modality for case in cases} == {modality}
        for index, (volume, read_target, files, *_) in enumerate(cases):
            image, labels = make_phantom(5, modality, index)
            np.testing.assert_array_equal(volume.labels, labels)
            np.testing.assert_array_equal(volume.image, normalize(image, modality))
            assert volume.labelled.all()
            target, spacing = read_target()
            np.testing.assert_array_equal(target, labels)
            assert (spacing, files) == ((SPACING,) * 3, [])


def test_sites_deal_the_same_cases_out():
    whole = on_phantoms(1)
    sites = on_phantoms(1, sites=3)
    assert [site.name for site in sites] == ["mri-1", "mri-2", "mri-3", "ct-1", "ct-2", "ct-3"]
    for hospital in whole:
        for split in SPLITS:
            own = [site for site in sites if site.modality == hospital.modality]
            dealt = [case.volume.id for site in own for case in getattr(site, split)]
            assert sorted(dealt) == [case.volume.id for case in getattr(hospital, split)]
    assert {len(site.train) for site in sites} == {4}
    with pytest.raises(DataError, match="--sites 13: mri has 12 training cases, too few"):
        on_phantoms(1, sites=13)


def test_organs_are_renumbered():
    [mri, _] = on_phantoms(5, organs=("spleen", "liver"))
    labels = make_phantom(5, "mri", 0)[1]
    np.testing.assert_array_equal(mri.train[0].volume.labels == 1, labels == 3)
    np.testing.assert_array_equal(mri.train[0].volume.labels == 2, labels == 1)


def test_each_seed_has_phantoms_of_its_own():
    by_seed, _ = load_hospitals(Config(seeds=(1, 2)))
    assert list(by_seed) == [1, 2]
    for seed, (mri, _, other) in by_seed.items():
        np.testing.assert_array_equal(mri.test[7].volume.labels, make_phantom(seed, "mri", 23)[1])
        labels = make_phantom(seed, "ct", 16, "other")[1]
        np.testing.assert_array_equal(other.test[8].volume.labels, labels)


def test_phantoms_of_another_scanner_are_tested_on_only():
    *_, other = load_hospitals(Config(seeds=(1,)))[0][1]
    assert (other.name, other.modality, other.train, other.val) == ("other-scanner", "", [], [])
    volumes = [case.volume for case in other.test]
    assert [volume.modality for volume in volumes] == ["mri"] * 8 + ["ct"] * 8
    for volume, index in zip(volumes, [*range(16, 24)] * 2, strict=True):
        image, labels = make_phantom(1, volume.modality, index, "other")
        np.testing.assert_array_equal(volume.image, normalize(image, volume.modality))
        np.testing.assert_array_equal(volume.labels, labels)


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
        for volume, read_target, files, *_ in (c for s in SPLITS for c in getattr(hospital, s)):
            expected = load_case(cases[volume.id], ORGANS, 12.0)
            assert (files, volume.modality) == (expected.files, hospital.modality)
            np.testing.assert_array_equal(volume.image, expected.volume.image)
            np.testing.assert_array_equal(volume.labels, expected.volume.labels)
            np.testing.assert_array_equal(read_target()[0], expected.read_target()[0])


def test_the_cache_lies_beside_the_results_unless_none_is_wanted(tmp_path, ct_folder):
    (ct,), _ = on_scans(tmp_path / "run/out", ct=[ct_folder])
    assert all(isinstance(case.volume, CachedVolume) for case in ct.train)
    made = {path.name for path in (tmp_path / "run/cache").iterdir()}
    assert len(made - {"lock"}) == 4
    (plain,), _ = on_scans(tmp_path / "other/out", ct=[ct_folder], no_cache=True)
    assert not any(isinstance(case.volume, CachedVolume) for case in plain.train)
    assert not (tmp_path / "other").exists()
    assert held(plain) == held(ct)
    for a, b in zip(ct.train, plain.train, strict=True):
        np.testing.assert_array_equal(a.volume.image, b.volume.image)


def test_the_space_that_the_cache_takes_is_the_first_note(tmp_path, ct_folder, capsys):
    settings = {"spacing": 12.0, "out": str(tmp_path / "out"), "ct": (str(ct_folder),)}
    first, *others = load_hospitals(Config(**settings))[1]
    assert first.startswith("4 preprocessed scans take 0.00")
    assert others == []
    assert load_hospitals(Config(**settings))[1] == []  # they are there by now
    assert load_hospitals(Config(**settings, no_cache=True))[1] == []
    assert capsys.readouterr().out == ""


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


def test_a_modality_that_an_arm_needs_must_be_there(tmp_path, ct_folder, monkeypatch):
    """Before a scan is read where the files tell it, and after that where they do not."""
    settings = {"ct": (str(ct_folder),), "out": str(tmp_path / "out"), "spacing": 12.0}
    message = (
        "there are no MRI training cases, and an arm needs some; give folders with --mri or "
        "choose other --arms$"
    )
    with monkeypatch.context() as patch:
        patch.setattr(hospitals_module, "load_cases", lambda *_: pytest.fail("is read"))
        with pytest.raises(DataError, match=f"^{message}"):
            load_hospitals(Config(**settings), needed={"ct", "mri"})
    assert load_hospitals(Config(**settings), needed={"ct"})[0].keys() == {42}
    empty = write_totalsegmentator(tmp_path / "mri", "mri", 2, ["train", "val"])
    for mask in (empty / "s0000/segmentations").iterdir():
        edit(mask, np.zeros((32, 32, 32), np.uint8))
    left_out = "left out: mri, train: 1 scans without any organ"
    with pytest.raises(DataError, match=f"^{left_out}\n{message}"):
        load_hospitals(Config(**settings, mri=(str(empty),)), needed={"mri"})
    assert load_hospitals(Config(), needed={"mri", "ct"})[0].keys() == {42}


# ---------------------------------------------------------------------------------- partial labels


def test_organs_that_a_folder_lacks_need_partial_labels(tmp_path, ct_folder):
    labels = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}
    few = write_nnunet(tmp_path / "few", "mri", 4, labels=labels)
    folders = {"ct": [ct_folder], "mri": [few]}
    with pytest.raises(DataError, match="use --organs liver spleen or --partial-labels"):
        on_scans(tmp_path / "out", **folders)
    (mri, ct), _ = on_scans(tmp_path / "out", **folders, partial_labels=True)
    assert mri.train[0].volume.labelled.tolist() == [True, True, False, True, False, False]
    assert ct.train[0].volume.labelled.all()
    (mri, _), _ = on_scans(tmp_path / "out", **folders, organs=("spleen", "liver"))
    assert mri.train[0].volume.labelled.all()


def test_totalsegmentators_masks_may_be_partial_too(tmp_path, mri_folder):
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 3, organs=["liver", "kidneys"])
    folders = {"ct": [ct], "mri": [mri_folder]}
    with pytest.raises(DataError, match="use --organs liver kidneys or --partial-labels"):
        on_scans(tmp_path / "out", **folders)
    (_, ct), _ = on_scans(tmp_path / "out", **folders, partial_labels=True)
    assert ct.train[0].volume.labelled.tolist() == [True, True, True, False, False, False]
    assert set(np.unique(ct.train[0].volume.labels)) == {0, 1, 2}


def test_other_hospitals_may_label_what_these_lack_unless_they_are_alone(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}
    few = str(write_nnunet(tmp_path / "few", "mri", 4, labels=labels))
    settings = {"mri": (few,), "out": str(tmp_path / "out"), "spacing": 12.0}
    with pytest.raises(DataError, match="not one folder labels .*use --organs liver spleen"):
        load_hospitals(Config(**settings, partial_labels=True))
    by_seed, _ = load_hospitals(Config(**settings, partial_labels=True), alone=False)
    assert by_seed[42][0].train[0].volume.labelled.tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(DataError, match="not every folder labels"):
        load_hospitals(Config(**settings), alone=False)


# ---------------------------------------------------------------------------- what a run remembers


def test_the_record_says_which_case_went_where_and_what_its_files_were(tmp_path, mri_folder):
    mri = tmp_path / "mri"
    shutil.copytree(mri_folder, mri)
    settings = {"spacing": 12.0, "out": str(tmp_path / "out"), "mri": (str(mri),)}
    config = Config(seeds=(1, 2), **settings)
    by_seed, _ = load_hospitals(config)
    found = record(by_seed)
    assert [(each["hospital"], each["seed"]) for each in found] == [("mri", 1), ("mri", 2)]
    for each in found:
        splits = {part: sorted(ids) for part, ids in each["cases"].items()}
        assert splits == held(by_seed[each["seed"]][0])
    files = [mri / f"{part}/case_002{end}.nii.gz" for part, end in (("imagesTr", "_0000"),)]
    files.append(mri / "labelsTr/case_002.nii.gz")
    assert sorted(found[0]["files"]) == [f"case_00{i}" for i in range(4)]
    assert found[1]["files"] == found[0]["files"]
    stamps = [
        (path.stat().st_size, zlib.crc32(gzip.decompress(path.read_bytes()))) for path in files
    ]
    assert found[0]["files"]["case_002"] == stamps
    truncate(files[0])
    assert record(by_seed) == found  # of what was read
    by_seed, _ = load_hospitals(dataclasses.replace(config, skip_bad=True, no_cache=True))
    assert sorted(record(by_seed)[0]["files"]) == ["case_000", "case_001", "case_003"]
    shutil.copy(mri / "imagesTr/case_001_0000.nii.gz", files[0])
    by_seed, _ = load_hospitals(config)
    assert record(by_seed)[0]["files"]["case_002"] != stamps
    assert record(by_seed)[0]["files"]["case_001"] == found[0]["files"]["case_001"]


def test_the_record_of_phantoms_has_no_files():
    _, ct = record({1: on_phantoms(1)})
    assert (ct["hospital"], ct["seed"]) == ("ct", 1)
    assert ct["cases"]["val"] == [f"phantom{i}" for i in range(12, 16)]
    assert ct["files"] == {f"phantom{i:02d}": [] for i in range(24)}


# --------------------------------------------------------------------------- runs on such folders


def read_scores(out):
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_cases(out, name):
    """Those of a hospital by split, as the run has recorded them."""
    return json.loads((out / f"hospitals/{name}-seed42.json").read_text())["cases"]


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
    splits = read_cases(tmp_path / "out", "mri")
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
    scores = read_scores(tmp_path / "out")
    assert {score["modality"] for score in scores} == {"mri", "ct"}
    assert {score["organ"] for score in scores} == set(ORGANS)
    for score in scores:
        lacking = score["modality"] == "mri" and score["organ"] not in ("liver", "spleen")
        assert (score["outcome"] == "unlabelled") == lacking
        assert (score["dice"] == "") == (score["outcome"] in ("unlabelled", "absent"))
    assert "– / 0" in (tmp_path / "out/results.md").read_text()


def test_amos_is_the_test_set_of_both(tmp_path, ct_folder, mri_folder):
    write_amos(tmp_path / "amos", "ct", 2)
    write_amos(tmp_path / "amos", "mri", 2)
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", tmp_path / "amos", "--arms", "fl"]
    assert run(*args, "--out", tmp_path / "out") == 0
    scores = read_scores(tmp_path / "out")
    assert {(s["hospital"], s["scanner"], s["modality"], s["case"]) for s in scores} == {
        ("amos", "other", "ct", "amos_0001"),
        ("amos", "other", "ct", "amos_0002"),
        ("amos", "other", "mri", "amos_0501"),
        ("amos", "other", "mri", "amos_0502"),
    }
    amos, ct_set = (read_cases(tmp_path / "out", name) for name in ("amos", "ct_set"))
    assert amos["train"] == amos["val"] == ct_set["test"] == []


def test_scans_without_any_organ_are_tested_on_only(tmp_path, mri_folder):
    """Two heads in a whole-body set: neither trains or validates, and n_k does not count them."""
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 6, ["train"] * 3 + ["val"] * 2 + ["test"])
    for id_ in ("s0000", "s0003", "s0005"):
        for mask in (ct / id_ / "segmentations").iterdir():
            edit(mask, np.zeros((32, 32, 32), np.uint8))
    config = Config(ct=(str(ct),), mri=(str(mri_folder),), spacing=12, cache=str(tmp_path / "c"))
    by_seed, (_, *left_out) = load_hospitals(config)
    [hospital] = [h for h in by_seed[42] if h.modality == "ct"]
    expected = {"train": ["s0001", "s0002"], "val": ["s0004"], "test": ["s0005"]}
    assert held(hospital) == expected
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
        volume = make_volume(f"case{n}", "ct", labels.astype(np.float32), labels, known)
        cases.append(PreparedCase(volume, lambda: pytest.fail("is not asked for"), []))
    return Hospital("a", "ct", cases[:1], cases, [])


def ids(cases):
    return [int(case.volume.id[4:]) for case in cases]


def test_a_round_is_validated_on_a_few_cases_that_hold_every_organ():
    """Of 40 cases with a liver, one each has a spleen and a pancreas, and one is empty."""
    hospital = held_by((3,), *[(1,)] * 38, (1, 4), ())
    for seed in range(5):
        chosen = ids(validation_cases(seed, [hospital], ["ct"]))
        assert len(chosen) == VAL_CASES == 8
        assert chosen == sorted(chosen)
        assert {0, 39} < set(chosen)
        assert 40 not in chosen
        assert ids(validation_cases(seed, [hospital], ["mri", "ct"])) == chosen
    others = {tuple(ids(validation_cases(seed, [hospital], ["ct"]))) for seed in range(5)}
    assert len(others) == 5


def test_few_validation_cases_are_all_taken_and_training_cases_stand_in_for_none():
    few = held_by((1,), (2,), ())
    assert validation_cases(1, [few, few], ["ct"]) == [*few.val, *few.val]
    assert validation_cases(1, [few._replace(val=[])], ["ct"]) == few.train
    assert validation_cases(1, [few._replace(val=[], train=[])], ["ct"]) == []


def test_who_takes_no_part_does_not_validate():
    ct = held_by((1,), (2,))
    mri, tested = ct._replace(modality="mri", val=ct.val[1:]), ct._replace(modality="")
    everyone = [mri, ct, tested]
    assert validation_cases(1, everyone, ["mri"]) == mri.val
    assert validation_cases(1, everyone, ["ct"]) == ct.val
    assert validation_cases(1, everyone, ["mri", "ct"]) == [*mri.val, *ct.val]
    assert validation_cases(1, everyone, []) == []


def copies(tmp_path, **folders):
    """What is said of copies."""
    notes = on_scans(tmp_path / "out", **folders)[1]
    assert all(note.startswith("WARNING: ") for note in notes)
    return [note.removeprefix("WARNING: ") for note in notes if "copy" in note]


@pytest.mark.parametrize("no_cache", [False, True])
def test_copies_of_training_scans_in_a_test_folder_are_warned_of(
    no_cache, tmp_path, ct_folder, mri_folder
):
    """By content: under another name, but not if a voxel differs."""
    test = write_nnunet(tmp_path / "held_out", "ct", 3, seed=8)
    folders = {"ct": [ct_folder], "mri": [mri_folder], "test": [test], "no_cache": no_cache}
    assert copies(tmp_path, **folders) == []
    scan = test / "imagesTr/case_001_0000.nii.gz"
    shutil.copy(ct_folder / "s0002/ct.nii.gz", scan)
    assert copies(tmp_path, **folders) == [
        "1 scans are there twice, and what is trained on may be tested on: "
        f"{scan} is a copy of {ct_folder}/s0002/ct.nii.gz"
    ]
    array = np.asarray(nibabel.load(scan).dataobj).copy()
    array[16, 16, 16] += 9
    edit(scan, array)
    assert copies(tmp_path, **folders) == []
    shutil.copy(scan, test / "imagesTr/case_002_0000.nii.gz")  # nobody trains on either
    assert copies(tmp_path, **folders) == []


def compress_again(content):
    return gzip.compress(gzip.decompress(content), 1)


def write_other_header(content):
    file = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    file.header["descrip"] = b"from elsewhere"
    return gzip.compress(file.to_bytes())


@pytest.mark.parametrize("change", [bytes, compress_again, write_other_header])
def test_copies_in_one_folder_and_in_two_are_warned_of(change, tmp_path):
    a = write_totalsegmentator(tmp_path / "a", "ct", 4)
    b = write_totalsegmentator(tmp_path / "b", "ct", 3, seed=5)
    scan = a / "s0001/ct.nii.gz"
    expected = []
    for copy in (a / "s0003/ct.nii.gz", b / "s0000/ct.nii.gz"):
        copy.write_bytes(change(scan.read_bytes()))
        expected.append(f"{copy} is a copy of {scan}")
    [note] = copies(tmp_path, ct=[a, b])
    what = "2 scans are there twice, and what is trained on may be tested on"
    assert note == f"{what}: {'; '.join(expected)}"


def test_a_copy_may_be_compressed_or_not_and_many_are_counted(tmp_path):
    folders = []
    for name, ending in (("a", ".nii.gz"), ("b", ".nii")):
        folder = write_nnunet(tmp_path / name, "mri", 7)
        about = json.loads((folder / "dataset.json").read_text()) | {"file_ending": ending}
        (folder / "dataset.json").write_text(json.dumps(about))
        folders.append(folder)
    for path in list(folders[1].rglob("*.nii.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    [note] = copies(tmp_path, mri=folders)
    assert note.startswith("7 scans are there twice, ")
    assert f"{folders[1]}/imagesTr/case_000_0000.nii is a copy of {folders[0]}/imagesTr" in note
    assert note.count("is a copy of") == 5
    assert note.endswith("; and 2 more")


# --------------------------------------------------------- what is said before training, or instead


def test_what_was_left_out_is_said_with_the_refusal_that_follows(tmp_path, ct_folder, capsys):
    mri = write_nnunet(tmp_path / "mri", "mri", 3)
    for path in (mri / "imagesTr").iterdir():
        truncate(path)
    args = ["--ct", ct_folder, "--mri", mri, "--skip-bad", "--arms", "fl", "--out", tmp_path / "o"]
    assert run(*args) == 2
    *left_out, refusal = capsys.readouterr().err.removeprefix("fedgin.py: ").splitlines()
    for line, path in zip(left_out, sorted((mri / "imagesTr").iterdir()), strict=True):
        assert line.startswith(f"left out: {path}: cannot be read")
    assert refusal.startswith("there are no MRI training cases, and an arm needs some")
    mri = write_nnunet(tmp_path / "mri", "mri", 3)
    for path in sorted((mri / "labelsTr").iterdir()):
        edit(path, np.zeros((32, 32, 32), np.uint8))
    assert run(*args) == 2
    assert "left out: mri, train: 2 scans without any organ" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_too_few_cases_to_choose_a_round_or_to_report_are_told_once(seeds, tmp_path):
    mri = write_totalsegmentator(tmp_path / "mri", "mri", 4, ["train"] + ["val"] * 2 + ["test"])
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 5, ["train"] + ["val"] * 3 + ["test"])
    settings = {"spacing": 12.0, "cache": str(tmp_path / "c"), "seeds": seeds}
    config = Config(mri=(str(mri),), ct=(str(ct),), **settings)

    def notes(*args, **more):
        return [n for n in load_hospitals(*args, **more)[1] if not n.endswith(" are free")]

    few = (
        "WARNING: fewer than three validation cases of MRI: the choice of a round by them is chance"
    )
    assert notes(config, ["mri", "ct"]) == [few]
    assert notes(config, ["ct"]) == []
    assert notes(config, ["mri"], alone=False) == []  # others validate too
    one = write_totalsegmentator(tmp_path / "one", "ct", 1)
    assert notes(Config(ct=(str(one),), **settings), ["ct"]) == [
        few.replace("MRI", "CT"),
        "WARNING: no hospital here has a test case, so the report has none of theirs; give a "
        "folder with --test, or three cases or more",
    ]


@pytest.mark.parametrize("no_cache", [False, True])
def test_what_may_be_wrong_with_cases_is_said_by_name(no_cache, tmp_path):
    """Each time, from the cache too."""
    mri = write_nnunet(tmp_path / "mri", "mri", 6)
    scans = [mri / f"imagesTr/case_{i:03d}_0000.nii.gz" for i in range(6)]
    for scan in scans[1:3]:
        make_forms_disagree(scan)
    config = {"mri": [mri], "no_cache": no_cache}
    for _ in range(2):
        assert on_scans(tmp_path / "out", **config)[1] == [
            f"WARNING: {scans[1]}, {scans[2]}: its sform and qform put the volume at different "
            "places; the sform is used"
        ]
