"""Files are whole or absent, a folder is claimed once, a lock is one process's, damage is named."""

import csv
import errno
import io
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scans import files
from scans.files import (
    DataError,
    claim,
    listed,
    lock,
    names_in,
    read_json,
    read_pt,
    reading,
    sha256,
    to_csv,
    to_json,
    to_pt,
    write,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------ writing


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("where", [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"", b"old"])
def test_a_write_that_fails_leaves_the_old_file_and_names_it(
    old, error, where, tmp_path, monkeypatch
):
    def fail(*_):
        raise error

    path = tmp_path / "scores.csv"
    if old:
        write(path, old)
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(*where, fail)
        write(path, b"new")
    assert error is not FULL or str(caught.value) == f"[Errno 28] {FULL.strerror}: '{path}'"
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([old] if old else [])
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["scores.csv"]


def test_content_is_on_the_disk_before_the_name_and_the_name_in_the_end(tmp_path, monkeypatch):
    path, seen, fsync = tmp_path / "deep/a", [], os.fsync

    def look(descriptor):
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        seen.append((place, place.is_file() and place.read_bytes(), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write(path, b"12345")
    assert seen == [(path.with_name(".a.tmp"), b"12345", False), (path.parent, False, True)]


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_kill_has_left_is_used_again(tmp_path):
    (tmp_path / ".model.pt.tmp").write_bytes(b"half of a long file")
    write(tmp_path / "model.pt", b"new")
    assert names(tmp_path) == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"new"


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "scores.csv").symlink_to(tmp_path / "precious")
    write(tmp_path / "scores.csv", b"new")
    assert not (tmp_path / "scores.csv").is_symlink()
    assert (tmp_path / "scores.csv").read_bytes() == b"new"
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_rights_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "run/a", b"")
        with lock(tmp_path / "run/training/lock"):
            pass
    finally:
        os.umask(before)
    rights = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    folders = dict.fromkeys(("run", "run/training"), 0o777 & ~umask)
    assert rights == folders | dict.fromkeys(("run/a", "run/training/lock"), 0o666 & ~umask)


# ------------------------------------------------------------------------------------------- claims


def test_a_claim_is_written_once_and_then_compared(tmp_path):
    path = tmp_path / "run/config.json"
    claim(path, {"lr": 0.1 + 0.2, "organs": ("liver", "spleen"), "ct": ()})
    assert read_json(path) == {"lr": 0.1 + 0.2, "organs": ["liver", "spleen"], "ct": []}
    before = path.stat()
    claim(path, {"ct": (), "organs": ("liver", "spleen"), "lr": 0.1 + 0.2})
    assert path.stat() == before


MANY = "; ".join(f"{key} 0, now 1" for key in "abcde") + " and 2 more"


@pytest.mark.parametrize(
    ("kept", "now", "message"),
    [
        ({"lr": 4e-3, "a": 1}, {"lr": 1e-3, "a": 1}, "lr 0.004, now 0.001"),
        ({"ct": [], "mri": ["x", "y"]}, {"ct": ["x"]}, "ct none, now x; mri x y, now None"),
        ({"a": 1}, {"a": 1, "b": 2}, "b None, now 2"),
        (dict.fromkeys("abcdefg", 0), dict.fromkeys("abcdefg", 1), MANY),
    ],
)
def test_what_differs_from_a_claim_is_named_with_both_values(kept, now, message, tmp_path):
    path = tmp_path / "config.json"
    claim(path, kept)
    with pytest.raises(DataError) as caught:
        claim(path, now)
    end = "Give the same, or another --out"
    assert str(caught.value) == f"{path}: was made with {message}. {end}"
    assert read_json(path) == kept


# -------------------------------------------------------------------------------------------- locks


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_lock_is_one_processs_until_it_is_gone(end, tmp_path):
    path, order = tmp_path / "deep/lock", []

    def wait():
        with lock(path, wait=True) as held:
            order.append(held)

    path.parent.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, path], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            with lock(path) as held:
                assert held is False
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        assert order == []
        if end == "close":
            other.stdin.close()
        else:
            other.kill()
        thread.join(20)
    assert order == [True]
    with lock(path) as held:
        assert held is True
        done = subprocess.run([sys.executable, "-c", HOLD, path], capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path / "lock"):
        raise KeyError
    with lock(tmp_path / "lock") as held:
        assert held
        with lock(tmp_path / "lock") as again:  # not even the same process has it twice
            assert not again


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, None])
def test_a_file_system_without_locks_is_told_of_and_used(code, wait, tmp_path, monkeypatch, capsys):
    """None: as on Windows, where Python has no flock."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*((files.fcntl, "flock", refuse) if code else (files, "fcntl", None)))
    with lock(tmp_path / "lock", wait) as first, lock(tmp_path / "lock", wait) as second:
        assert first is second is True
    said = f"{tmp_path}: locks do not work here; let no other process use it\n"
    assert capsys.readouterr() == ("", said)  # once per folder


# ----------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("round"), "'round'"),
        (TypeError("no int\nand more"), "no int"),
        (RuntimeError("sizes"), "sizes"),
        (PermissionError(13, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
        (EOFError(), "EOFError()"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(error, message, tmp_path):
    with pytest.raises(DataError) as caught, reading(tmp_path / "a"):
        raise error
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot be read ({message})"
    assert caught.value.__cause__ is error


FULL_GPU = RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("error", [DataError("x"), MemoryError(), KeyboardInterrupt(), FULL_GPU])
def test_a_file_is_not_to_blame_for_anything(error, tmp_path):
    with pytest.raises(type(error)) as caught, reading(tmp_path):
        raise error
    assert caught.value is error


def test_names_are_sorted_in_one_form_and_without_hidden_ones(tmp_path):
    for name in ("b", "a", ".hidden", "__MACOSX", "ka\u0308se"):
        (tmp_path / name).touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    found = names_in(tmp_path)
    assert list(found) == ["a", "b", "k\u00e4se", "nowhere"]
    assert found["k\u00e4se"] == tmp_path / "ka\u0308se"
    assert names_in(tmp_path / "gone") == names_in(tmp_path / "a") == {}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=f"^{tmp_path}: cannot be read .*Permission denied"):
        names_in(tmp_path)


def test_names_that_look_alike_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.nii.gz")).touch()
    with pytest.raises(DataError, match="two names that look alike in Unicode; rename one"):
        names_in(tmp_path)


def test_only_some_names_are_listed():
    assert listed([]) == ""
    assert listed(range(5)) == "0, 1, 2, 3, 4"
    assert listed(range(7)) == "0, 1, 2, 3, 4 and 2 more"


# ----------------------------------------------------------------------------------------- contents


def test_checksums_are_of_the_content():
    # The first 16 digits of SHA-256's own example (FIPS 180-2, B.1).
    assert sha256(b"abc") == "ba7816bf8f01cfea"


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"lr": 0.1 + 0.2, "seeds": [2**63 - 1], "name": os.fsdecode(b"\xff"), "ä": None}
    for mark in (b"", b"\xef\xbb\xbf"):  # some editors put a mark before UTF-8
        (tmp_path / "a.json").write_bytes(mark + to_json(content))
        assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize(
    "content", [b"junk", b"", b"\xff\xfe", b"[]", b"3", b"null", b'{"a": ', None, "a folder"]
)
def test_what_is_no_json_object_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert len(str(caught.value).splitlines()) == 1


CONTENT = {
    "weights": {"a.b": torch.linspace(-1, 1, 300).reshape(20, 15), "n": torch.tensor(7)},
    "best_dice": 0.25,
    "history": [{"round": 1, "losses": {"mri": 0.1 + 0.2}, "val_dice": {}}],
    "best_weights": None,
}


def plain(content):
    """A content with its tensors as lists, to be compared."""
    tensors = {key: (w.dtype, w.tolist()) for key, w in content["weights"].items()}
    return {**content, "weights": tensors}


def refused_flips(path, flips):
    """Those of the flipped bits, (byte, bit), that are refused; the others must change nothing."""
    whole, refused = path.read_bytes(), set()
    for place, bit in flips:
        blob = bytearray(whole)
        blob[place] ^= 1 << bit
        path.write_bytes(blob)
        try:
            found = read_pt(path)
        except DataError as error:
            assert str(error).startswith(f"{path}: cannot be read (")
            assert len(str(error).splitlines()) == 1
            refused.add((place, bit))
        else:
            assert plain(found) == plain(CONTENT), (place, bit)
    path.write_bytes(whole)
    return refused


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """At some hundred places all over the file; wherever there is a number, it is refused."""
    path, whole = tmp_path / "a.pt", to_pt(CONTENT)
    path.write_bytes(whole)
    assert plain(read_pt(path)) == plain(CONTENT)
    spread = [(place, place % 8) for place in range(0, len(whole), 9)]
    assert len(spread) > 300
    assert len(refused_flips(path, spread)) > len(spread) / 2
    weights = whole.index(CONTENT["weights"]["a.b"].numpy().tobytes())
    numbers = {(weights + n, n % 8) for n in range(0, 1200, 61)}
    assert refused_flips(path, numbers) == numbers


@pytest.mark.slow
def test_every_flipped_bit_of_the_directory_is_refused_or_changes_nothing(tmp_path):
    """From the numbers' entries on; one bit calls them folders, which PyTorch does not read."""
    path, whole = tmp_path / "a.pt", to_pt(CONTENT)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        listed_ = [info.filename for info in archive.infolist()]
    first = next(i for i, name in enumerate(listed_) if name.endswith("data/0"))
    starts = [entry.start() for entry in re.finditer(rb"PK\x01\x02", whole)]
    assert len(starts) == len(listed_)
    every = [(place, bit) for place in range(starts[first], len(whole)) for bit in range(8)]
    refused = refused_flips(path, every)
    assert {(start + 38, 4) for start in starts[first:]} <= refused


