"""Entries of the cache: found by content, whole or absent, and told where they are damaged."""

import gzip
import itertools
import json
import os
import shutil
import threading
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import (
    make_forms_disagree,
    save,
    set_voxel,
    truncate,
    write_nnunet,
    write_totalsegmentator,
)

from data import VOXELS_PER_ORGAN, generator, patches
from scans import cache as cache_module
from scans import cases as cases_module
from scans import machine
from scans.cache import CachedVolume, cache_bytes, cache_key, check_disk, fingerprint
from scans.cases import load_case, load_cases, preprocess, read_usable
from scans.files import TEMPORARY, DataError, lock
from scans.layouts import ORGANS, find_cases
from scans.phantom import SPACING, make_phantom

ARRAYS = ("image", "labels", "foreground_voxels", "labelled", "counts")


def entries(cache):
    """All that lies in a cache, but for its lock."""
    found = set(cache.iterdir()) - {cache / "lock"}
    assert (cache / "lock").read_text() == ""
    return sorted(found)


# -------------------------------------------------------------------------------- what a key is of


def test_a_fingerprint_is_of_what_the_files_hold(tmp_path):
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))
    plain = tmp_path / "plain.nii"
    plain.write_bytes(gzip.decompress(case.image.read_bytes()))
    for image in (case.image, plain):
        case = case._replace(image=image)
        found = fingerprint(case, ORGANS)
        label = tmp_path / "labelsTr/case_000.nii.gz"
        contents = [nibabel.load(case.image).to_bytes(), gzip.decompress(label.read_bytes())]
        assert [stamp[1] for stamp in found] == [zlib.crc32(content) for content in contents]
        sizes = [path.stat().st_size for path in (case.image, label)]
        assert [stamp[0] for stamp in found] == sizes
    label.unlink()
    assert fingerprint(case, ORGANS) == found[:1]


@pytest.mark.parametrize("file", ["imagesTr/case_000_0000.nii.gz", "labelsTr/case_000.nii.gz"])
def test_a_touched_file_is_the_same_and_one_changed_byte_makes_another(file, tmp_path):
    [case] = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    before, path = cache_key(case, ORGANS, (12.0,)), tmp_path / "mri" / file
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    assert cache_key(case, ORGANS, (12.0,)) == before
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    assert cache_key(case, ORGANS, (12.0,)) != before
    path.write_bytes(gzip.decompress(path.read_bytes()))
    plain = cache_key(case, ORGANS, (12.0,))
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert cache_key(case, ORGANS, (12.0,)) not in (before, plain)


def members(content, cuts):
    """A .gz that holds a member for each part of the content."""
    return b"".join(gzip.compress(content[a:b]) for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("last", [0, 100, 4096])
def test_a_gz_of_several_members_is_known_by_all_of_them(last, tmp_path):
    """As bgzip and cat write them; the trailer at the end speaks of the last member alone."""
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))
    content = bytearray(gzip.decompress(case.image.read_bytes()))
    cuts = [0, 50000, len(content) - last, len(content)]
    keys = set()
    for bit in (0, 1, 2):
        content[40000] ^= bit
        case.image.write_bytes(members(bytes(content), cuts))
        os.utime(case.image, ns=(0, bit))
        assert read_usable(case, ORGANS)[0].voxels.shape == (32, 32, 32)
        keys.add(cache_key(case, ORGANS, ()))
    assert len(keys) == 3


def test_a_key_changes_with_every_setting(tmp_path):
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))
    (path, values), *_ = case.masks["liver"]
    keys = [
        cache_key(case, ORGANS, (12.0,)),
        cache_key(case, ORGANS, (11.0,)),
        cache_key(case, ORGANS[:2], (12.0,)),
        cache_key(case, ORGANS[::-1], (12.0,)),
        cache_key(case._replace(modality="ct"), ORGANS, (12.0,)),
        cache_key(case._replace(masks=case.masks | {"liver": [(path, (6,))]}), ORGANS, (12.0,)),
        cache_key(case._replace(masks={"liver": [(path, values)]}), ORGANS, (12.0,)),
    ]
    assert len(set(keys)) == len(keys)
    same = case._replace(folder="x", id="x", layout="x", split="test")
    assert cache_key(same, ORGANS, (12.0,)) == keys[0]


