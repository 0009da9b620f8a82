"""The download against a web server on this machine that can fail in every way we know of."""

import gzip
import http.client
import http.server
import io
import itertools
import os
import random
import re
import shlex
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import TOTALSEGMENTATOR_MASKS

from scans import files as files_of
from scans.files import DataError
from scans.layouts import find_cases
from scripts import download

ORGANS = ("gallbladder", "kidney_left", "kidney_right", "liver", "pancreas", "spleen")
ROOT = Path(__file__).parent.parent
CT = "Totalsegmentator_dataset_v201.zip"
MRI = "TotalsegmentatorMRI_dataset_v200.zip"
META = "image_id;age;split\n" + "".join(f"s{i:04d};50;train\n" for i in range(50))


# ----------------------------------------------------------------------------------------- archives


def nifti(name, array):
    """A NIfTI file, its name in the header of its gzip stream: empty masks differ in length."""
    buffer = io.BytesIO()
    with gzip.GzipFile(name, "wb", 1, buffer, mtime=0) as file:
        file.write(nibabel.Nifti1Image(array, np.eye(4)).to_bytes())
    return buffer.getvalue()


def case(id_, scan="ct", organs=ORGANS, size=24, others=4):
    """The files of a case by name: its scan noise, an organ some voxels, other masks empty."""
    draw = np.random.default_rng(int(id_[1:]))
    shape = (size, size, size)
    arrays = {f"{id_}/{scan}.nii.gz": draw.integers(-999, 999, shape, np.int16)}
    for name in (*ORGANS, *(f"rib_{n}" for n in range(others))):
        mask = draw.random(shape) < 0.3 if name in organs else np.zeros(shape)
        arrays[f"{id_}/segmentations/{name}.nii.gz"] = mask.astype(np.uint8)
    return {name: nifti(name, array) for name, array in arrays.items()}


def cases(ids=range(5), **more):
    files = {"meta.csv": META.encode("utf-8-sig")}
    for i in ids:
        files |= case(f"s{i:04d}", **more)
    return files


def wanted(files, ids):
    """Those of some cases that are to be fetched."""
    pattern = rf"({'|'.join(ids)})/((ct|mri)|segmentations/({'|'.join(ORGANS)}))\.nii\.gz"
    return {"meta.csv": files["meta.csv"]} | {
        name: content for name, content in files.items() if re.fullmatch(pattern, name)
    }


