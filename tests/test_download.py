"""The download against a web server on this machine that can fail in every way we know of."""

import functools
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
import socketserver
import sys
import threading
import urllib.request
import zipfile
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import pytest
from conftest import TOTALSEGMENTATOR_MASKS

from scans.files import DataError, lock
from scans.layouts import find_cases
from scripts import download

ORGANS = tuple(name for names in TOTALSEGMENTATOR_MASKS.values() for name in names)
CT, MRI, AMOS22 = "totalsegmentator-ct", "totalsegmentator-mri", "amos22"
ZIPS = {CT: "Totalsegmentator_dataset_v201", MRI: "TotalsegmentatorMRI_dataset_v200"}
META = "".join(["image_id;age;split\n", *(f"s{i:04d};50;train\n" for i in range(50))]).encode()
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@functools.cache
def case(id_, scan="ct", organs=ORGANS, size=9000):
    """The files of a case by name: its scan noise, an organ some voxels, other masks empty."""
    draw = random.Random(id_)
    files = {f"{id_}/{scan}.nii.gz": draw.randbytes(size)}
    for name in (*ORGANS, "rib_0", "rib_1", "rib_2", "rib_3"):
        mask = (draw.randbytes(500) if name in organs else bytes(500)) + bytes(size)
        content = gzip.compress(mask, 1, mtime=0) + bytes(len(name))  # headers hold names
        files[f"{id_}/segmentations/{name}.nii.gz"] = content
    return files


def cases(n, scan="ct"):
    files = {"meta.csv": META}
    for i in range(n):
        files |= case(f"s{i:04d}", scan)
    return files


def wanted(files, ids):
    """Those of some cases, or of the first so many, that are to be fetched."""
    ids = [f"s{i:04d}" for i in range(ids)] if isinstance(ids, int) else ids
    pattern = rf"meta\.csv|({'|'.join(ids)})/(ct|mri|segmentations/({'|'.join(ORGANS)}))\.nii\.gz"
    return {name: content for name, content in files.items() if re.fullmatch(pattern, name)}


def amos():
    parts = {"Tr": [1, 4, 5, 507, 508], "Va": [8, 500, 510, 600], "Ts": [2, 3, 511]}
    names = [f"images{part}/amos_{i:04d}.nii.gz" for part in parts for i in parts[part]]
    names += [name.replace("images", "labels") for name in names if "Ts" not in name]
    names += ["imagesTr/amos_0499.nii.gz", "labelsTr/amos_0501.nii.gz"]  # without the other
    names += ["labelsTs/amos_0002.nii.gz", "__MACOSX/imagesTr/._amos_0001.nii.gz", "readme.md"]
    return {name: random.Random(name).randbytes(999) for name in ("dataset.json", *names)}


