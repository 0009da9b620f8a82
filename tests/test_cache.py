"""Entries of the cache: found by content, whole or absent, and made by one process at a time."""

import contextlib
import gzip
import itertools
import os
import shutil
import signal
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    make_forms_disagree,
    save,
    set_voxel,
    truncate,
    write_nnunet,
    write_totalsegmentator,
)

from data import make_volume, normalize
from scans import cases as cases_module
from scans import machine
from scans.cache import MAKING, entry_name, size_and_crc, write_entry
from scans.cases import load_cases, read_usable
from scans.files import DataError, lock
from scans.layouts import ORGANS, find_cases
from scans.phantom import SPACING, make_phantom

CT = (-160.0, 240.0)


def entries(cache):
    """All that lies in a cache, except for its lock."""
    found = set(cache.iterdir()) - {cache / "lock"}
    assert (cache / "lock").read_text() == ""
    return sorted(found)


def name(case, organs=ORGANS, spacing=12.0, window=CT):
    return entry_name(case, organs, spacing, window)


def read_no_scan(patch):
    patch.setattr(cases_module, "read_usable", lambda *_: pytest.fail("is read again"))


@pytest.fixture
def mri(tmp_path):
    """The cases of a folder that holds one."""
    return find_cases(write_nnunet(tmp_path / "mri", "mri", 1))


@pytest.fixture
def ct(tmp_path):
    """The cases of a folder that holds two."""
    return find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 2))


# ------------------------------------------------------------------------------ what a name is of


@pytest.mark.parametrize("file", ["imagesTr/case_000_0000.nii.gz", "labelsTr/case_000.nii.gz"])
def test_a_touched_file_is_the_same_and_one_changed_byte_makes_another(file, mri, tmp_path):
    path = tmp_path / "mri" / file
    content = bytearray(gzip.decompress(path.read_bytes()))
    size, crc = path.stat().st_size, zlib.crc32(content) + (len(content) << 32)
    assert size_and_crc(path) == (size, crc)
    names = {name(mri[0])}
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    assert {name(mri[0])} == names
    content[-1] ^= 1
    for level in (9, 0):
        path.write_bytes(gzip.compress(bytes(content), level))
        names.add(name(mri[0]))
    for bit in (0, 1):  # of a file that is not compressed, in spite of its name
        content[-1] ^= bit
        path.write_bytes(content)
        assert size_and_crc(path) == (len(content), zlib.crc32(content))
        names.add(name(mri[0]))
    assert len(names) == 5