def zipped(files, prefix="", method=zipfile.ZIP_DEFLATED, zip64=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(prefix + name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as file:
                file.write(content)
    return buffer.getvalue()


def tree(folder):
    """All files but the lock's, by their paths in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != "lock"
    }


# ------------------------------------------------------------------------------------------- server


class Server(socketserver.ThreadingTCPServer):
    """Sends parts of `files` and logs them as (first, last); `faults` befall the next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.log, self.sent, self.agents = {}, [], 0, set()
        self.faults = iter(())
        self.headers = {"ETag": '"1"', "Retry-After": "59"}  # Zenodo says so with every answer
        self.limit = 2**40  # bytes that it sends at most in one answer
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is meant

    def put(self, name, content):
        self.files[f"/{name}"] = content


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, fault = self.server, next(self.server.faults, {})
        server.agents.add(self.headers["User-Agent"])
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        body = server.files.get(self.path)
        if body is None or first >= len(body):
            fault = {"status": 404 if body is None else 416, **fault}
        code = fault.get("status", 206)
        part = b"" if code >= 300 else body[first : min(last + 1, first + server.limit)]
        last = first + len(part) - 1
        headers = {"Content-Length": len(part), **server.headers, **fault.get("headers", {})}
        if code < 300:
            headers = {"Content-Range": f"bytes {first}-{last}/{len(body)}", **headers}
            server.log.append((first, last))
        if "garbage" in fault:
            return self.wfile.write(fault["garbage"])
        self.send_response(code)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        part = part[: fault.get("drop")]
        self.wfile.write(part)
        server.sent += len(part)
        if fault.get("stall"):
            server.stalled.set()
            server.go_on.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the download waited, without the waiting."""
    waited = []
    monkeypatch.setattr(download.time, "sleep", waited.append)
    return waited


@pytest.fixture
def run(server, tmp_path):
    def run(*args, out=tmp_path / "data"):
        return download.main([*args, "--out", str(out), "--mirror", f"{server.url}/"])

    return run


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 512)


def spans(content):
    """Where the data of each member lie in a zip: (first, last) by name."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            lengths = content[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))  # name, extra
            found[info.filename] = start, start + info.compress_size - 1
    return found


def asked(server, span):
    """How many bytes of a span were asked for, each as often as it was."""
    return sum(max(0, min(last, span[1]) - max(first, span[0]) + 1) for first, last in server.log)


# -------------------------------------------------------------------------------- what is fetched


@pytest.mark.parametrize("prefix", ["", "Totalsegmentator_dataset_v201/", "a/b/"])
def test_it_fetches_some_cases_whole_and_nothing_else(run, server, tmp_path, capsys, prefix):
    files = cases(range(6))
    for i in range(6):  # what the user does not need: 24 MB
        files[f"s{i:04d}/segmentations/brain.nii.gz"] = random.Random(i).randbytes(4_000_000)
    server.put(CT, zipped(files, prefix, zipfile.ZIP_STORED))
    assert run("totalsegmentator-ct", "--cases", "2") == 0
    root = tmp_path / "data/totalsegmentator-ct"
    found = find_cases(root, "ct")
    assert tree(root) == wanted(files, [case.id for case in found])
    assert [case.split for case in found] == ["train"] * 2
    assert [sum(map(len, case.masks.values())) for case in found] == [6, 6]
    assert nibabel.load(found[0].image).shape == (24, 24, 24)
    assert server.sent < 0.25 * len(server.files[f"/{CT}"])
    shown = capsys.readouterr().out
    assert f"{server.sent:,} of {len(server.files[f'/{CT}']):,} bytes fetched" in shown
    assert "2 of 6 cases" in shown
    assert "CC BY 4.0" in shown
    assert "10.1148/ryai.230024" in shown


def test_two_data_sets_and_how_to_go_on(run, server, tmp_path, capsys):
    out = tmp_path / "my data"
    ct, mri = cases(range(3)), cases(range(2), scan="mri")
    server.put(CT, zipped(ct))
    server.put(MRI, zipped(mri))
    names = ("totalsegmentator-ct", "totalsegmentator-mri")
    assert run(*names, names[0], "--cases", "40", out=out) == 0
    assert tree(out / names[0]) == wanted(ct, ["s0000", "s0001", "s0002"])
    assert tree(out / names[1]) == wanted(mri, ["s0000", "s0001"])
    assert {case.modality for case in find_cases(out / names[1])} == {"mri"}
    check, fedgin = capsys.readouterr().out.splitlines()[-2:]
    folders = [str(out / name) for name in names]
    assert shlex.split(check) == ["python", "-m", "scripts.check", *folders]
    start = ["python", "fedgin.py", "--scenario", "complete"]
    assert shlex.split(fedgin) == [*start, "--ct", folders[0], "--mri", folders[1]]


def test_all_takes_every_complete_case(run, server, tmp_path):
    files = cases(range(50), size=4, others=0)
    del files["s0003/segmentations/liver.nii.gz"], files["s0004/ct.nii.gz"]
    server.put(CT, zipped(files))
    assert run("totalsegmentator-ct") == 0
    assert len(find_cases(tmp_path / "data/totalsegmentator-ct")) == 40
    assert run("totalsegmentator-ct", "--all") == 0
    ids = [f"s{i:04d}" for i in range(50) if i not in (3, 4)]
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ids)


def amos():
    draw = random.Random(0)
    files = {"dataset.json": b"{}", "readme.md": b"hello"}
    parts = {"Tr": [1, 4, 5, 507, 508], "Va": [8, 500, 510, 600], "Ts": [2, 3, 511]}
    for part, numbers in parts.items():
        for i in numbers:
            files[f"images{part}/amos_{i:04d}.nii.gz"] = draw.randbytes(3000)
            if part != "Ts":
                files[f"labels{part}/amos_{i:04d}.nii.gz"] = draw.randbytes(300)
    files["imagesTr/amos_0499.nii.gz"] = b"without labels"
    files["labelsTs/amos_0002.nii.gz"] = b"of a part that the program does not read"
    files["labelsTr/amos_0501.nii.gz"] = b"without a scan"
    files["__MACOSX/imagesTr/._amos_0001.nii.gz"] = b"of a Mac"
    return files


@pytest.mark.parametrize("prefix", ["", "amos22/"])
def test_amos22_without_its_unlabelled_cases(run, server, tmp_path, prefix, capsys):
    files, root = amos(), tmp_path / "data/amos22"
    server.put("amos22.zip", zipped(files, prefix))
    assert run("amos22", "--cases", "2") == 0  # of each modality
    found = find_cases(root)
    assert sorted(case.modality for case in found) == ["ct", "ct", "mri", "mri"]
    assert {case.modality for case in found if int(case.id[-4:]) > 500} == {"mri"}
    names = {f"{kind}{part}" for kind in ("images", "labels") for part in ("Tr", "Va")}
    expected = {"dataset.json": b"{}"}
    for case in found:
        there = [name for name in names if f"{name}/{case.id}.nii.gz" in files]
        expected |= {f"{n}/{case.id}.nii.gz": files[f"{n}/{case.id}.nii.gz"] for n in there}
    assert tree(root) == expected
    assert len(expected) == 9
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == ["--test", str(root)]
    assert run("amos22", "--all") == 0
    assert len(find_cases(root, "ct")) == 5
    assert len(find_cases(root, "mri")) == 4
    assert not {"imagesTs", "labelsTs", "__MACOSX"} & {path.name for path in root.iterdir()}


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_cases_with_most_organs_come_first(run, server, tmp_path, method):
    organs = {"s0001": 3, "s0002": 6, "s0003": 0, "s0004": 5, "s0005": 1, "s0006": 6, "s0007": 2}
    files = {"meta.csv": META.encode("utf-8-sig")}
    for n, (id_, number) in enumerate(organs.items()):
        files |= case(id_, organs=ORGANS[:number], size=16 + 4 * n)
    server.put(CT, zipped(files, method=method))
    root, taken = tmp_path / "data/totalsegmentator-ct", []
    for number in range(1, 8):
        assert run("totalsegmentator-ct", "--cases", str(number)) == 0
        [new] = {case.id for case in find_cases(root)} - set(taken)
        taken.append(new)
    assert sorted(taken[:2]) == ["s0002", "s0006"]
    assert taken[2:] == ["s0004", "s0001", "s0007", "s0005", "s0003"]


def test_the_order_is_everybodys(run, server, tmp_path):
    """Whatever the order in the zip; by now it cannot change without other people's cases."""
    content = cases(range(12), size=8)
    copies = {f"old/{name}": b"a copy in another folder" for name in content}
    files = list((content | copies).items())
    for seed in range(3):
        random.Random(seed).shuffle(files)
        server.put(CT, zipped(dict(files), prefix="x/" * seed))
        root = tmp_path / str(seed) / "totalsegmentator-ct"
        assert run("totalsegmentator-ct", "--cases", "4", out=root.parent) == 0
        found = find_cases(root)
        assert tree(root) == wanted(content, [case.id for case in found])
        assert [case.id for case in found] == ["s0003", "s0005", "s0008", "s0011"]


def test_the_masks_are_those_that_the_program_reads():
    names = [name for names in TOTALSEGMENTATOR_MASKS.values() for name in names]
    assert sorted(download.MASKS.split("|")) == sorted(names)


# ----------------------------------------------------------------------------------------- going on


def test_nothing_is_asked_for_twice(run, server, small_blocks, tmp_path):
    files = cases(range(6))
    server.put(CT, zipped(files))
    root = tmp_path / "data/totalsegmentator-ct"
    places, before = spans(server.files[f"/{CT}"]), set()
    for number in (2, 2, 3):
        server.log.clear()
        assert run("totalsegmentator-ct", "--cases", str(number)) == 0
        new = {name for name in tree(root) if name not in before}
        for name, (first, last) in places.items():
            size = last - first + 1
            if name in new:
                assert size <= asked(server, (first, last)) <= size + 512, name
            elif name in before:
                assert asked(server, (first, last)) <= 512, name
        before |= new
    assert len(before) == 22


def test_neighbours_come_together(run, server, tmp_path):
    """Zenodo counts requests: here four for the directory, and one each for meta.csv and a case."""
    files = cases(range(8), size=16)
    server.put(CT, zipped(dict(reversed(files.items()))))
    assert run("totalsegmentator-ct") == 0
    assert len(server.log) <= 4 + 1 + 8


def test_what_a_user_deleted(run, server, tmp_path):
    files, root = cases(range(2)), tmp_path / "data/totalsegmentator-ct"
    server.put(CT, zipped(files))
    assert run("totalsegmentator-ct") == 0
    (root / "meta.csv").unlink()
    (root / "s0000/segmentations/liver.nii.gz").unlink()
    (root / "s0001/ct.nii.gz").unlink()
    assert run("totalsegmentator-ct") == 0
    assert tree(root) == wanted(files, ["s0000", "s0001"])


def flipped(content):
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-100], lambda content: b"", flipped, lambda content: b"mine"]
)
@pytest.mark.parametrize("name", ["ct", "segmentations/liver"])
def test_a_file_that_is_not_the_zips_is_fetched_again_and_kept(
    run, server, tmp_path, capsys, spoil, name
):
    files, root = cases(range(2)), tmp_path / "data/totalsegmentator-ct"
    server.put(CT, zipped(files))
    assert run("totalsegmentator-ct") == 0
    path = root / f"s0000/{name}.nii.gz"
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    capsys.readouterr()
    for _ in range(2):  # the second time all is well
        assert run("totalsegmentator-ct") == 0
        old = {f"s0000/{name}.nii.gz.old": spoilt}
        assert tree(root) == wanted(files, ["s0000", "s0001"]) | old
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"download: {path}: is not the zip's, but cut off, changed or of another"
    )
    assert len(find_cases(root)) == 2