def zipped(files, prefix="", method=DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return buffer.getvalue()


TWO_CASES = zipped(cases(2))


def tree(folder):
    """All files, hidden ones too, except the lock, by their paths in the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Server(socketserver.ThreadingTCPServer):
    """Sends parts of `files`; `faults` befall the next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.zip_url = f"{self.url}/{ZIPS[CT]}.zip"
        self.files, self.faults = {}, iter(())
        self.agents, self.sent = [], 0

    def handle_error(self, *args):
        pass  # a client that hangs up is meant

    def put(self, content, name=CT):
        self.files[f"/{ZIPS.get(name, name)}.zip"] = content


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, fault = self.server, next(self.server.faults, {})
        server.agents.append(self.headers["User-Agent"])
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        body = server.files.get(self.path, b"")
        lacking = 416 if self.path in server.files else 404
        code = fault.get("status", 206 if first < len(body) else lacking)
        part = b"" if code >= 300 else body[first : last + 1][: fault.get("limit")]
        headers = {
            "Content-Length": len(part),
            "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}",
            "Retry-After": fault.get("retry", "59"),  # Zenodo says so with every answer
        }
        if "garbage" in fault:
            return self.wfile.write(fault["garbage"])
        self.send_response(code)
        for name, value in {**headers, **fault.get("headers", {})}.items():
            if value is not None:
                self.send_header(name, str(value).replace("FIRST", str(first)))
        self.end_headers()
        part = part[: fault.get("drop")]
        self.wfile.write(part)
        server.sent += len(part)
        fault.get("then", lambda: None)()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nobody cuts the power
    with Server() as server:
        server.put(TWO_CASES)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
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
        return download.main([*(args or [CT]), "--out", str(out), "--mirror", f"{server.url}/"])

    return run


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data" / CT


@pytest.mark.parametrize(("prefix", "zip64"), [("", False), ("a/", False), ("a/b/", True)])
def test_it_fetches_cases_whole_and_nothing_else(run, server, root, capsys, prefix, zip64):
    files = cases(6)
    for i in range(6):  # what the user does not need: 9 MB
        files[f"s{i:04d}/segmentations/brain.nii.gz"] = random.Random(i).randbytes(1_500_000)
    limit = 1000 if zip64 else zipfile.ZIP64_LIMIT  # so that the directory is zip64 too
    with mock.patch.object(zipfile, "ZIP64_LIMIT", limit):
        content = zipped(files, prefix, STORED)
    assert (b"PK\x06\x06" in content) == zip64
    server.put(content)
    assert run(CT, "--cases", "2") == 0
    found = find_cases(root, "ct")
    assert tree(root) == wanted(files, [case.id for case in found])
    assert [case.split for case in found] == ["train"] * 2
    assert [sum(map(len, case.masks.values())) for case in found] == [6, 6]
    assert server.sent < 0.25 * len(content)
    shown = capsys.readouterr().out
    sizes = f"{server.sent:,} of {len(content):,} bytes fetched"
    assert f"2 of 6 cases, 0 of them damaged and left out\n  {sizes}" in shown
    assert "licence: CC BY 4.0; cite: Wasserthal et al. 2023, doi:10.1148/ryai.230024\n" in shown
    # Zenodo answers the names of libraries with 403 (github.com/fatiando/pooch/issues/502).
    [agent] = set(server.agents)
    assert re.fullmatch(r"FedGIN\S+ \(https://\S+\)", agent)


def test_two_data_sets_and_how_to_go_on(run, server, tmp_path, capsys):
    ct, mri = tmp_path / "my data" / CT, tmp_path / "my data" / MRI
    server.put(zipped(cases(3)))
    server.put(zipped(cases(2, "mri")), MRI)
    assert run(CT, MRI, CT, out=ct.parent) == 0
    assert tree(ct) == wanted(cases(3), 3)
    assert tree(mri) == wanted(cases(2, "mri"), 2)
    assert {case.modality for case in find_cases(mri)} == {"mri"}
    check, fedgin = map(shlex.split, capsys.readouterr().out.splitlines()[-2:])
    assert check == ["python", "-m", "scripts.check", str(ct), str(mri)]
    start = ["python", "fedgin.py", "--scenario", "complete"]
    assert fedgin == [*start, "--ct", str(ct), "--mri", str(mri), "--skip-bad"]


def test_all_takes_every_complete_case(run, server, root):
    files = dict(reversed(cases(44).items()))
    del files["s0003/segmentations/liver.nii.gz"], files["s0004/ct.nii.gz"]
    server.put(zipped(files))
    assert run() == 0
    assert len(find_cases(root)) == 40
    # Zenodo counts requests: here four for the directory, and one each for meta.csv and a case.
    assert len(server.agents) <= 4 + 1 + 40
    assert run(CT, "--all") == 0
    assert tree(root) == wanted(files, [f"s{i:04d}" for i in range(44) if i not in (3, 4)])


@pytest.mark.parametrize("prefix", ["", "amos22/"])
def test_amos22_without_its_unlabelled_cases(run, server, tmp_path, prefix, capsys):
    files, root = amos(), tmp_path / "data/amos22"
    server.put(zipped(files, prefix), AMOS22)
    assert run(AMOS22, "--cases", "2") == 0  # of each modality
    found = {case.id: case.modality for case in find_cases(root)}
    places = sorted((modality, id_ > "amos_0500") for id_, modality in found.items())
    assert places == [("ct", False)] * 2 + [("mri", True)] * 2
    pattern = rf"dataset\.json|(images|labels)(Tr|Va)/({'|'.join(found)})\.nii\.gz"
    assert tree(root) == {name: files[name] for name in files if re.fullmatch(pattern, name)}
    assert len(tree(root)) == 9
    assert capsys.readouterr().out.endswith(f" --ct DIR --mri DIR --test {root} --skip-bad\n")
    assert run(AMOS22, "--all") == 0
    assert [len(find_cases(root, modality)) for modality in ("ct", "mri")] == [5, 4]
    assert len(tree(root)) == 19


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_cases_with_most_organs_come_first(run, server, root, method):
    organs = {"s0001": 3, "s0002": 6, "s0003": 0, "s0004": 5, "s0005": 1, "s0006": 6, "s0007": 2}
    files, taken = {"meta.csv": META}, []
    for n, (id_, number) in enumerate(organs.items()):
        files |= case(id_, organs=ORGANS[:number], size=4**n * 20)
    server.put(zipped(files, method=method))
    for number in range(1, 8):
        assert run(CT, "--cases", str(number)) == 0
        [new] = {case.id for case in find_cases(root)} - set(taken)
        taken.append(new)
    assert sorted(taken[:2]) == ["s0002", "s0006"]
    assert taken[2:] == ["s0004", "s0001", "s0007", "s0005", "s0003"]


def test_the_order_is_everybodys(run, server, tmp_path):
    """Whatever the order in the zip; by now it cannot change without other people's cases."""
    content, ids = cases(12), ["s0003", "s0005", "s0008", "s0011"]
    copies = {f"old/{name}": b"a copy in another folder" for name in content}
    files = list((content | copies).items())
    for seed in range(3):
        random.Random(seed).shuffle(files)
        server.put(zipped(dict(files), prefix="x/" * seed))
        root = tmp_path / str(seed) / CT
        assert run(CT, "--cases", "4", out=root.parent) == 0
        assert tree(root) == wanted(content, ids)


def test_nothing_is_fetched_twice(run, server, root, monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 512)
    server.put(zipped(cases(6), method=STORED))
    before = 0
    for number in (1, 1, 3):
        server.sent = 0
        assert run(CT, "--cases", str(number)) == 0
        size = sum(map(len, tree(root).values()))
        assert size - before <= server.sent < size - before + 13_000  # the directory's 67 entries
        before = size
    assert len(tree(root)) == 22


def flipped(content):
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


@pytest.mark.parametrize(
    ("name", "path", "spoil"),
    [
        (CT, "ct.nii.gz", lambda content: content[:-100]),
        (CT, "ct.nii.gz", flipped),
        (CT, "liver.nii.gz", lambda content: b""),
        (CT, "liver.nii.gz", flipped),
        (CT, "meta.csv", flipped),  # as of another release
        (AMOS22, "dataset.json", flipped),
        (AMOS22, "labels*/*.nii.gz", flipped),
    ],
)
def test_a_file_that_is_not_the_zips_is_refused(run, server, tmp_path, capsys, name, path, spoil):
    server.put(zipped(amos()), AMOS22)
    assert run(name, "--cases", "1") == 0
    file = min((tmp_path / "data" / name).rglob(path))
    content = file.read_bytes()
    file.write_bytes(spoil(content))
    before = tree(tmp_path)
    assert run(name) == 2
    advice = "differs from the zip; delete it, or choose another --out"
    assert capsys.readouterr().err.splitlines()[-1] == f"download: {file}: {advice}"
    assert tree(tmp_path) == before
    file.unlink()
    assert run(name) == 0
    assert tree(tmp_path).items() > (before | {str(file.relative_to(tmp_path)): content}).items()


def test_of_a_large_file_the_size_is_compared(run, root, monkeypatch):
    scan, content = root / "s0000/ct.nii.gz", cases(1)["s0000/ct.nii.gz"]
    assert run() == 0
    monkeypatch.setattr(download, "CHUNK", len(content) - 2)
    for kept, code in ((flipped(content), 0), (content[:-1], 2)):
        scan.write_bytes(kept)
        assert run() == code
        assert scan.read_bytes() == kept


def test_a_second_download_into_the_folder_is_refused(run, root, capsys):
    with lock(root / "lock") as held:
        assert held
        assert run() == 2
    advice = "another process is at work; wait, or choose another --out"
    assert capsys.readouterr().err == f"download: {root}: {advice}\n"
    assert tree(root) == {}
    assert run() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_of_a_case(run, server, root, capfd, number):
    files = {name: content for name, content in cases(2).items() if "/ct" not in name}
    files |= {f"s000{i}/ct.nii.gz": random.Random(i).randbytes(3_000_000) for i in range(2)}
    server.put(zipped(files, method=STORED))
    stalled, ended = threading.Event(), threading.Event()
    stop = {"drop": 100_000, "then": lambda: (stalled.set(), ended.wait(20))}
    server.faults = iter([{"limit": 200_000}] * 15 + [stop])
    process = os.fork()
    if not process:
        try:
            os._exit(run())
        finally:
            os._exit(99)
    assert stalled.wait(20)
    os.kill(process, number)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    ended.set()
    assert code == (-number if number == signal.SIGKILL else 130)
    stopped = "\ndownload: stopped; repeat the command to continue\n"
    assert capfd.readouterr().err == ("" if number == signal.SIGKILL else stopped)
    arrived = list(root.glob(".download/s000?/segmentations/*.nii.gz"))
    assert bool(arrived) == (root / ".download").exists() == (number == signal.SIGKILL)
    assert [name for name in tree(root) if not name.startswith(".download/")] == ["meta.csv"]
    with pytest.raises(DataError, match="no labelled case"):
        find_cases(root)
    server.faults = iter(())
    assert run() == 0
    assert tree(root) == wanted(files, 2)


@pytest.mark.parametrize("name", [CT, AMOS22])
def test_stopped_between_two_renames_there_is_no_case(run, server, root, monkeypatch, name):
    server.put(zipped(amos()), AMOS22)
    for n in range(1, 8 if name == CT else 3):  # the first renaming is the metadata file's
        folder, results = root / str(n), iter([Path.replace] * n)

        def replace(path, target, results=results, replace=Path.replace):
            if ".download" in str(target) or next(results, None):
                return replace(path, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            assert run(name, "--cases", "1", out=folder) == 130
        with pytest.raises(DataError):
            find_cases(folder / name)
        assert run(name, "--cases", "1", out=folder) == 0
        assert len(find_cases(folder / name)) == (1 if name == CT else 2)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([{}, {"status": 429, "retry": "7"}, {"status": 503, "retry": "8"}], [7, 8]),
        ([{}, {"status": 429, "retry": "99999"}], [3600]),
        ([{}, {"status": 429, "retry": None}, {"status": 502, "retry": None}], [1, 3]),
        ([{}, {"status": 429, "retry": "Wed, 21 Oct 2026 07:28:00 GMT"}], [1]),
        ([{}, {"status": 503, "retry": "-5"}, {"status": 503, "retry": "²"}], [1, 3]),
        ([{}, {"garbage": b""}, {"garbage": b"SSH-2.0-OpenSSH\r\n"}], [1, 3]),
        ([{}, {"garbage": b"HTTP/1.1 206 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n"}], [1]),
        ([{}, {"headers": {"Content-Range": "bytes FIRST-3/9"}}], [1]),  # ends before it begins
        ([{"status": 302, "headers": {"Location": "/elsewhere.zip"}}, {}] * 99, []),
        ([{}, *[{"drop": 2}] * 4, {}, {"drop": 9}], [1, 3, 10, 30, 1]),
        ([{"limit": 500}] * 999, []),
        ([{}, *[{}, {"drop": 5}] * 9], [1] * 9),  # tries are counted by the part
    ],
)
def test_what_a_server_may_do(run, server, waits, root, monkeypatch, faults, expected):
    monkeypatch.setattr(download, "CHUNK", 1000)
    server.put(TWO_CASES, "elsewhere")
    server.faults = iter(faults)
    assert run() == 0
    assert waits == expected
    assert tree(root) == wanted(cases(2), 2)


