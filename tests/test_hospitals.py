"""Who holds which cases: phantoms or folders, their sites, their splits, and what is refused."""

import gzip
import shutil

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

from data import make_volume, normalize
from scans.cases import PreparedCase, load_cases
from scans.files import DataError
from scans.layouts import SPLITS, find_cases
from scans.organs import ORGANS
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

FEW = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}  # labels of nnU-Net


def on_phantoms(seed, **settings):
    by_seed, notes = load_hospitals(Config(seeds=(seed,), **settings))
    assert notes == []
    return by_seed[seed]


def configure(tmp_path, **settings):
    """A Config of scans; ct, mri and test are lists of paths."""
    folders = {m: tuple(map(str, settings.pop(m, ()))) for m in ("ct", "mri", "test")}
    return Config(out=str(tmp_path / "out"), spacing=12.0, **folders, **settings)


def on_scans(tmp_path, needed=(), **settings):
    """Hospitals of seed 42, and what of them is left out or odd."""
    by_seed, notes = load_hospitals(configure(tmp_path, **settings), needed)
    return by_seed[42], notes


def held(hospital):
    return {split: sorted(c.id for c in getattr(hospital, split)) for split in SPLITS}


def ids_of(hospital):
    return sorted(id_ for ids in held(hospital).values() for id_ in ids)


def test_phantoms_make_a_hospital_of_each_modality_and_a_scanner_that_is_tested_on_only():
    mri, ct, other = on_phantoms(5)
    assert (other.name, other.modality, other.train, other.val) == ("unseen-scanner", "", [], [])
    expected = [("seen", "mri", i) for i in range(24)], [("seen", "ct", i) for i in range(24)]
    expected += ([("unseen", m, i) for m in ("mri", "ct") for i in range(16, 24)],)
    for hospital, phantoms in zip((mri, ct, other), expected, strict=True):
        if hospital.modality:
            assert (hospital.name, hospital.modality) == (phantoms[0][1],) * 2
            assert [len(getattr(hospital, split)) for split in SPLITS] == [12, 4, 8]
        cases = [case for split in SPLITS for case in getattr(hospital, split)]
        for case, (scanner, modality, index) in zip(cases, phantoms, strict=True):
            image, labels = make_phantom(5, modality, index, scanner)
            volume, (target, spacing) = case.read_volume(), case.read_target()
            assert (case.id, case.modality) == (f"phantom5-{index:02d}", modality)
            assert spacing == (SPACING,) * 3
            np.testing.assert_array_equal(volume.image, normalize(image, modality))
            for found in (volume.labels, target):
                np.testing.assert_array_equal(found, labels)
            np.testing.assert_array_equal(case.counts, np.bincount(labels.ravel(), minlength=6))
            assert case.labelled.all()


def test_sites_deal_the_same_cases_out_and_organs_are_renumbered():
    whole, sites = on_phantoms(5)[:2], on_phantoms(5, sites=3)[:-1]
    assert [site.name for site in sites] == ["mri-1", "mri-2", "mri-3", "ct-1", "ct-2", "ct-3"]
    for hospital in whole:
        for split in SPLITS:
            own = [site for site in sites if site.modality == hospital.modality]
            dealt = [case.id for site in own for case in getattr(site, split)]
            assert sorted(dealt) == [case.id for case in getattr(hospital, split)]
    assert {len(site.train) for site in sites} == {4}
    two = on_phantoms(5, organs=("spleen", "liver"))[0].train[0].read_volume().labels
    labels = whole[0].train[0].read_volume().labels
    np.testing.assert_array_equal(two, np.select([labels == 3, labels == 1], [1, 2]))
    with pytest.raises(DataError, match="--sites 13: mri has 12 training cases, too few"):
        on_phantoms(5, sites=13)


def test_each_seed_has_patients_of_its_own(monkeypatch):
    """Over whom the bootstrap of several seeds draws."""
    monkeypatch.setattr(hospitals_module, "PHANTOM_SPLITS", dict.fromkeys(SPLITS, range(2)))
    by_seed, _ = load_hospitals(Config(seeds=(5, 6)), needed=("mri", "ct"))
    for seed, hospitals in by_seed.items():
        labels = [hospital.test[0].read_volume().labels for hospital in hospitals]
        expected = [(seed, "mri", 0, "seen"), (seed, "ct", 0, "seen"), (seed, "mri", 0, "unseen")]
        for found, phantom in zip(labels, expected, strict=True):
            np.testing.assert_array_equal(found, make_phantom(*phantom)[1])
    for one, two in zip(by_seed[5], by_seed[6], strict=True):
        assert not {case.id for case in one.test} & {case.id for case in two.test}