def test_of_a_large_file_the_size_is_compared(run, server, tmp_path, monkeypatch):
    files, root = cases(range(1)), tmp_path / "data/totalsegmentator-ct"
    server.put(CT, zipped(files))
    assert run("totalsegmentator-ct") == 0
    scan = root / "s0000/ct.nii.gz"
    monkeypatch.setattr(download, "CHUNK", scan.stat().st_size - 1)
    scan.write_bytes(flipped(files["s0000/ct.nii.gz"]))
    assert run("totalsegmentator-ct") == 0
    assert scan.read_bytes() == flipped(files["s0000/ct.nii.gz"])
    scan.write_bytes(files["s0000/ct.nii.gz"][:-1])
    assert run("totalsegmentator-ct") == 0
    assert scan.read_bytes() == files["s0000/ct.nii.gz"]


@pytest.mark.parametrize("name", ["totalsegmentator-ct", "amos22"])
def test_two_releases_do_not_share_a_folder(run, server, tmp_path, capsys, name):
    about = "meta.csv" if name == "totalsegmentator-ct" else "dataset.json"
    file, files = (CT, cases(range(2))) if about == "meta.csv" else ("amos22.zip", amos())
    server.put(file, zipped(files))
    assert run(name) == 0
    before = tree(tmp_path)
    other = {name: content[:-5] + b"other" for name, content in files.items()}
    server.put(file, zipped(other))
    assert run(name) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "data" / name / about
    assert error.startswith(f"download: {path}: is not the zip's")
    assert error.endswith("or of another release; choose another --out, or delete it")
    assert tree(tmp_path) == before