@pytest.mark.parametrize(
    ("content", "n_good", "fault", "expected", "message"),
    [
        (TWO_CASES, 1, {"drop": 0}, [1, 3, 10, 30, 60], "the connection was closed too e"),
        (TWO_CASES, 4, {"drop": 0}, [1, 3, 10, 30, 60], "the connection was closed too e"),
        (TWO_CASES, 1, {"status": 429, "retry": "60"}, [60] * 5, "HTTP Error 429"),
        (TWO_CASES, 0, {"status": 404}, [], "HTTP Error 404"),
        (TWO_CASES, 1, {"status": 403}, [], "HTTP Error 403"),
        (TWO_CASES, 0, {"status": 200}, [1], "the server does not send parts of a file"),
        *(
            (b"a", 0, {"headers": {"Content-Range": span}}, [1], "the server does not send parts")
            for span in (None, "bytes 5-9999999/1000000", "bytes 0--1/100000", "bytes 0-0/*")
        ),
        (b"<html>Sign in</html>", 0, {}, [], "is not a zip file"),
        (b"", 0, {}, [], "HTTP Error 416"),
        (zipped({"a": b"b" * 99})[:-9], 0, {}, [], "is not a zip file"),
        (zipped(case("s0000"), "1"), 0, {}, [], "the zip holds no complete case"),
    ],
)
def test_tries_end(run, server, waits, root, capsys, content, n_good, fault, expected, message):
    server.put(content)
    server.faults = itertools.chain([{}] * n_good, itertools.repeat(fault))
    assert run() == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"download: the run failed: {server.zip_url}: {message}")
    by_hand = f"by hand: download it, and unpack it so that {root / 'meta.csv'} is there"
    assert last.endswith(f"; {by_hand}; repeat the command to continue")
    assert (waits, tree(root)) == (expected, {})