def test_masks_that_change_places_make_another_entry(tmp_path):
    """Each file is there as before, but the organs' are swapped."""
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    before = cache_key(case, ORGANS, ())
    liver, spleen = (case.masks[organ][0][0] for organ in ("liver", "spleen"))
    liver.rename(tmp_path / "kept")
    spleen.rename(liver)
    (tmp_path / "kept").rename(spleen)
    assert cache_key(case, ORGANS, ()) != before
    masks = {"liver": [(liver, ())], "spleen": [(spleen, ())]}
    keys = {
        cache_key(case._replace(masks=masks | {"pancreas": [(path, ())]}), ORGANS, ())
        for path in (liver, spleen)
    }
    assert len(keys) == 2


def test_a_file_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module, "_content_crc", denied)
    with pytest.raises(DataError, match="case_000_0000.nii.gz: cannot be read .*denied"):
        fingerprint(case, ORGANS)


# --------------------------------------------------------------------------- entries, through cases


def test_the_cache_holds_what_would_be_read_and_notices_changes(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 2)
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    found, _ = load_cases(cases, ORGANS, 12.0, cache)
    for case in cases:
        plain, (cached, read_target, files, *_) = load_case(case, ORGANS, 12.0), found[case.image]
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(plain.volume, name), getattr(cached, name))
        for name in ("id", "modality"):
            assert getattr(plain.volume, name) == getattr(cached, name)
        assert files == plain.files == fingerprint(case, ORGANS)
        assert isinstance(cached.image, np.memmap)
        target, spacing = read_target()
        scan, expected = read_usable(case, ORGANS)
        np.testing.assert_array_equal(target, expected)
        assert (target.dtype, spacing) == (np.uint8, scan.spacing)
    assert len(entries(cache)) == 2

    def stamps():
        return {p: p.stat().st_mtime_ns for folder in entries(cache) for p in folder.rglob("*")}

    before = stamps()
    load_cases(cases, ORGANS, 12.0, cache)
    assert stamps() == before  # nothing written

    load_cases(cases, ORGANS, 11.0, cache)
    load_cases(cases, ORGANS[:2], 12.0, cache)
    assert len(entries(cache)) == 6
    mask = tmp_path / "ct/s0001/segmentations/liver.nii.gz"
    save(mask, np.zeros((32, 32, 32), np.uint8))
    again, _ = load_cases(cases, ORGANS, 12.0, cache)
    assert len(entries(cache)) == 7
    assert not (again[cases[1].image].volume.labels == 1).any()


def test_a_data_set_that_moves_or_is_copied_keeps_its_cache(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "here" / "ct", "ct", 2)
    cases, cache = find_cases(tmp_path / "here" / "ct"), tmp_path / "cache"
    load_cases(cases, ORGANS, 12.0, cache)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.setattr(cases_module, "preprocess", lambda *_: pytest.fail("is read again"))
    moved = find_cases(tmp_path / "there" / "ct")
    found, _ = load_cases(moved, ORGANS, 12.0, cache)
    assert list(found) == [case.image for case in moved]
    assert len(entries(cache)) == 2


def test_two_cases_of_one_content_share_an_entry(tmp_path, monkeypatch):
    """Both find none, are read at the same time, and the second finds that of the first."""
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    shutil.copytree(tmp_path / "ct/s0000", tmp_path / "ct/s0001")
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    together = threading.Barrier(2, timeout=10)

    def preprocess_together(*args):
        together.wait()
        return preprocess(*args)

    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(cases_module, "preprocess", preprocess_together)
    found, left_out = load_cases(cases, ORGANS, 12.0, cache)
    assert left_out == []
    assert len(entries(cache)) == 1
    plain, *_ = preprocess(cases[0], ORGANS, 12.0)
    for case in cases:
        volume = found[case.image].volume
        assert volume.id == case.id
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(volume, name), getattr(plain, name))


def test_the_order_of_organs_makes_another_entry(tmp_path):
    cases, cache = find_cases(write_nnunet(tmp_path / "mri", "mri", 1)), tmp_path / "cache"
    for organs in (["liver", "spleen"], ["spleen", "liver"], ["spleen"], ["liver"]):
        found, _ = load_cases(cases, organs, SPACING, cache)
        target = make_phantom(1, "mri", 0)[1]
        labels = sum(n * (target == ORGANS.index(o) + 1) for n, o in enumerate(organs, start=1))
        np.testing.assert_array_equal(found[cases[0].image].volume.labels, labels)
    assert len(entries(cache)) == 4