def test_a_second_download_into_the_folder_is_refused(run, server, tmp_path, capsys):
    files, root = cases(range(1)), tmp_path / "data/totalsegmentator-ct"
    server.put(CT, zipped(files))
    root.mkdir(parents=True)
    with files_of.lock(root / "lock") as held:
        assert held
        assert run("totalsegmentator-ct") == 2
    error = capsys.readouterr().err
    holder = f"{socket.gethostname()}, process {os.getpid()}"
    choice = "wait for it, or choose another --out"
    assert error == f"download: {root}: {holder} is at work there; {choice}\n"
    assert tree(root) == {}
    assert run("totalsegmentator-ct") == 0
    assert tree(root) == wanted(files, ["s0000"])


COMMAND = [sys.executable, "-m", "scripts.download", "totalsegmentator-ct", "--cases", "2"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_of_a_case(run, server, tmp_path, stop):
    files, root = cases(range(2)), tmp_path / "data/totalsegmentator-ct"
    for id_ in ("s0000", "s0001"):
        files[f"{id_}/ct.nii.gz"] = random.Random(id_).randbytes(3_000_000)
    server.put(CT, zipped(files, method=zipfile.ZIP_STORED))
    server.limit = 200_000
    server.faults = iter([{}] * 15 + [{"drop": 100_000, "stall": True}])
    args = [*COMMAND, "--out", str(root.parent), "--mirror", server.url]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    own = f"{files_of.TEMPORARY}/*"
    with subprocess.Popen(args, cwd=ROOT, **pipes) as process:
        assert server.stalled.wait(60)
        assert any(root.glob(own))
        process.send_signal(stop)
        error = process.communicate()[1].decode()
    assert process.returncode == (130 if stop != signal.SIGKILL else -stop)
    assert any(root.glob(own)) == (stop == signal.SIGKILL)
    if stop != signal.SIGKILL:
        assert error.splitlines() == ["", "download: stopped; the same command goes on"]
    assert [n for n in tree(root) if not n.startswith(files_of.TEMPORARY)] == ["meta.csv"]
    with pytest.raises(DataError, match="no labelled case"):
        find_cases(root)
    mine = root / ".partial-mine"  # looks like something temporary, and is the user's
    mine.mkdir()
    server.faults = iter(())
    assert run("totalsegmentator-ct", "--cases", "2") == 0
    assert tree(root) == wanted(files, ["s0000", "s0001"])
    assert mine.exists()
    assert not any(root.glob(own))


@pytest.mark.parametrize("name", ["totalsegmentator-ct", "amos22"])
def test_stopped_between_two_renames_there_is_no_case(run, server, tmp_path, monkeypatch, name):
    server.put(CT, zipped(cases(range(1))))
    server.put("amos22.zip", zipped(amos()))
    replace = download.Path.replace
    for n in range(1, 8 if name == "totalsegmentator-ct" else 3):
        calls = iter([*[False] * n, True])  # the first is meta.csv's

        def stopped(*args, calls=calls):
            if next(calls):
                raise KeyboardInterrupt
            replace(*args)

        monkeypatch.setattr(download.Path, "replace", stopped)
        out = tmp_path / str(n)
        assert run(name, "--cases", "1", out=out) == 130
        with pytest.raises(DataError):
            find_cases(out / name)
        monkeypatch.setattr(download.Path, "replace", replace)
        assert run(name, "--cases", "1", out=out) == 0
        assert len(find_cases(out / name)) == (1 if name == "totalsegmentator-ct" else 2)


# ------------------------------------------------------------------------------------- bad servers


def test_dropped_connections(run, server, waits, tmp_path, capsys):
    draw = random.Random(0)
    server.faults = ({"drop": draw.randrange(3000)} if n % 3 else {} for n in itertools.count())
    files = cases(range(3))
    server.put(CT, zipped(files))
    assert run("totalsegmentator-ct") == 0
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000", "s0001", "s0002"])
    assert set(waits) == {1, 3}
    assert "closed too early; next try in 1 s" in capsys.readouterr().err


def test_answers_that_are_none(run, server, waits, tmp_path):
    files = cases(range(1))
    server.put(CT, zipped(files))
    garbage = (b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 206 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n")
    server.faults = iter([{}, *({"garbage": content} for content in garbage), {}])
    assert run("totalsegmentator-ct") == 0
    assert waits == [1, 3, 10]
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000"])


def test_a_server_that_sends_only_so_much_at_a_time(run, server, waits, tmp_path):
    server.limit = 1000
    files = cases(range(1))
    server.put(CT, zipped(files))
    assert run("totalsegmentator-ct") == 0
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000"])
    assert waits == []


def test_tries_end(run, server, waits, tmp_path, capsys):
    server.put(CT, zipped(cases(range(1))))
    server.faults = itertools.chain([{}] * 3, itertools.repeat({"drop": 0}))
    assert run("totalsegmentator-ct") == 1
    assert waits == [1, 3, 10, 30, 60]
    assert "by hand: download it" in capsys.readouterr().err
    assert tree(tmp_path / "data") == {}


def test_where_nobody_answers_there_is_one_short_retry(waits, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens
        args = ["totalsegmentator-ct", "--out", str(tmp_path), "--mirror", mirror]
        assert download.main(args) == 1
    assert waits == [1]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "download: [Errno 111] Connection refused; next try in 1 s"
    assert "Connection refused; by hand: download it" in last


@pytest.mark.parametrize(
    ("what", "tries"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), 1),
        (urllib.error.URLError(TimeoutError("timed out")), 1),
        (urllib.error.URLError(OSError(101, "Network is unreachable")), 1),
        (urllib.error.URLError(ssl.SSLCertVerificationError(1, "self-signed certificate")), 1),
        (http.client.BadStatusLine("SSH-2.0-OpenSSH"), 1),
        (http.client.InvalidURL("nonnumeric port"), 1),
        (UnicodeError("label empty or too long"), 1),
        (ConnectionResetError(104, "Connection reset by peer"), 5),
        (http.client.RemoteDisconnected("Remote end closed connection without response"), 5),
        (urllib.error.URLError(ConnectionResetError(104, "Connection reset by peer")), 5),
    ],
)
def test_a_wrong_address_and_a_busy_one(run, waits, monkeypatch, capsys, what, tries):
    """A wrong one is tried once more; once somebody has answered there all is waited for."""

    def fail(*args, **more):
        raise what

    monkeypatch.setattr(download.urllib.request, "urlopen", fail)
    assert run("totalsegmentator-ct") == 1
    assert waits == [1, 3, 10, 30, 60][:tries]
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(getattr(what, "reason", what)) in last
    assert last.endswith("meta.csv is there; the same command goes on")


def test_a_network_that_goes_away_is_waited_for(run, server, waits, tmp_path, monkeypatch):
    files, calls, urlopen = cases(range(1)), itertools.count(), urllib.request.urlopen
    server.put(CT, zipped(files))

    def gone_for_a_while(*args, **more):
        if 2 <= next(calls) < 6:
            raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure"))
        return urlopen(*args, **more)

    monkeypatch.setattr(download.urllib.request, "urlopen", gone_for_a_while)
    assert run("totalsegmentator-ct") == 0
    assert waits == [1, 3, 10, 30]
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000"])


@pytest.mark.parametrize(
    ("status", "after", "wait"),
    [
        (429, "7", 7),
        (503, "8", 8),
        (429, "99999", 3600),
        (429, None, 1),
        (502, None, 1),
        (429, "Wed, 21 Oct 2026 07:28:00 GMT", 1),
        (503, "-5", 1),
        (503, "²", 1),
    ],
)
def test_a_server_that_asks_to_wait(run, server, waits, tmp_path, status, after, wait):
    files = cases(range(1))
    server.put(CT, zipped(files))
    server.faults = iter([{}, {"status": status, "headers": {"Retry-After": after}}])
    assert run("totalsegmentator-ct") == 0
    assert waits == [wait]
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000"])


def test_a_server_that_asks_to_wait_for_ever(run, server, waits, capsys):
    server.put(CT, zipped(cases(range(1))))
    server.faults = itertools.repeat({"status": 429, "headers": {"Retry-After": "60"}})
    assert run("totalsegmentator-ct") == 1
    assert waits == [60] * 5
    assert "429" in capsys.readouterr().err


def test_a_refusal_is_no_reason_to_wait(run, server, waits, capsys):
    for status in (404, 403):
        server.faults = iter([{"status": status}])
        assert run("totalsegmentator-ct") == 1
        error = capsys.readouterr().err
        assert f"{server.url}/{CT}: HTTP Error {status}" in error
    assert waits == []


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 200, "headers": {"Content-Range": None}},
        {"status": 200},
        {"headers": {"Content-Range": None}},
        {"headers": {"Content-Range": "bytes 5-9999999/1000000"}},
        {"headers": {"Content-Range": "bytes 0--1/100000"}},
        {"headers": {"Content-Range": "bytes 0-0/*"}},
    ],
)
def test_a_server_that_sends_no_parts(run, server, waits, tmp_path, capsys, fault):
    server.put(CT, random.Random(0).randbytes(1_000_000))
    server.faults = itertools.repeat(fault)
    assert run("totalsegmentator-ct") == 1
    error = capsys.readouterr().err
    assert f"{server.url}/{CT}: the server does not send parts of a file" in error
    assert f"so that {tmp_path / 'data/totalsegmentator-ct/meta.csv'} is there" in error
    assert (waits, tree(tmp_path)) == ([], {})