def test_what_is_no_file_of_tensors_is_refused_and_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    whole = to_pt(CONTENT)
    for keep in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"{keep}.pt").write_bytes(whole[:keep])
    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "folder.pt").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.pt"]:
        with pytest.raises(DataError) as caught:
            read_pt(path)
        assert str(caught.value).startswith(f"{path}: cannot be read (")
        assert len(str(caught.value).splitlines()) == 1
        advice = "holds more than tensors and plain values"  # PyTorch's is to open it all the same
        assert (path.name == "evil.pt") == (advice in str(caught.value))
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------- rows


def rows_of(content):
    text = content.decode("utf-8", "surrogateescape")
    return list(csv.DictReader(io.StringIO(text, newline="")))


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_floats_come_back_bit_by_bit(values):
    rows = rows_of(to_csv({"value": value, "n": n} for n, value in enumerate(values)))
    found = [struct.pack("<d", float(row["value"])) for row in rows]
    assert found == [struct.pack("<d", value) for value in values]
    assert [int(row["n"]) for row in rows] == list(range(len(values)))


def test_rows_have_all_columns_and_what_is_not_known_is_empty():
    rows = [{"a": 1, "b": math.nan}, {"a": None, "c": "x"}, {"c": 0.0, "b": -0.0}]
    assert to_csv(rows) == b"a,b,c\r\n1,,\r\n,,x\r\n,-0.0,0.0\r\n"
    assert to_csv(rows, ("c", "d")) == b"c,d\r\n,\r\nx,\r\n0.0,\r\n"
    assert to_csv([], ("x", "y")) == b"x,y\r\n"


def test_names_that_are_no_utf_8_or_hold_commas_and_lines_come_back():
    odd = [os.fsdecode(b"s\xff\xfe"), 'a, "b"', "two\nlines", "two\r\nlines", "käse", " ", "'"]
    content = to_csv({"case": name, "n": 1} for name in odd)
    assert b"s\xff\xfe,1\r\n" in content
    assert [row["case"] for row in rows_of(content)] == odd
