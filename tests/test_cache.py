"""Entries of the cache: found by content, whole or absent, made anew where they are damaged."""

import gzip
import itertools
import os
import shutil
import threading
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import save, truncate, write_nnunet, write_totalsegmentator

import cache as cache_module
import data
import resources
from cache import cache_key, fingerprint
from cases import read_usable
from data import load_case, load_cases, patches, read_target
from datasets import ORGANS, DataError, find_cases
from phantom import SPACING, phantom

ARRAYS = ("image", "labels", "foreground_voxels", "labelled", "counts")


# -------------------------------------------------------------------------------- what a key is of


def test_a_fingerprint_is_of_what_the_files_hold(tmp_path):
    [case] = find_cases(write_nnunet(tmp_path, "mri", 1))
    plain = tmp_path / "plain.nii"
    plain.write_bytes(gzip.decompress(case.image.read_bytes()))
    for image in (case.image, plain):
        case = case._replace(image=image)
        found = fingerprint(case, ORGANS)
        label = tmp_path / "labelsTr/case_000.nii.gz"
        assert [stamp[0] for stamp in found] == [str(case.image.resolve()), str(label.resolve())]
        contents = [nibabel.load(case.image).to_bytes(), gzip.decompress(label.read_bytes())]
        assert [stamp[2] for stamp in found] == [zlib.crc32(content) for content in contents]
        sizes = [path.stat().st_size for path in (case.image, label)]
        assert [stamp[1] for stamp in found] == sizes
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


# ---------------------------------------------------------------------------- entries, through data


def test_the_cache_holds_what_would_be_read_and_notices_changes(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 2)
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    volumes, _ = load_cases(cases, ORGANS, 12.0, cache)
    for case in cases:
        plain, cached = load_case(case, ORGANS, 12.0), volumes[case.image]
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(plain, name), getattr(cached, name))
        for name in ("id", "modality", "case"):
            assert getattr(plain, name) == getattr(cached, name)
        assert isinstance(cached.image, np.memmap)
        target, spacing = read_target(cached, 12.0)
        scan, expected = read_usable(case, ORGANS)
        np.testing.assert_array_equal(target, expected)
        assert (target.dtype, spacing) == (np.uint8, scan.spacing)
    entries = sorted(path.name for path in cache.iterdir())
    assert len(entries) == 2

    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    load_cases(cases, ORGANS, 12.0, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == stamps  # nothing written

    load_cases(cases, ORGANS, 11.0, cache)
    load_cases(cases, ORGANS[:2], 12.0, cache)
    assert len(list(cache.iterdir())) == 6
    mask = tmp_path / "ct/s0001/segmentations/liver.nii.gz"
    save(mask, np.zeros((32, 32, 32), np.uint8))
    again, _ = load_cases(cases, ORGANS, 12.0, cache)
    assert len(list(cache.iterdir())) == 7
    assert not (again[cases[1].image].labels == 1).any()


def test_a_data_set_that_moves_or_is_copied_keeps_its_cache(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "here" / "ct", "ct", 2)
    cases, cache = find_cases(tmp_path / "here" / "ct"), tmp_path / "cache"
    load_cases(cases, ORGANS, 12.0, cache)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.setattr(data, "load_case", lambda *_: pytest.fail("is read again"))
    moved = find_cases(tmp_path / "there" / "ct")
    volumes, _ = load_cases(moved, ORGANS, 12.0, cache)
    assert [volume.case for volume in volumes.values()] == moved
    assert len(list(cache.iterdir())) == 2


def test_two_cases_of_one_content_share_an_entry(tmp_path, monkeypatch):
    """Both find none, are read at the same time, and the second finds that of the first."""
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    shutil.copytree(tmp_path / "ct/s0000", tmp_path / "ct/s0001")
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    together = threading.Barrier(2, timeout=10)

    def load_together(*args):
        together.wait()
        return load_case(*args)

    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(data, "load_case", load_together)
    volumes, left_out = load_cases(cases, ORGANS, 12.0, cache)
    assert left_out == []
    assert len(list(cache.iterdir())) == 1
    plain = load_case(cases[0], ORGANS, 12.0)
    for case, volume in zip(cases, volumes.values(), strict=True):
        assert (volume.id, volume.case) == (case.id, case)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(volume, name), getattr(plain, name))


def test_the_order_of_organs_makes_another_entry(tmp_path):
    cases, cache = find_cases(write_nnunet(tmp_path / "mri", "mri", 1)), tmp_path / "cache"
    for organs in (["liver", "spleen"], ["spleen", "liver"], ["spleen"], ["liver"]):
        volumes, _ = load_cases(cases, organs, SPACING, cache)
        target = phantom(1, "mri", 0)[1]
        labels = sum(n * (target == ORGANS.index(o) + 1) for n, o in enumerate(organs, start=1))
        np.testing.assert_array_equal(volumes[cases[0].image].labels, labels)
    assert len(list(cache.iterdir())) == 4


def test_a_full_disk_leaves_no_half_entry(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    cases, cache, save_array = find_cases(tmp_path / "ct"), tmp_path / "cache", np.save

    def full(path, array):
        if path.name == "labels.npy":
            raise OSError(28, "No space left on device")
        save_array(path, array)

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        load_cases(cases, ORGANS, 12.0, cache)
    assert list(cache.iterdir()) == []


def test_an_entry_that_another_process_wrote_meanwhile_is_used(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    other, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "elsewhere")

    def load_slowly(*args):
        (tmp_path / "elsewhere").rename(cache)
        return load_case(*args)

    monkeypatch.setattr(data, "load_case", load_slowly)
    volumes, left_out = load_cases(cases, ORGANS, 12.0, cache)
    [volume], [entry] = volumes.values(), cache.iterdir()
    assert left_out == []
    assert (volume.folder, entry.name) == (entry, other[cases[0].image].folder.name)
    np.testing.assert_array_equal(volume.labels, load_case(cases[0], ORGANS, 12.0).labels)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["image", "labels", "foreground_voxels", "target", "entry"])
@pytest.mark.parametrize("spoil", [Path.unlink, truncate, flip, lambda p: p.write_bytes(b"")])
def test_a_damaged_entry_of_the_cache_is_made_anew(name, spoil, tmp_path, capsys):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    plain = load_case(cases[0], ORGANS, 12.0)
    load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    [path] = (tmp_path / "cache").rglob(f"{name}.*")
    spoil(path)
    volumes, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    [volume] = volumes.values()
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(volume, array), getattr(plain, array))
    target, _ = read_target(volume, 12.0)
    np.testing.assert_array_equal(target, phantom(1, "mri", 0)[1])
    if name != "entry":
        assert f"{path.name}: is damaged; {cases[0].image} is read again" in capsys.readouterr().err


def test_a_cache_that_goes_with_its_scan_names_it(tmp_path):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    volumes, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    for path in [*(tmp_path / "cache").rglob("image.npy"), cases[0].image]:
        path.unlink()
    with pytest.raises(DataError, match="case_000_0000.nii.gz: missing"):
        next(patches(list(volumes.values()), 8, 1, 1, torch.Generator().manual_seed(0)))