@pytest.mark.parametrize(
    ("n_good", "address", "tries", "message"),
    [
        (0, "http://127.0.0.1:1", 1, "[Errno 111] Connection refused"),
        (0, "/me", 1, f"unknown url type: '/me/{ZIPS[CT]}.zip'"),
        (0, "http://localhost:x/data", 1, "nonnumeric port: 'x'"),
        (0, "http://localhost/däta", 1, "ordinal not in range(128)"),
        (0, URLError(OSError(-2, "Name or service not known")), 1, "Name or service not known"),
        (0, URLError(TimeoutError("timed out")), 1, "timed out"),
        (0, http.client.BadStatusLine("SSH-2.0-OpenSSH"), 1, "SSH-2.0-OpenSSH"),
        (0, UnicodeError("label empty or too long"), 1, "label empty or too long"),
        (0, ConnectionResetError(104, "Reset by peer"), 5, "Reset by peer"),
        (0, http.client.RemoteDisconnected("without response"), 5, "without response"),
        (0, URLError(ConnectionResetError(104, "Reset by peer")), 5, "Reset by peer"),
        (1, URLError(OSError(-3, "Temporary failure")), 5, "Temporary failure"),
    ],
)
def test_addresses(server, waits, tmp_path, monkeypatch, capsys, n_good, address, tries, message):
    """A wrong one is tried once more; once somebody has answered there all is waited for."""
    if isinstance(address, Exception):
        opens, fail = iter([urllib.request.urlopen] * n_good), mock.Mock(side_effect=address)
        monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: next(opens, fail)(*a, **k))
        address = server.url
    assert download.main([CT, "--out", str(tmp_path), "--mirror", address]) == 1
    assert waits == [1, 3, 10, 30, 60][:tries]
    *lines, last = capsys.readouterr().err.splitlines()
    assert [message in line for line in lines] == [True] * tries
    assert f"{message}; by hand: download it" in last