def members(content, cuts):
    """A .gz that holds a member for each part of the content."""
    return b"".join(gzip.compress(content[a:b]) for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("last", [0, 100, 4096])
def test_a_gz_of_several_members_is_known_by_all_of_them(last, mri):
    """As bgzip and cat write them; the trailer at the end describes only the last member."""
    [case] = mri
    content = bytearray(gzip.decompress(case.image.read_bytes()))
    cuts, names = [0, 50000, len(content) - last, len(content)], set()
    for bit in (0, 1, 2):
        content[40000] ^= bit
        case.image.write_bytes(members(bytes(content), cuts))
        assert read_usable(case, ORGANS)[0].voxels.shape == (32, 32, 32)
        names.add(name(case))
    assert len(names) == 3


def test_a_name_changes_with_every_setting(mri, ct):
    [case] = mri
    (path, values), *_ = case.masks["liver"]
    names = [
        name(case),
        name(case, spacing=11.0),
        name(case, ORGANS[:2]),
        name(case, ORGANS[::-1]),
        name(case._replace(modality="ct")),
        name(case._replace(values=(*case.values, 77))),  # warnings depend on it
        name(case._replace(masks=case.masks | {"liver": [(path, (6,))]})),
        name(case._replace(masks={"liver": [(path, values)]})),
        name(ct[0]),
        name(ct[0], window=(-500.0, 900.0)),
    ]
    assert len(set(names)) == len(names)
    assert name(case._replace(folder="x", id="x", split="test")) == names[0]
    assert name(case, window=(-500.0, 900.0)) == names[0]


def test_masks_that_change_places_make_another_entry(ct, tmp_path):
    """Each file is there as before, but the organs' are swapped."""
    before = name(ct[0])
    liver, spleen = (ct[0].masks[organ][0][0] for organ in ("liver", "spleen"))
    liver.rename(tmp_path / "kept")
    spleen.rename(liver)
    (tmp_path / "kept").rename(spleen)
    assert name(ct[0]) != before


def test_a_pipe_among_the_files_is_not_waited_for(mri, tmp_path):
    for path in (mri[0].image, tmp_path / "mri/labelsTr/case_000.nii.gz"):
        path.unlink()
        os.mkfifo(path)
    assert size_and_crc(mri[0].image) == (0, 0)
    with pytest.raises(DataError, match="case_000_0000.nii.gz: is not a file but a folder, a pipe"):
        load_cases(mri, ORGANS, 12.0, tmp_path / "cache")


# --------------------------------------------------------------------------- entries, through cases


def test_the_cache_holds_what_would_be_read_and_notices_changes(ct, tmp_path):
    cache = tmp_path / "cache"
    found, _ = load_cases(ct, ORGANS, SPACING, cache)
    for index, case in enumerate(ct):
        image, labels = make_phantom(1, "ct", index)
        prepared, volume = found[case.image], found[case.image].read_volume()
        expected = make_volume("", "", image, labels, prepared.labelled).foreground_voxels
        assert isinstance(volume.image, np.memmap)
        np.testing.assert_allclose(volume.image, normalize(image, "ct"), atol=1e-4)
        np.testing.assert_array_equal(volume.labels, labels)
        np.testing.assert_array_equal(volume.foreground_voxels, expected)
        np.testing.assert_array_equal(prepared.read_target()[0], read_usable(case, ORGANS)[1])
        assert prepared.contents == name(case, spacing=SPACING)
    assert len(entries(cache)) == 2

    def stamps():
        return {p: p.stat().st_mtime_ns for folder in entries(cache) for p in folder.rglob("*")}

    before = stamps()
    load_cases(ct, ORGANS, SPACING, cache)
    assert stamps() == before  # nothing written
    load_cases(ct, ORGANS[:2], SPACING, cache)
    assert len(entries(cache)) == 4
    save(tmp_path / "ct/s0001/segmentations/liver.nii.gz", np.zeros((32, 32, 32), np.uint8))
    again, _ = load_cases(ct, ORGANS, SPACING, cache)
    assert len(entries(cache)) == 5
    assert not (again[ct[1].image].read_volume().labels == 1).any()


def test_a_data_set_that_moves_keeps_its_cache_and_its_warnings(mri, tmp_path, monkeypatch):
    set_voxel(77)(tmp_path / "mri/labelsTr/case_000.nii.gz")
    make_forms_disagree(mri[0].image)
    [case] = load_cases(mri, ORGANS, 12.0, tmp_path / "cache")[0].values()
    assert [warning.split()[:4] for warning in case.warnings] == [
        ["its", "sform", "and", "qform"],
        ["its", "label", "map:", "has"],
    ]
    read_no_scan(monkeypatch)
    (tmp_path / "mri").rename(tmp_path / "moved")
    moved = find_cases(tmp_path / "moved")
    [again] = load_cases(moved, ORGANS, 12.0, tmp_path / "cache")[0].values()
    assert (again.warnings, again.contents) == (case.warnings, case.contents)
    assert (again.image_crc, again.counts.tolist()) == (case.image_crc, case.counts.tolist())
    assert len(entries(tmp_path / "cache")) == 1


def test_two_cases_of_one_content_share_an_entry(ct, tmp_path, monkeypatch):
    """Both find none, are read at the same time, and the second finds that of the first."""
    shutil.rmtree(tmp_path / "ct/s0001")
    shutil.copytree(tmp_path / "ct/s0000", tmp_path / "ct/s0001")
    together = threading.Barrier(2, timeout=10)

    def write_together(*args):
        together.wait()
        write_entry(*args)

    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(cases_module, "write_entry", write_together)
    found, left_out = load_cases(ct, ORGANS, SPACING, tmp_path / "cache")
    assert left_out == []
    assert len(entries(tmp_path / "cache")) == 1
    for case in ct:
        assert found[case.image].read_volume().id == case.id
        labels = found[case.image].read_volume().labels
        np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])