def test_folders_become_hospitals_by_their_own_splits(tmp_path, ct_folder, mri_folder):
    (mri, ct), notes = on_scans(tmp_path, ct=[f"{ct_folder}/"], mri=[mri_folder])
    assert notes == []
    assert (mri.name, mri.modality) == ("Dataset001_MRI", "mri")
    assert (ct.name, ct.modality) == ("ct_set", "ct")
    assert held(ct) == {"train": ["s0000", "s0001"], "val": ["s0002"], "test": ["s0003"]}
    assert [len(getattr(mri, split)) for split in SPLITS] == [2, 1, 1]
    assert ids_of(mri) == [f"case_00{i}" for i in range(4)]
    for hospital, folder in ((mri, mri_folder), (ct, ct_folder)):
        prepared, _ = load_cases(find_cases(folder), ORGANS, 12.0, tmp_path / "another")
        expected = {case.id: case for case in prepared.values()}
        for case in (case for split in SPLITS for case in getattr(hospital, split)):
            volume, same = case.read_volume(), expected[case.id].read_volume()
            assert volume.modality == hospital.modality
            np.testing.assert_array_equal(volume.image, same.image)
            np.testing.assert_array_equal(volume.labels, same.labels)


def test_a_table_beside_the_scans_splits_them_by_patient(tmp_path, mri_folder):
    mri = shutil.copytree(mri_folder, tmp_path / "mri")
    rows = "image_id,split case_000,test case_001,test case_002,val case_003,train"
    (mri / "meta.csv").write_text(rows.replace(" ", "\n"))
    for seed in (1, 2):
        [hospital] = load_hospitals(configure(tmp_path, mri=[mri], seeds=(seed,)))[0][seed]
        parts = {"train": ["case_003"], "val": ["case_002"], "test": ["case_000", "case_001"]}
        assert held(hospital) == parts


def test_seeds_split_the_same_scans_differently(tmp_path):
    mri = write_nnunet(tmp_path / "mri", "mri", 12)
    by_seed, _ = load_hospitals(configure(tmp_path, mri=[mri], seeds=(1, 2, 3)))
    splits = [held(hospital) for [hospital] in by_seed.values()]
    assert len({tuple(split["test"]) for split in splits}) > 1
    for split in splits:
        assert [len(split[part]) for part in SPLITS] == [9, 1, 2]
        assert len({id_ for part in split.values() for id_ in part}) == 12
    by_seed, _ = load_hospitals(configure(tmp_path, mri=[mri], seeds=(2,)))
    assert held(by_seed[2][0]) == splits[1]


def test_a_test_folder_is_only_tested_on(tmp_path, ct_folder, mri_folder):
    amos = write_amos(write_amos(tmp_path / "amos", "ct", 2), "mri", 2)
    settings = {"ct": [ct_folder], "mri": [mri_folder], "test": [amos]}
    *training, tested = on_scans(tmp_path, **settings, sites=2)[0]
    names = ["Dataset001_MRI-1", "Dataset001_MRI-2", "ct_set-1", "ct_set-2"]
    assert [hospital.name for hospital in training] == names
    ids = ["amos_0001", "amos_0002", "amos_0501", "amos_0502"]
    assert (tested.name, tested.modality) == ("amos", "")
    assert held(tested) == {"train": [], "val": [], "test": ids}
    assert not any(hospital.test for hospital in training)
    assert [len(hospital.train) for hospital in training] == [2, 1, 1, 1]
    with pytest.raises(DataError, match="--sites 3: .*ct_set has 2 training cases, too few"):
        on_scans(tmp_path, ct=[ct_folder], sites=3)


def test_hospitals_have_names_of_their_own(tmp_path):
    a = write_totalsegmentator(tmp_path / "a/set", "mri", 1)
    b = write_totalsegmentator(tmp_path / "b/set", "ct", 2)
    c = write_totalsegmentator(tmp_path / "set-1", "ct", 1)
    write_nnunet(b, "ct", 3)
    sources = find_sources(configure(tmp_path, mri=[a], ct=[b], layout="totalsegmentator"))
    found = [(s.name, s.folder, s.modality, len(s.cases)) for s in sources]
    assert found == [("set-1", str(a), "mri", 1), ("set-2", str(b), "ct", 2)]
    with pytest.raises(DataError, match="two hospitals would have the same name"):
        find_sources(configure(tmp_path, mri=[a], ct=[b, c], layout="totalsegmentator"))