def test_a_full_disk_leaves_no_half_entry(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    cases, cache, save_array = find_cases(tmp_path / "ct"), tmp_path / "cache", np.save

    def full(path, array):
        if path.name == "labels.npy":
            raise OSError(28, "No space left on device")
        save_array(path, array)

    monkeypatch.setattr(cache_module.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        load_cases(cases, ORGANS, 12.0, cache)
    assert entries(cache) == []


def test_an_entry_that_another_process_wrote_meanwhile_is_used(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    other, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "elsewhere")

    def preprocess_slowly(*args):
        [made] = entries(tmp_path / "elsewhere")
        made.rename(cache / made.name)
        return preprocess(*args)

    monkeypatch.setattr(cases_module, "preprocess", preprocess_slowly)
    found, left_out = load_cases(cases, ORGANS, 12.0, cache)
    [(volume, *_)], [entry] = found.values(), entries(cache)
    assert left_out == []
    assert (volume.folder, entry.name) == (entry, other[cases[0].image].volume.folder.name)
    np.testing.assert_array_equal(volume.labels, preprocess(cases[0], ORGANS, 12.0)[0].labels)


def test_one_process_at_a_time_fills_a_cache(tmp_path, monkeypatch):
    """The second one waits, and then finds what the first one has made."""
    write_totalsegmentator(tmp_path / "ct", "ct", 2)
    cases, cache, found = find_cases(tmp_path / "ct"), tmp_path / "cache", []
    load_cases(cases, ORGANS, 12.0, tmp_path / "elsewhere")
    cache.mkdir()
    thread = threading.Thread(
        target=lambda: found.append(load_cases(cases, ORGANS, 12.0, cache)), daemon=True
    )
    monkeypatch.setattr(cases_module, "preprocess", lambda *_: pytest.fail("is read again"))
    with lock(cache / "lock") as held:
        assert held
        thread.start()
        thread.join(0.3)
        assert found == []
        for made in entries(tmp_path / "elsewhere"):
            made.rename(cache / made.name)
    thread.join(20)
    [(prepared, left_out)] = found
    assert list(prepared) == [case.image for case in cases]
    assert left_out == []


def test_what_a_killed_process_left_half_is_removed(tmp_path):
    cases, cache = find_cases(write_nnunet(tmp_path / "mri", "mri", 1)), tmp_path / "cache"
    (cache / TEMPORARY / "abc").mkdir(parents=True)
    (cache / TEMPORARY / "abc/image.npy").write_bytes(b"half")
    (cache / "tmp-mine").write_bytes(b"mine")
    load_cases(cases, ORGANS, 12.0, cache)
    [entry, mine] = entries(cache)
    assert (entry / "entry.json").is_file()
    assert mine.read_bytes() == b"mine"


def test_patches_of_cached_volumes_are_those_of_volumes_in_memory(tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 2))
    drawn = []
    for cache in (None, tmp_path / "cache"):
        found, _ = load_cases(cases, ORGANS, 6.0, cache)
        volumes = [case.volume for case in found.values()]
        drawn.append(list(patches(volumes, 24, 3, 10, generator(3))))
    for plain, cached in zip(*drawn, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files here")
def test_nothing_stays_mapped(tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    found, _ = load_cases(cases, ORGANS, 6.0, tmp_path / "cache")
    [(volume, read_target, *_)] = found.values()
    image, maps = volume.image, Path("/proc/self/maps")
    assert f"{volume.folder}/image.npy" in maps.read_text()
    del image
    assert volume.labels.any()
    assert len(volume.foreground_voxels)
    read_target()
    assert str(tmp_path) not in maps.read_text()


# ------------------------------------------------------------------------------------------ damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def use(case):
    """Everything that an experiment uses of a case."""
    case.read_target()
    return [getattr(case.volume, name) for name in ARRAYS]


@pytest.fixture
def entry(tmp_path):
    """The folder of a case's entry."""
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    [folder] = entries(tmp_path / "cache")
    return folder


def load_again(tmp_path, **settings):
    cases = find_cases(tmp_path / "mri")
    return load_cases(cases, ORGANS, 12.0, tmp_path / "cache", **settings)[0]


FILES = ["image.npy", "labels.npy", "foreground_voxels.npy", "target.npz", "entry.json"]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", [Path.unlink, truncate, empty])
def test_an_entry_of_other_sizes_is_refused_when_it_is_opened(
    spoil, name, skip_bad, entry, tmp_path
):
    """And made again once its folder is deleted. The case itself is not bad."""
    spoil(entry / name)
    message = rf"{entry}: is damaged \(.*\); delete the folder, and it is made again$"
    with pytest.raises(DataError, match=message):
        load_again(tmp_path, skip_bad=skip_bad)
    shutil.rmtree(entry)
    [case] = load_again(tmp_path).values()
    plain, *_ = preprocess(find_cases(tmp_path / "mri")[0], ORGANS, 12.0)
    for found, expected in zip(use(case), (getattr(plain, n) for n in ARRAYS), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(case.read_target()[0], make_phantom(1, "mri", 0)[1])


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("spoil", [flip, Path.unlink])
def test_another_content_is_refused_at_its_first_use(spoil, name, entry, tmp_path):
    [case] = load_again(tmp_path).values()
    spoil(entry / name)
    with pytest.raises(DataError, match=rf"{entry}: is damaged \(.*{name}.*\); delete the folder"):
        use(case)
    with pytest.raises(DataError, match="is damaged"):  # and at every use after it
        use(case)


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("spoil", [truncate, Path.unlink])
def test_another_size_is_noticed_at_every_use(spoil, name, entry, tmp_path):
    [case] = load_again(tmp_path).values()
    use(case)
    spoil(entry / name)
    with pytest.raises(DataError, match=rf"{entry}: is damaged \({name} should have \d+ bytes\)"):
        use(case)


def test_a_checksum_is_compared_once(entry, tmp_path, monkeypatch):
    [case] = load_again(tmp_path).values()
    before = use(case)
    monkeypatch.setattr(cache_module, "_crc", lambda _: pytest.fail("is compared again"))
    for again, array in zip(use(case), before, strict=True):
        np.testing.assert_array_equal(again, array)


def without(key):
    return lambda about: {k: v for k, v in about.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        lambda about: [],
        lambda about: None,
        lambda about: "text",
        lambda about: 7,
        without("counts"),
        without("files"),
        lambda about: about | {"counts": None},
        lambda about: about | {"counts": "text"},
        lambda about: about | {"counts": [float("inf")] * 6},
        lambda about: about | {"counts": about["counts"][1:]},
        lambda about: about | {"files": None},
        lambda about: about | {"files": "text"},
        lambda about: about | {"files": without("target.npz")(about["files"])},
        lambda about: about | {"files": about["files"] | {"image.npy": None}},
        lambda about: about | {"files": about["files"] | {"image.npy": [1, 2, 3]}},
        lambda about: about | {"files": about["files"] | {"image.npy": ["1", 2]}},
    ],
)
def test_an_entry_that_says_something_else_is_damaged(change, entry, tmp_path):
    about = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps(change(about)))
    with pytest.raises(DataError, match=f"{entry}: is damaged"):
        CachedVolume(entry, "x", "mri", np.ones(6, bool))


def test_every_changed_digit_of_an_entry_is_noticed(entry):
    CachedVolume(entry, "x", "mri", np.ones(6, bool))
    text = (entry / "entry.json").read_text()
    places = [i for i, character in enumerate(text) if character.isdigit()]
    assert len(places) > 50
    for i in places:
        (entry / "entry.json").write_text(f"{text[:i]}{(int(text[i]) + 1) % 10}{text[i + 1 :]}")
        with pytest.raises(DataError, match=f"{entry}: is damaged"):
            CachedVolume(entry, "x", "mri", np.ones(6, bool))
    (entry / "entry.json").write_text(text)
    assert CachedVolume(entry, "x", "mri", np.ones(6, bool)).counts.sum() > 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("file", ["imagesTr/case_000_0000.nii.gz", "labelsTr/case_000.nii.gz"])
def test_a_file_that_is_edited_while_it_is_read_makes_no_entry(
    file, keep_time, cached, tmp_path, monkeypatch
):
    """Not even one of the same size and time; and the next run is right."""
    [case] = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    path, cache = tmp_path / "mri" / file, tmp_path / "cache" if cached else None
    content = bytearray(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(bytes(content), 0))  # uncompressed, so that its size stays
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns

    def preprocess_late(*args):
        content[-1] ^= 1
        path.write_bytes(gzip.compress(bytes(content), 0))
        if keep_time:
            os.utime(path, ns=times)
        return preprocess(*args)

    monkeypatch.setattr(cases_module, "preprocess", preprocess_late)
    message = f"{case.image}: it or its labels were changed while they were read; the same command"
    with pytest.raises(DataError, match=message):
        load_cases([case], ORGANS, 12.0, cache)
    monkeypatch.setattr(cases_module, "preprocess", preprocess)
    if cached:
        assert entries(cache) == []
    os.utime(path, ns=(0, 1))
    [found] = load_cases([case], ORGANS, 12.0, cache)[0].values()
    plain, *_ = preprocess(case, ORGANS, 12.0)
    np.testing.assert_array_equal(found.volume.image, plain.image)
    np.testing.assert_array_equal(found.volume.labels, plain.labels)


def test_what_may_be_wrong_with_a_case_is_said_of_its_entry_too(tmp_path):
    """By the files as they are now: the data set has moved since."""
    mri, cache = write_nnunet(tmp_path / "mri", "mri", 1), tmp_path / "cache"
    set_voxel(77)(mri / "labelsTr/case_000.nii.gz")
    make_forms_disagree(mri / "imagesTr/case_000_0000.nii.gz")
    [case] = load_cases(find_cases(mri), ORGANS, 12.0, cache)[0].values()
    expected = [problem._replace(file=problem.file.name) for problem in case.problems]
    assert [problem.what.split()[0] for problem in expected] == ["its", "has"]
    mri.rename(tmp_path / "moved")
    [again] = load_cases(find_cases(tmp_path / "moved"), ORGANS, 12.0, cache)[0].values()
    assert [problem._replace(file=problem.file.name) for problem in again.problems] == expected
    assert {problem.file.parents[1] for problem in again.problems} == {tmp_path / "moved"}
    [plain] = load_cases(find_cases(tmp_path / "moved"), ORGANS, 12.0)[0].values()
    assert list(plain.problems) == list(again.problems)
    assert len(entries(cache)) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))
    for path in (case.image, tmp_path / "labelsTr/case_000.nii.gz"):
        path.unlink()
        os.mkfifo(path)
    assert fingerprint(case, ORGANS) == []
    assert cache_bytes([case], ORGANS, 12.0) == cache_bytes([case], ORGANS, 1.0)
    with pytest.raises(DataError, match="case_000_0000.nii.gz: is no file but a folder, a pipe"):
        load_cases([case], ORGANS, 12.0, tmp_path / "cache")