def test_a_range_that_ends_before_it_begins(run, server, waits, capsys):
    server.put(CT, zipped(cases(range(1))))
    end = len(server.files[f"/{CT}"]) - 22  # where zipfile looks first
    server.faults = iter([{}, {"headers": {"Content-Range": f"bytes {end}-3/9"}}])
    assert run("totalsegmentator-ct") == 1
    assert "does not send parts" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["etag", "date", "longer", "shorter"])
def test_a_file_that_changes_meanwhile(run, server, waits, tmp_path, capsys, change, small_blocks):
    files = cases(range(2), size=16)
    content = zipped(files, method=zipfile.ZIP_STORED)
    server.put(CT, content)
    server.headers = {} if change != "date" else {"Last-Modified": "Mon, 23 Feb 2026 14:47:38 GMT"}

    def requests():
        for n in itertools.count():
            if n == 12:
                assert tree(tmp_path / "data") != {}
                if change == "etag":
                    server.headers = {"ETag": '"2"'}
                elif change == "date":
                    server.headers = {"Last-Modified": "Tue, 24 Feb 2026 14:47:38 GMT"}
                else:
                    server.put(CT, content + b"x" if change == "longer" else content[:-1])
            yield {}

    server.faults = requests()
    assert run("totalsegmentator-ct") == 1
    assert "the file has changed on the server" in capsys.readouterr().err
    assert set(tree(tmp_path / "data/totalsegmentator-ct")) <= set(
        wanted(files, ["s0000", "s0001"])
    )
    assert waits == []