def test_one_scan_has_one_role(tmp_path, ct_folder):
    message = "s0000/ct.nii.gz: is there twice, in two of the folders or under two names"
    (tmp_path / "link").symlink_to(ct_folder)
    for more in ({"test": [ct_folder]}, {"ct": [ct_folder, tmp_path / "link"]}):
        with pytest.raises(DataError, match=message):
            on_scans(tmp_path, **{"ct": [ct_folder], **more})
    assert not (tmp_path / "cache").exists()
    amos = write_amos(write_amos(tmp_path / "amos", "ct", 3), "mri", 3)
    (mri, ct), _ = on_scans(tmp_path, ct=[amos], mri=[amos])  # its CT and its MRI
    assert [(h.name, held(h)["val"]) for h in (mri, ct)] == [
        ("amos-1", ["amos_0502", "amos_0503"]),
        ("amos-2", ["amos_0002", "amos_0003"]),
    ]


def test_a_bad_case_is_named_or_left_out(tmp_path, ct_folder, mri_folder):
    mri = shutil.copytree(mri_folder, tmp_path / "mri")
    truncate(mri / "imagesTr/case_001_0000.nii.gz")
    folders = {"ct": [ct_folder], "mri": [mri]}
    with pytest.raises(DataError, match=r"case_001_0000.nii.gz: cannot be read.*\n.*--skip-bad"):
        on_scans(tmp_path, **folders)
    (found, _), [reason] = on_scans(tmp_path, **folders, skip_bad=True)
    assert reason.startswith(f"left out: {mri}/imagesTr/case_001_0000.nii.gz: cannot be read")
    assert ids_of(found) == ["case_000", "case_002", "case_003"]


NO_MRI = (
    "there are no MRI training cases, and an arm needs some; give folders with --mri or choose "
    "other --arms$"
)


def test_a_modality_that_an_arm_needs_must_be_there(tmp_path, ct_folder, monkeypatch):
    """Before a scan is read where the files tell it, and after that where they do not."""
    assert on_scans(tmp_path, {"ct"}, ct=[ct_folder])
    empty = write_totalsegmentator(tmp_path / "mri", "mri", 2, ["train", "val"])
    for mask in (empty / "s0000/segmentations").iterdir():
        edit(mask, np.zeros((32, 32, 32), np.uint8))
    left_out = "left out: mri, train: 1 scans without any organ"
    with pytest.raises(DataError, match=f"^{left_out}\n{NO_MRI}"):
        on_scans(tmp_path, {"mri"}, ct=[ct_folder], mri=[empty])
    monkeypatch.setattr(hospitals_module, "load_cases", lambda *_: pytest.fail("is read"))
    with pytest.raises(DataError, match=f"^{NO_MRI}"):
        on_scans(tmp_path, {"ct", "mri"}, ct=[ct_folder])


def test_organs_that_a_folder_lacks_need_partial_labels(tmp_path, mri_folder):
    few = write_nnunet(tmp_path / "few", "mri", 4, labels=FEW)
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 3, organs=["liver", "kidneys"])
    folders = {"ct": [ct], "mri": [few, mri_folder]}
    with pytest.raises(DataError, match="use --organs liver or --partial-labels"):
        on_scans(tmp_path, **folders)
    hospitals, _ = on_scans(tmp_path, **folders, partial_labels=True)
    assert [hospital.train[0].labelled.tolist() for hospital in hospitals] == [
        [True, True, False, True, False, False],
        [True] * 6,
        [True, True, True, False, False, False],
    ]
    assert set(np.unique(hospitals[2].train[0].read_volume().labels)) == {0, 1, 2}
    (mri,), _ = on_scans(tmp_path, mri=[few], organs=("spleen", "liver"))
    assert mri.train[0].labelled.all()
    partial = configure(tmp_path, mri=[few], partial_labels=True)
    with pytest.raises(DataError, match="no folder labels .*use --organs liver spleen"):
        load_hospitals(partial)
    assert load_hospitals(partial, all_sites_local=False)[0][42][0].name == "few"
    with pytest.raises(DataError, match="not every folder labels"):
        load_hospitals(configure(tmp_path, mri=[few]), all_sites_local=False)