def test_damage_that_is_found_while_patches_are_drawn_names_the_case(entry, tmp_path):
    [case] = load_again(tmp_path).values()
    flip(entry / "image.npy")
    with pytest.raises(DataError, match="image.npy has another checksum") as error:
        next(patches([case.volume], 8, 1, 1, generator(0)))
    assert error.value.__notes__ == ["case case_000"]


# --------------------------------------------------------------------------------------------- disk


def in_the_cache(cache):
    return sum(path.stat().st_size for path in cache.glob("*/*"))


@pytest.mark.parametrize("spacing", [4.0, SPACING])
def test_headers_tell_what_the_cache_will_take(spacing, tmp_path):
    cases, cache = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 2)), tmp_path / "cache"
    load_cases(cases, ORGANS, spacing, cache)
    foreground = 2 * len(ORGANS) * 16 * VOXELS_PER_ORGAN  # at most, and here much of it all
    found = in_the_cache(cache)
    assert found <= cache_bytes(cases, ORGANS, spacing) <= 1.1 * found + foreground


def test_the_disk_must_hold_what_the_cache_lacks(tmp_path, monkeypatch):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 3))
    cache = tmp_path / "a/cache"
    wanted = [cache_bytes(cases[:n], ORGANS, 2.0) for n in range(4)]
    asked, free = [], wanted[2]

    def disk_usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(10 * free, 9 * free, free)

    monkeypatch.setattr(cache_module.shutil, "disk_usage", disk_usage)
    with pytest.raises(DataError, match=r"3 preprocessed .* [\d.]+ GB in .*/a/cache, [\d.]+ GB"):
        check_disk(cases, ORGANS, 2.0, cache)
    assert asked == [tmp_path]  # the folder that is there
    assert check_disk(cases[:2], ORGANS, 2.0, cache).startswith("2 preprocessed scans take 0.0")
    load_cases(cases[:1], ORGANS, 2.0, cache)
    free = wanted[1]
    with pytest.raises(DataError, match="2 preprocessed scans"):
        check_disk(cases, ORGANS, 2.0, cache)
    free = wanted[2]
    assert check_disk(cases, ORGANS, 2.0, cache).startswith("2 preprocessed scans")
    assert check_disk(cases[:1], ORGANS, 2.0, cache) == ""
    assert asked[-1] == cache
    truncate(cases[1].image)  # which reading will say
    assert check_disk(cases, ORGANS, 2.0, cache).startswith("2 preprocessed scans")