@pytest.mark.parametrize("step", ["save", "savez_compressed", "fsync", "rename"])
def test_a_kill_leaves_no_half_entry_and_its_leftovers_are_removed(step, mri, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".ssh").mkdir()  # somebody's
    scan, target = read_usable(mri[0], ORGANS)
    volume = make_volume("x", "mri", scan.voxels, target, np.ones(6, bool))
    pid = os.fork()
    if not pid:
        killed = {"fsync": os, "rename": Path}.get(step, np)
        setattr(killed, step, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        write_entry(cache / name(mri[0]), volume, scan, target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert {path.name[: len(MAKING)] for path in cache.iterdir()} == {".ssh", MAKING}
    load_cases(mri, ORGANS, 12.0, cache)
    assert {path.name for path in entries(cache)} == {".ssh", name(mri[0])}


def test_rights_of_entries_follow_the_umask(mri, tmp_path):
    before = os.umask(0o027)
    try:
        load_cases(mri, ORGANS, 12.0, tmp_path / "cache")
    finally:
        os.umask(before)
    [entry] = entries(tmp_path / "cache")
    assert entry.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o640}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files here")
def test_nothing_stays_mapped(mri, tmp_path):
    [case] = load_cases(mri, ORGANS, 6.0, tmp_path / "cache")[0].values()
    volume, maps = case.read_volume(), Path("/proc/self/maps")
    assert f"{case.contents}/image.npy" in maps.read_text()
    del volume
    case.read_target()
    assert str(tmp_path) not in maps.read_text()


FILES = ["image.npy", "labels.npy", "foreground_voxels.npy", "target.npz", "entry.json"]


@pytest.mark.parametrize("spoil", [Path.unlink, truncate, lambda path: path.write_bytes(b"{}")])
@pytest.mark.parametrize("file", FILES)
def test_an_entry_that_cannot_be_read_is_named_even_with_skip_bad(file, spoil, mri, tmp_path):
    """And made again once its folder is deleted. The case itself is not bad."""
    load_cases(mri, ORGANS, SPACING, tmp_path / "cache")
    [entry] = entries(tmp_path / "cache")
    spoil(entry / file)
    with pytest.raises(DataError, match=f"{entry}.*: cannot be read"):
        for case in load_cases(mri, ORGANS, SPACING, tmp_path / "cache", True)[0].values():
            case.read_volume()
            case.read_target()
    shutil.rmtree(entry)
    [case] = load_cases(mri, ORGANS, SPACING, tmp_path / "cache")[0].values()
    np.testing.assert_array_equal(case.read_target()[0], make_phantom(1, "mri", 0)[1])


# -------------------------------------------------------------------------------- several processes


def test_one_process_at_a_time_fills_a_cache(ct, tmp_path, monkeypatch, capfd):
    """The second one says that it waits, and then finds what the first one has made."""
    cache, found = tmp_path / "cache", []
    load_cases(ct, ORGANS, 12.0, tmp_path / "elsewhere")
    cache.mkdir()
    thread = threading.Thread(
        target=lambda: found.append(load_cases(ct, ORGANS, 12.0, cache)), daemon=True
    )
    read_no_scan(monkeypatch)
    with lock(cache / "lock") as held:
        assert held
        thread.start()
        thread.join(0.3)
        assert found == []
        waiting = f"{cache}: waiting for another process that preprocesses scans\n"
        assert capfd.readouterr() == ("", waiting)
        for made in entries(tmp_path / "elsewhere"):
            made.rename(cache / made.name)
    thread.join(20)
    [(prepared, left_out)] = found
    assert list(prepared) == [case.image for case in ct]
    assert left_out == []


def test_whose_entries_are_there_waits_for_nobody(ct, tmp_path, monkeypatch):
    """Another process may preprocess other data meanwhile; a cache may be only readable."""
    cache = tmp_path / "cache"
    load_cases(ct, ORGANS, 12.0, cache)
    read_no_scan(monkeypatch)
    monkeypatch.setattr(cases_module, "only_writer", lambda _: pytest.fail("waits"))
    with lock(cache / "lock") as held:
        assert held
        assert len(load_cases(ct, ORGANS, 12.0, cache)[0]) == 2


@contextlib.contextmanager
def somebody_else():
    """Another user, where this one is root, whom no right is denied."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


@pytest.fixture
def shared():
    """A folder that another user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_colleague_uses_a_complete_cache_that_may_be_read_only(shared):
    cases, cache = find_cases(write_nnunet(shared / "mri", "mri", 3)), shared / "cache"
    truncate(cases[2].image)
    found, _ = load_cases(cases, ORGANS, 12.0, cache, skip_bad=True)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    with somebody_else():
        again, left_out = load_cases(cases, ORGANS, 12.0, cache, skip_bad=True)
        [case, _] = again.values()
        assert case.read_volume().image.shape == found[cases[0].image].read_volume().image.shape
        assert left_out[0].startswith(f"{cases[2].image}: cannot be read")
        with pytest.raises(PermissionError, match=f"denied: '{cache}"):
            load_cases(cases[:1], ORGANS, 11.0, cache)


def test_what_may_not_be_read_is_said_to_be_that(shared):
    cases, cache = find_cases(write_nnunet(shared / "mri", "mri", 1)), shared / "cache"
    load_cases(cases, ORGANS, 12.0, cache)
    [entry] = entries(cache)
    for path in (entry, cases[0].image):
        path.chmod(0)
        with somebody_else(), pytest.raises(DataError, match=f"{path}.*Permission denied") as error:
            load_cases(cases, ORGANS, 12.0, cache)
        assert "damaged" not in str(error.value)
        path.chmod(0o755)