def test_the_record_says_which_case_went_where_and_changes_with_its_files(tmp_path, mri_folder):
    mri = shutil.copytree(mri_folder, tmp_path / "mri")
    hospitals, _ = on_scans(tmp_path, mri=[mri])
    found = record(hospitals)
    splits = {split: [] for split in SPLITS}
    for key, value in sorted(found.items()):
        splits[value.split()[0]].append(key.removeprefix("mri mri "))
    assert splits == held(hospitals[0])
    scan = mri / "imagesTr/case_002_0000.nii.gz"
    array = np.asarray(nibabel.load(scan).dataobj).copy()
    array[16, 16, 16] += 9
    edit(scan, array)
    assert record(hospitals) == found  # of what was read
    changed = record(on_scans(tmp_path, mri=[mri])[0])
    assert {key for key in found if found[key] != changed[key]} == {"mri mri case_002"}
    moved = record(on_scans(tmp_path, mri=[shutil.move(mri, tmp_path / "x/mri")])[0])
    assert moved == changed
    phantoms = record(on_phantoms(5))
    assert (phantoms["ct ct phantom5-13"], phantoms["mri mri phantom5-11"]) == ("val", "train")
    assert (phantoms["unseen-scanner ct phantom5-16"], len(phantoms)) == ("test", 64)


def test_scans_without_any_organ_are_tested_on_only(tmp_path):
    """Three heads in a whole-body set: none trains or validates, and n_k does not count them."""
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 6, ["train"] * 3 + ["val"] * 2 + ["test"])
    for id_ in ("s0000", "s0003", "s0005"):
        for mask in (ct / id_ / "segmentations").iterdir():
            edit(mask, np.zeros((32, 32, 32), np.uint8))
    [hospital], notes = on_scans(tmp_path, ct=[ct])
    assert held(hospital) == {"train": ["s0001", "s0002"], "val": ["s0004"], "test": ["s0005"]}
    assert notes == [
        "left out: ct, train: 1 scans without any organ",
        "left out: ct, val: 1 scans without any organ",
    ]


def held_by(*organs):
    """A hospital whose validation cases hold the organs that are given for each."""
    cases = []
    for n, found in enumerate(organs):
        labels = np.zeros((4, 4, 4), np.uint8)
        labels[0, 0, : len(found)] = found
        known = np.ones(6, dtype=bool)
        counts = make_volume(f"case{n}", "ct", labels.astype(np.float32), labels, known).counts
        never = (lambda: pytest.fail("is not asked for"),) * 2
        cases.append(PreparedCase(f"case{n}", "ct", counts, known, *never))
    return Hospital("a", "ct", cases[:1], cases, [])


def test_a_round_is_validated_on_a_few_cases_that_hold_every_organ():
    """Of 40 cases with a liver, one each has a spleen and a pancreas, and one is empty."""
    hospital, drawn = held_by((3,), *[(1,)] * 38, (1, 4), ()), set()
    for seed in range(5):
        chosen = validation_cases(seed, [hospital], ["ct"])
        numbers = [int(case.id[4:]) for case in chosen]
        assert len(numbers) == VAL_CASES == 8
        assert numbers == sorted(numbers)
        assert {0, 39} < set(numbers)
        assert 40 not in numbers
        assert validation_cases(seed, [hospital], ["mri", "ct"]) == chosen
        drawn.add(tuple(numbers))
    assert len(drawn) == 5


def test_who_validates():
    """All if they are few, training cases if there are none; only hospitals that take part."""
    ct = held_by((1,), (2,), ())
    mri, tested = ct._replace(modality="mri", val=ct.val[1:]), ct._replace(modality="")
    everyone = [mri, ct, tested]
    assert validation_cases(1, everyone, ["mri"]) == mri.val
    assert validation_cases(1, everyone, ["ct"]) == ct.val
    assert validation_cases(1, everyone, ["mri", "ct"]) == [*mri.val, *ct.val]
    assert validation_cases(1, everyone, []) == []
    assert validation_cases(1, [ct, ct], ["ct"]) == [*ct.val, *ct.val]
    assert validation_cases(1, [ct._replace(val=[])], ["ct"]) == ct.train
    assert validation_cases(1, [ct._replace(val=[], train=[])], ["ct"]) == []