@pytest.mark.parametrize("change", [lambda content: b"x" * 99 + content, lambda c: c[:-9000]])
def test_a_file_that_changes_meanwhile(run, server, waits, root, change, monkeypatch):
    """Nothing of the other file gets into the folder: the checksums of the first do not hold."""
    monkeypatch.setattr(download, "BLOCK", 512)
    content = zipped(cases(2), method=STORED)
    server.put(content)
    changes = {"then": lambda: server.put(change(content))}
    server.faults = iter([*[{}] * 12, changes])
    assert run() == 1
    assert {"meta.csv"} <= tree(root).keys()
    assert tree(root).items() < wanted(cases(2), 2).items()
    server.put(content)
    assert run() == 0
    assert tree(root) == wanted(cases(2), 2)


def damaged(content, name, how):
    """The zip with a member spoilt: its data, the start of its stream, its header or its entry."""
    data, info = bytearray(content), zipfile.ZipFile(io.BytesIO(content)).getinfo(name)
    first = info.header_offset + 30 + len(name)
    entry = content.rindex(name.encode()) - 46  # in the directory
    places, bits = {
        "data": ([first + info.compress_size // 2], 255),
        "stream": ([first], 255),  # a type of block that there is not
        "header": ([first - 5], 128),  # of the name
        "method": ([entry + 10], 9),  # Deflate64, which Windows uses for large files
        "password": ([entry + 8], 1),
        "patched": ([entry + 8], 32),
        "size": ([entry + 23, entry + 27], 4),  # more than there is
    }[how]
    for place in places:
        data[place] |= bits
    return bytes(data)


@pytest.mark.parametrize(
    ("method", "ways"),
    [(STORED, "data header size"), (DEFLATED, "data header stream method password patched")],
)
def test_a_damaged_case_is_left_out(run, server, tmp_path, capsys, method, ways):
    files = cases(3)
    content = zipped(files, method=method)
    server.put(zipped(cases(1, "mri")), MRI)
    for how in ways.split():
        server.put(damaged(content, "s0001/segmentations/liver.nii.gz", how))
        assert run(CT, MRI, out=tmp_path / how) == 1
        shown = capsys.readouterr()
        assert re.search(r"s0001\S* is left out: ", shown.err)
        assert "1 of them damaged" in shown.out
        root = tmp_path / how / CT
        assert tree(root) == wanted(files, ["s0000", "s0002"])
        assert {path.name for path in root.iterdir()} == {"lock", "meta.csv", "s0000", "s0002"}
        assert tree(tmp_path / how / MRI) == wanted(cases(1, "mri"), 1)
        server.put(content)  # it was the line, or somebody has mended it
        assert run(out=tmp_path / how) == 0
        assert tree(root) == wanted(files, 3)


def test_a_damaged_table_of_the_split_is_named(run, server, tmp_path, capsys):
    """Without it the split would be made by seed, so it is not a case that is left out."""
    server.put(damaged(zipped(cases(2), method=STORED), "meta.csv", "header"))
    assert run() == 1
    assert re.search(r"\.zip\S*: meta.csv: .*; by hand: download it", capsys.readouterr().err)


def test_a_spoilt_directory_is_no_traceback(tmp_path, monkeypatch):
    """A zip with each byte of its directory and its end spoilt, without a server for speed."""
    good = zipped({"meta.csv": b"", "ü/ct.nii.gz": b"a"})
    places = range(good.index(b"PK\x01\x02"), len(good))
    assert len(places) > 130

    def request(remote, view):
        part = content[remote.position : remote.position + len(view)]
        view[: len(part)] = part
        remote.size, remote.position = len(content), remote.position + len(part)

    monkeypatch.setattr(download.RemoteFile, "_request", request)
    for place, bits in itertools.product(places, (1, 128, 255)):
        content = good[:place] + bytes([good[place] ^ bits]) + good[place + 1 :]
        with pytest.raises(zipfile.BadZipFile, match="is not a zip file|holds no complete case"):
            download.download("", tmp_path / "x", 1)
    assert tree(tmp_path) == {}


def test_no_name_leads_out_of_the_folder(run, server, tmp_path):
    files = cases(1)
    evil = dict(files)
    for i, start in enumerate(("../../", "/", "C:\\", "..\\", "a/../../b/", "s0000/")):
        there = case(f"s{i + 1:04d}")
        evil |= {start + name: content for name, content in there.items()}
        files |= there if start not in ("C:\\", "..\\") else {}
    masks = "s0000/segmentations"
    names = ["s0000/../../evil/ct.nii.gz", f"{masks}/../../../liver.nii.gz", "../meta.csv"]
    evil |= dict.fromkeys([*names, f"{masks}/..\\liver.nii.gz"], b"evil")
    server.put(zipped(evil))
    assert run(out=tmp_path / "a/b/c/data") == 0
    assert tree(tmp_path / "a/b/c/data" / CT) == wanted(files, 7)
    assert all(f"a/b/c/data/{CT}" in str(path) for path in tmp_path.rglob("*.*"))


def test_a_full_disk(run, tmp_path, monkeypatch, capsys):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(download, "write", mock.Mock(side_effect=full))
    assert run() == 1
    assert "No space left on device; repeat the command to continue" in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_a_dry_run_asks_nothing(run, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    names = list(download.DATA_SETS)
    assert run(*names, "--cases", "3", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"at most (\d+) cases", shown) == ["3", "3", "3", "6"]
    assert f"{server.url}/{ZIPS[MRI]}.zip\n" in shown
    assert download.main([*names, "--dry-run", "--all", "--out", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "https://zenodo.org/records/7262581/files/amos22.zip?download=1\n" in shown
    assert "records/14710732; licence: see the record's page; cite: Akinci" in shown
    assert re.findall(r"about ([0-9.]+) of", shown) == ["23.6", "3.2", "5.1", "24.0"]
    assert (server.agents, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("args", ["chaos", "", "--cases 0", "--cases -3", "--cases x", "--al"])
def test_bad_input(args, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        download.main([*([AMOS22] if "-" in args else []), *args.split(), "--dry-run"])
    assert "error: " in capsys.readouterr().err


def test_help_begins_with_a_line_to_paste_and_needs_no_utf_8(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="^0$"):
        download.main(["--help"])
    stream.seek(0)
    lines = [line.strip() for line in stream.read().splitlines()]
    assert lines[0].startswith("usage: python -m scripts.download DATA_SET [DATA_SET ")
    [command] = [line for line in lines[1:] if line.startswith("python -m scripts.download ")]
    assert download.main([*shlex.split(command)[3:], "--dry-run"]) == 0