def test_it_says_who_asks(run, server):
    """Zenodo answers the names of libraries with 403 (github.com/fatiando/pooch/issues/502)."""
    server.put(CT, zipped(cases(range(1))))
    assert run("totalsegmentator-ct") == 0
    [agent] = server.agents
    assert re.fullmatch(r"FedGIN\S+ \(https://\S+\)", agent)


def test_a_redirection_keeps_the_range(run, server, tmp_path):
    files = cases(range(1))
    server.put("elsewhere", zipped(files))
    moved = {"status": 302, "headers": {"Location": "/elsewhere"}}
    server.faults = itertools.cycle([moved, {}])
    assert run("totalsegmentator-ct") == 0
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000"])


# ------------------------------------------------------------------------------------ bad archives


def damaged(content, name, how):
    """The zip with a member spoilt: its data, the start of its stream, its header or its entry."""
    data = bytearray(content)
    first, last = spans(content)[name]
    entry = content.rindex(name.encode()) - 46  # in the directory
    if how == "data":
        data[(first + last) // 2] ^= 255
    elif how == "stream":
        data[first] = 255  # a type of block that there is not
    elif how == "header":
        data[first - 5] ^= 255  # of the name
    elif how == "method":
        data[entry + 10] = 9  # Deflate64, which Windows uses for large files
    elif how == "password":
        data[entry + 8] |= 1
    elif how == "patched":
        data[entry + 8] |= 32
    elif how == "size":
        data[entry + 20 : entry + 28] = 2 * (10**8).to_bytes(4, "little")  # more than there is
    return bytes(data)


@pytest.mark.parametrize(
    ("method", "how"),
    [(zipfile.ZIP_STORED, how) for how in ("data", "header", "size")]
    + [
        (zipfile.ZIP_DEFLATED, how)
        for how in ("data", "header", "stream", "method", "password", "patched")
    ],
)
def test_a_damaged_case_is_left_out(run, server, tmp_path, capsys, method, how):
    files, root = cases(range(3)), tmp_path / "data/totalsegmentator-ct"
    content = zipped(files, method=method)
    server.put(CT, damaged(content, "s0001/segmentations/liver.nii.gz", how))
    assert run("totalsegmentator-ct") == 1
    shown = capsys.readouterr()
    assert re.search(r"s0001\S* is left out: ", shown.err)
    assert "1 of them damaged" in shown.out
    assert tree(root) == wanted(files, ["s0000", "s0002"])
    assert {path.name for path in root.iterdir()} == {"lock", "meta.csv", "s0000", "s0002"}
    server.put(CT, content)  # it was the line, or somebody has mended it
    assert run("totalsegmentator-ct") == 0
    assert tree(root) == wanted(files, ["s0000", "s0001", "s0002"])


def broken_directories():
    """A zip with each byte of its directory and its end spoilt."""
    content = zipped({"meta.csv": b"", "ü/ct.nii.gz": b"a"}, zip64=True)
    start = content.index(b"PK\x01\x02")
    for n in range(start, len(content)):
        for bits in (1, 128, 255):
            yield content[:n] + bytes([content[n] ^ bits]) + content[n + 1 :]


def test_a_spoilt_directory_is_no_traceback(server, tmp_path):
    url, n = f"{server.url}/{CT}", 0
    for content in broken_directories():
        server.put(CT, content)
        with pytest.raises(download.DownloadError):
            download.download(url, tmp_path / "x", 1)
        n += 1
    assert n > 400
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"", zipped({"a": b"b" * 99})[:-9]])
def test_what_is_no_zip(run, server, waits, tmp_path, capsys, content):
    server.put(CT, content)
    assert run("totalsegmentator-ct") == 1
    assert "download: the run failed: " in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_a_damaged_case_and_a_whole_data_set(run, server, tmp_path):
    content = zipped(cases(range(1)))
    server.put(CT, damaged(content, "s0000/ct.nii.gz", "data"))
    server.put(MRI, zipped(cases(range(1), scan="mri")))
    assert run("totalsegmentator-ct", "totalsegmentator-mri") == 1
    assert len(find_cases(tmp_path / "data/totalsegmentator-mri")) == 1


