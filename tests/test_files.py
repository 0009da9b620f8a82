"""Files are whole or absent, a lock is one process's at a time, and damage is refused by name."""

import errno
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scans import files
from scans.files import (
    TEMPORARY,
    DataError,
    blaming,
    check_writable,
    checksum,
    holder,
    lock,
    read_json,
    read_pt,
    read_rows,
    sha256,
    temporary_folder,
    to_bytes,
    write,
    write_pt,
    write_rows,
    writing,
)

ROOT = Path(__file__).parent.parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def python(code, *args, **more):
    """A process that runs this code in the project's folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **more}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, **pipes)


# ------------------------------------------------------------------------------------------ writing


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "scores.csv"
    write(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["scores.csv"]
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["scores.csv"]


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_whatever_ends_a_write_the_file_is_whole_or_absent(error, old, tmp_path):
    path = tmp_path / "model.pt"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(type(error)), writing(path) as file:
        file.write(b"half")
        file.flush()
        assert path.exists() == (old is not None)
        raise error
    assert names(tmp_path) == ([] if old is None else ["model.pt"])
    assert old is None or path.read_bytes() == old


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    fsync = os.fsync

    def look(descriptor):
        seen.append((path.exists(), os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", look)
    write(path, b"12345")
    assert seen == [(False, 5)]


WRITE = """
import sys
from pathlib import Path
from scans.files import writing
with writing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_writer_that_is_killed_leaves_no_half_file(old, tmp_path):
    """And the next holder of the folder's lock removes what it has left."""
    path = tmp_path / "model.pt"
    if old is not None:
        path.write_bytes(old)
    with python(WRITE, path) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    [left] = set(tmp_path.iterdir()) - {path}
    assert left.name == TEMPORARY
    assert [half.read_bytes() for half in left.glob("*/*")] == [b"half"]
    assert path.exists() == (old is not None)
    with lock(tmp_path / "lock") as held:
        assert held
        assert names(tmp_path) == ["lock"] + ([] if old is None else ["model.pt"])
    assert old is None or path.read_bytes() == old


def test_nobody_elses_file_is_touched(tmp_path):
    """Neither a link that has a name like a temporary file's, nor where it leads to."""
    victim = tmp_path / "elsewhere/precious"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    links = [out / name for name in ("tmp-scores.csv", "scores.csv.tmp", "file", ".scores.csv")]
    for link in links:
        link.symlink_to(victim)
    mine = out / "tmp-anything"
    mine.write_bytes(b"mine")
    write(out / "scores.csv", b"new")
    with lock(out / "lock"):
        write_rows(out / "scores.csv", [{"a": 1}])
    assert victim.read_bytes() == b"precious"
    assert all(link.is_symlink() for link in links)
    assert mine.read_bytes() == b"mine"
    assert names(out) == sorted(["lock", "scores.csv", "tmp-anything", *(p.name for p in links)])


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "scores.csv").symlink_to(tmp_path / "precious")
    write(tmp_path / "scores.csv", b"new")
    assert not (tmp_path / "scores.csv").is_symlink()
    assert (tmp_path / "scores.csv").read_bytes() == b"new"
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_file_may_wait_in_the_folder_of_its_writers_lock(tmp_path):
    (tmp_path / "hospitals").mkdir()
    with writing(tmp_path / "hospitals/mri.json", root=tmp_path) as file:
        file.write(b"{}")
        assert names(tmp_path / "hospitals") == []
        assert [name.startswith(TEMPORARY) for name in names(tmp_path)] == [True, False]
    assert names(tmp_path) == ["hospitals"]
    assert names(tmp_path / "hospitals") == ["mri.json"]