COPIES = "WARNING: {} scans are there twice, so training cases may be tested on: {}"


def test_copies_of_training_scans_in_a_test_folder_are_warned_of(tmp_path, ct_folder):
    """By content: under another name, but not if a voxel differs; from the cache too."""
    test = write_nnunet(tmp_path / "held_out", "ct", 3, seed=8)
    folders, scan = {"ct": [ct_folder], "test": [test]}, test / "imagesTr/case_001_0000.nii.gz"
    assert on_scans(tmp_path, **folders)[1] == []
    shutil.copy(ct_folder / "s0002/ct.nii.gz", scan)
    copy = f"{scan} is a copy of {ct_folder}/s0002/ct.nii.gz"
    for _ in range(2):
        assert on_scans(tmp_path, **folders)[1] == [COPIES.format(1, copy)]
    array = np.asarray(nibabel.load(scan).dataobj).copy()
    array[16, 16, 16] += 9
    edit(scan, array)
    shutil.copy(scan, test / "imagesTr/case_002_0000.nii.gz")  # nobody trains on either
    assert on_scans(tmp_path, **folders)[1] == []


def test_copies_in_one_folder_and_in_two_are_warned_of(tmp_path):
    """However they are compressed, and whatever else their headers say."""
    a = write_totalsegmentator(tmp_path / "a", "ct", 7)
    b = write_totalsegmentator(tmp_path / "b", "ct", 7, seed=5)
    pairs = [(f"s000{i}", b, f"s000{i}") for i in range(6)] + [("s0001", a, "s0006")]
    for id_, folder, copy in pairs:
        file = nibabel.load(a / id_ / "ct.nii.gz")
        file.header["descrip"] = b"from elsewhere"
        (folder / copy / "ct.nii.gz").write_bytes(gzip.compress(file.to_bytes(), 1))
    copies = [f"{f / c}/ct.nii.gz is a copy of {a / i}/ct.nii.gz" for i, f, c in pairs]
    shown = f"{copies[6]}, {', '.join(copies[:4])} and 2 more"  # the folder's own come first
    assert on_scans(tmp_path, ct=[a, b])[1] == [COPIES.format(7, shown)]


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_too_few_cases_to_choose_a_round_or_to_report_are_told_once(seeds, tmp_path):
    mri = write_totalsegmentator(tmp_path / "mri", "mri", 4, ["train"] + ["val"] * 2 + ["test"])
    ct = write_totalsegmentator(tmp_path / "ct", "ct", 5, ["train"] + ["val"] * 3 + ["test"])
    both = configure(tmp_path, mri=[mri], ct=[ct], seeds=seeds)
    few = (
        "WARNING: fewer than three validation cases of {}: the best round is then chosen by chance"
    )
    assert load_hospitals(both, ["mri", "ct"])[1] == [few.format("MRI")]
    assert load_hospitals(both, ["ct"])[1] == []
    assert load_hospitals(both, ["mri"], all_sites_local=False)[1] == []  # others validate too
    one = configure(tmp_path, ct=[write_totalsegmentator(tmp_path / "one", "ct", 1)], seeds=seeds)
    none = "WARNING: no hospital here has a test case; give --test, or three cases or more"
    assert load_hospitals(one, ["ct"])[1] == [few.format("CT"), none]


def test_what_may_be_wrong_is_said_with_a_few_names(tmp_path):
    """Each time, from the cache too, and once where it holds for a folder or for many scans."""
    labels = {"background": 0, "liver": 6, "spleen": 1, "cyst": 3, "other": [2, 4, 8, 10]}
    mri = write_nnunet(tmp_path / "mri", "mri", 9, labels=labels)
    scans = [mri / f"imagesTr/case_{i:03d}_0000.nii.gz" for i in range(9)]
    for scan in scans[1:8]:
        make_forms_disagree(scan)
    for _ in range(2):
        apart, forms = on_scans(tmp_path, mri=[mri], organs=("liver", "spleen"))[1]
        assert apart.startswith(f"WARNING: {mri}/dataset.json: labels cyst apart from the organs")
        assert forms == (
            f"WARNING: {', '.join(map(str, scans[1:6]))} and 2 more: its sform and qform put it at "
            "different places; the sform is used"
        )