def test_a_zip_without_cases(run, server, tmp_path, capsys):
    server.put(CT, zipped(case("s0000", organs=ORGANS) | {"s0000/ct.nii.gz": b""}, prefix="1"))
    assert run("totalsegmentator-ct") == 1
    assert "the zip holds no complete case; by hand" in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_zip64(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # so that the directory is zip64 too
    files = cases(range(2))
    content = zipped(files, zip64=True)
    assert b"PK\x06\x06" in content
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    server.put(CT, content)
    assert run("totalsegmentator-ct") == 0
    assert tree(tmp_path / "data/totalsegmentator-ct") == wanted(files, ["s0000", "s0001"])


def test_no_name_leads_out_of_the_folder(run, server, tmp_path):
    files = cases(range(1))
    evil = dict(files)
    for i, start in enumerate(("../../", "/", "C:\\", "..\\", "a/../../b/", "s0000/")):
        there = case(f"s{i + 1:04d}")
        evil |= {start + name: content for name, content in there.items()}
        files |= there if start not in ("C:\\", "..\\") else {}
    evil["s0000/../../evil/ct.nii.gz"] = b"evil"
    evil["s0000/segmentations/../../../liver.nii.gz"] = b"evil"
    evil["s0000/segmentations/..\\liver.nii.gz"] = b"evil"
    evil["../meta.csv"] = b"evil"
    server.put(CT, zipped(evil))
    assert run("totalsegmentator-ct", out=tmp_path / "a/b/c/data") == 0
    ids = [f"s{i:04d}" for i in range(7)]
    assert tree(tmp_path / "a/b/c/data/totalsegmentator-ct") == wanted(files, ids)
    assert all("a/b/c/data/totalsegmentator-ct" in str(p) for p in tmp_path.rglob("*.*"))


# ------------------------------------------------------------------------------------- command line


def test_a_full_disk(run, server, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    server.put(CT, zipped(cases(range(1))))
    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    assert run("totalsegmentator-ct") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_a_dry_run_asks_nothing(run, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.urllib.request, "urlopen", None)
    monkeypatch.setattr(download.http.client.HTTPConnection, "connect", None)
    names = list(download.DATA_SETS)
    assert run(*names, "--cases", "3", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"at most (\d+) cases", shown) == ["3", "3", "3", "6"]
    assert f"{server.url}/{MRI}\n" in shown
    assert download.main([*names, "--dry-run", "--all", "--out", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "https://zenodo.org/records/7262581/files/amos22.zip?download=1\n" in shown
    assert (
        "https://zenodo.org/records/14710732; licence: see the record's page; cite: Akinci" in shown
    )
    assert re.findall(r"about ([0-9.]+) of", shown) == ["23.6", "3.2", "5.1", "24.0"]
    assert (server.log, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    "args",
    [
        "chaos",
        "",
        "amos22 --cases 0",
        "amos22 --cases -3",
        "amos22 --cases x",
        "amos22 --al",
        "amos22 --mirror /me",
        "amos22 --mirror ftp://localhost",
        "amos22 --mirror http://",
        "amos22 --mirror http:///data",
        "amos22 --mirror http://localhost:x/data",
        "amos22 --mirror http://[::1/data",
        "amos22 --mirror http://localhost/däta",
        "amos22 --mirror http://localhöst/data",
        "amos22 --mirror http://localhost/\x00",
        "amos22 --mirror http://localhost/\udcff",
    ],
)
def test_bad_input(args, capsys):
    with pytest.raises(SystemExit) as stop:
        download.main([*args.split(), "--dry-run"])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "mirror", ["http://[::1]:80", "https://a-b.example.org/x/?y=%C3%BC", "http://a"]
)
def test_addresses_of_mirrors(mirror, capsys):
    assert download.main(["amos22", "--dry-run", "--mirror", mirror]) == 0
    assert f"from {mirror}/amos22.zip" in capsys.readouterr().out


def test_help_begins_with_a_line_to_paste_and_needs_no_utf_8(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    args = [sys.executable, "-m", "scripts.download", "--help"]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0].startswith("usage: python -m scripts.download DATA_SET [DATA_SET ")
    [command] = [line for line in lines[1:] if line.startswith("python -m scripts.download ")]
    assert download.main([*shlex.split(command)[3:], "--dry-run"]) == 0
    assert done.stderr == ""