@pytest.mark.parametrize("error", [None, OSError("No space left"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_temporary_folder(error, tmp_path):
    try:
        with temporary_folder(tmp_path / "deep") as folder:
            assert folder.parent == tmp_path / "deep" / TEMPORARY
            (folder / "a").write_text("half")
            if error:
                raise error
    except (OSError, KeyboardInterrupt) as caught:
        assert caught is error
    assert names(tmp_path / "deep") == []


def test_a_temporary_folder_may_be_given_another_name(tmp_path):
    with temporary_folder(tmp_path) as folder:
        (folder / "a").write_text("whole")
        folder.rename(tmp_path / "entry")
    assert names(tmp_path) == ["entry"]
    assert (tmp_path / "entry/a").read_text() == "whole"


def test_a_file_in_the_place_of_the_programs_own_folder_is_named(tmp_path):
    (tmp_path / TEMPORARY).write_bytes(b"mine")
    message = f"^{tmp_path / TEMPORARY}: is no folder of this program; move it away$"
    with pytest.raises(DataError, match=message):
        write(tmp_path / "a", b"new")
    assert (tmp_path / TEMPORARY).read_bytes() == b"mine"
    assert names(tmp_path) == [TEMPORARY]


def test_threads_write_side_by_side(tmp_path):

    def work(n):
        for i in range(40):
            write(tmp_path / f"{n}-{i}", f"{n} {i}".encode())

    errors = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    hook, threading.excepthook = threading.excepthook, errors.append
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.excepthook = hook
    assert errors == []
    expected = {f"{n}-{i}": f"{n} {i}" for n in range(4) for i in range(40)}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "a/b"):
        with pytest.raises(DataError, match=f"{tmp_path}: cannot be written; choose another --out"):
            check_writable(folder)


def test_the_folder_that_is_there_is_asked_for_its_permissions(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files.os, "access", lambda path, mode: asked.append((path, mode)))
    for folder in (tmp_path, tmp_path / "a/b"):
        with pytest.raises(
            DataError, match=f"^{tmp_path}: cannot be written; choose another --out"
        ):
            check_writable(folder)
    assert asked == [(tmp_path, os.W_OK)] * 2
    monkeypatch.undo()
    check_writable(tmp_path / "a/b")
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------- locks


HOLD = """
import sys
from pathlib import Path
from scans.files import lock
with lock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_lock_is_one_processs_until_it_is_gone(end, tmp_path):
    path = tmp_path / "lock"
    with python(HOLD, path) as other:
        assert other.stdout.readline() == "True\n"
        for _ in range(2):
            with lock(path) as held:
                assert held is False
            assert holder(path) == f"{socket.gethostname()}, process {other.pid}"
        if end == "close":
            other.stdin.close()
        else:
            other.kill()
        other.wait(20)
    assert holder(path) == ""
    for _ in range(2):
        with lock(path) as held:
            assert held is True
            assert holder(path) == f"{socket.gethostname()}, process {os.getpid()}"
        assert holder(path) == ""
        assert path.read_text() == ""


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path / "lock"):
        raise KeyError
    with lock(tmp_path / "lock") as held:
        assert held
        with lock(tmp_path / "lock") as again:  # not even the same process has it twice
            assert not again
        assert holder(tmp_path / "lock")


def test_who_wants_a_lock_may_wait(tmp_path):
    path, order = tmp_path / "lock", []
    with python(HOLD, path) as other:
        assert other.stdout.readline() == "True\n"

        def wait():
            with lock(path, wait=True) as held:
                order.append(held)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        assert order == []
        other.send_signal(signal.SIGKILL)
        thread.join(20)
    assert order == [True]


def test_nobody_holds_a_lock_that_is_not_there(tmp_path):
    assert holder(tmp_path / "lock") == ""
    assert names(tmp_path) == []
    (tmp_path / "lock").write_text("host, process 1")  # of a process that was killed
    assert holder(tmp_path / "lock") == ""


def test_to_look_at_a_free_lock_does_not_take_it(tmp_path, monkeypatch):
    """Somebody who wants it in this moment would go without it."""
    with lock(tmp_path / "lock"):
        pass
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: pytest.fail("is taken"))
    assert holder(tmp_path / "lock") == ""


def test_what_an_earlier_holder_left_is_removed_and_what_others_write_is_not(tmp_path):
    for name in ("abc", "def"):
        (tmp_path / TEMPORARY / name).mkdir(parents=True)
        (tmp_path / TEMPORARY / name / "file").write_bytes(b"half")
    for mine in ("tmp-mine", f"{TEMPORARY}-mine"):
        (tmp_path / mine).mkdir()
        (tmp_path / mine / "file").write_bytes(b"mine")
    (tmp_path / TEMPORARY / "link").symlink_to(tmp_path / "tmp-mine")
    with lock(tmp_path / "lock") as held:
        assert held
        assert names(tmp_path) == [f"{TEMPORARY}-mine", "lock", "tmp-mine"]
        assert names(tmp_path / "tmp-mine") == names(tmp_path / f"{TEMPORARY}-mine") == ["file"]
        with temporary_folder(tmp_path) as folder:
            (folder / "file").write_bytes(b"of the holder")
            with lock(tmp_path / "lock") as again:
                assert not again
            assert (folder / "file").exists()  # only who has the lock may clear up


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of_and_used(code, wait, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with lock(tmp_path / "lock", wait) as held:
        assert held is True
        assert holder(tmp_path / "lock") == ""
    said = f"{tmp_path}: no locks here, so no other process may share this folder\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EAGAIN])
def test_what_would_block_is_held_by_another(code, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with lock(tmp_path / "lock") as held:
        assert held is False
    assert capsys.readouterr() == ("", "")


def test_without_a_lock_of_the_system_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    with lock(tmp_path / "lock") as first, lock(tmp_path / "lock") as second:
        assert first is second is True
        assert holder(tmp_path / "lock") == ""
    assert capsys.readouterr().err.count("no locks here") == 1  # said once a folder


# ----------------------------------------------------------------------------------------- contents


def test_checksums_are_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # The first 16 digits of SHA-256's own example (FIPS 180-2, B.1).
    assert checksum(tmp_path / "a") == sha256(b"abc") == "ba7816bf8f01cfea"


@pytest.mark.parametrize("content", [b"junk", b"", b"\xff\xfe", b"[]", b"3", b"null", b'{"a": '])
def test_what_is_no_json_object_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert len(str(caught.value).splitlines()) == 1


def test_a_json_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'a.json'}: cannot be read .*No such file"):
        read_json(tmp_path / "a.json")
    write(tmp_path / "a.json", files.to_json({"ä": [1, None, "x"]}))
    assert read_json(tmp_path / "a.json") == {"ä": [1, None, "x"]}


CONTENT = {
    "weights": {"a.b": torch.linspace(-1, 1, 300).reshape(20, 15), "n": torch.tensor(7)},
    "best": {"val_dice": 0.25, "round": 1, "weights": None},
    "history": [{"round": 1, "losses": {"mri": 0.1 + 0.2}, "val_dice": {}}],
    "run": "ba7816bf8f01cfea",
}


def same(a, b):
    tensors = [(a["weights"][key], b["weights"][key]) for key in a["weights"]]
    return (
        a.keys() == b.keys()
        and a["weights"].keys() == b["weights"].keys()
        and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)
        and {**a, "weights": 0} == {**b, "weights": 0}
    )


def test_tensors_come_back(tmp_path):
    write_pt(tmp_path / "a.pt", CONTENT)
    assert same(read_pt(tmp_path / "a.pt"), CONTENT)
    assert names(tmp_path) == ["a.pt"]


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
            assert same(found, CONTENT), (place, bit)
    path.write_bytes(whole)
    return refused


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """At some hundred places all over the file; wherever there is a number, it is refused."""
    path = tmp_path / "a.pt"
    write_pt(path, CONTENT)
    whole = path.read_bytes()
    spread = [(place, place % 8) for place in range(0, len(whole), 9)]
    assert len(spread) > 300
    assert len(refused_flips(path, spread)) > len(spread) / 2
    weights = whole.index(CONTENT["weights"]["a.b"].numpy().tobytes())
    numbers = {(weights + n, n % 8) for n in range(0, 1200, 61)}
    assert refused_flips(path, numbers) == numbers


@pytest.mark.slow
def test_every_flipped_bit_of_the_directory_is_refused_or_changes_nothing(tmp_path):
    """Where a single bit calls numbers a folder, which PyTorch reads as whatever is in memory."""
    path = tmp_path / "a.pt"
    write_pt(path, CONTENT)
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        first = archive.start_dir
        attributes = {
            (first + i + 38, 4)
            for i in range(size - first)
            if path.read_bytes()[first + i :].startswith(b"PK\1\2")
        }
        assert len(attributes) == len(archive.infolist())
    every = [(place, bit) for place in range(first, size) for bit in range(8)]
    assert attributes <= refused_flips(path, every)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    write_pt(path, CONTENT)
    whole = path.read_bytes()
    for keep in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            read_pt(path)


def test_what_is_no_file_of_tensors_is_refused_and_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "folder.pt").mkdir()
    for name in ("evil.pt", "list.pt", "old.pt", "text.pt", "folder.pt", "missing.pt"):
        with pytest.raises(DataError) as caught:
            read_pt(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot be read (")
        assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------- rows


def bits(value):
    return struct.pack("<d", value)


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_floats_come_back_bit_by_bit(values):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.csv"
        write_rows(path, [{"value": value, "n": n} for n, value in enumerate(values)])
        rows = read_rows(path)
    assert [bits(float(row["value"])) for row in rows] == list(map(bits, values))
    assert [int(row["n"]) for row in rows] == list(range(len(values)))


def test_rows_have_all_columns_and_what_is_not_known_is_empty(tmp_path):
    rows = [{"a": 1, "b": math.nan}, {"a": None, "c": "x"}, {"c": 0.0, "b": -0.0}]
    write_rows(tmp_path / "a.csv", rows)
    assert (tmp_path / "a.csv").read_bytes() == b"a,b,c\r\n1,,\r\n,,x\r\n,-0.0,0.0\r\n"
    assert read_rows(tmp_path / "a.csv")[1] == {"a": "", "b": "", "c": "x"}
    write_rows(tmp_path / "b.csv", [], ("x", "y"))
    assert (tmp_path / "b.csv").read_bytes() == b"x,y\r\n"
    assert read_rows(tmp_path / "b.csv") == []
    with pytest.raises(ValueError, match="not in fieldnames"):  # nothing is dropped unasked
        write_rows(tmp_path / "b.csv", rows, ("a", "b"))


def test_names_that_are_no_utf_8_or_hold_commas_and_lines_come_back(tmp_path):
    odd = [os.fsdecode(b"s\xff\xfe"), 'a, "b"', "two\nlines", "two\r\nlines", "käse", " ", "'"]
    write_rows(tmp_path / "a.csv", [{"case": name, "n": 1} for name in odd])
    assert b"s\xff\xfe,1\r\n" in (tmp_path / "a.csv").read_bytes()
    assert [row["case"] for row in read_rows(tmp_path / "a.csv")] == odd
    assert to_bytes(odd[0]) == b"s\xff\xfe"


def test_rows_that_are_cut_off_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    write_rows(path, [{"case": "s1", "dice": 0.25}, {"case": "s2", "dice": 0.125}])
    whole = path.read_bytes()
    for keep in [keep for keep in range(len(whole)) if not whole[:keep].endswith(b"\n")]:
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=f"{path}: is cut off"):
            read_rows(path)


# ------------------------------------------------------------------------------------------- blame


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (KeyError("round"), "KeyError: 'round'"),
        (TypeError("no int"), "TypeError: no int"),
        (AttributeError("keys"), "AttributeError: keys"),
        (RuntimeError("sizes"), "RuntimeError: sizes"),
        (ValueError("no"), "ValueError: no"),
        (DataError("it is of another run"), "it is of another run"),
    ],
)
def test_a_file_of_another_form_is_to_blame(error, what, tmp_path):
    message = f"{tmp_path}: is not as this program left it ({what}); choose another --out"
    with (
        pytest.raises(DataError, match=f"^{re.escape(message)}$") as caught,
        blaming(tmp_path, "choose another --out"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), AssertionError()])
def test_it_is_not_to_blame_for_anything(error, tmp_path):
    with pytest.raises(type(error)) as caught, blaming(tmp_path, ""):
        raise error
    assert caught.value is error


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"lr": 0.1 + 0.2, "seeds": [2**63 - 1], "name": os.fsdecode(b"\xff")}
    write(tmp_path / "a.json", files.to_json(content))
    assert read_json(tmp_path / "a.json") == content
    assert json.loads((tmp_path / "a.json").read_bytes()) == content
