"""Fetch some cases of the public data sets out of their zip files, by HTTP range requests.

    python -m scripts.download totalsegmentator-ct totalsegmentator-mri --cases 40 --out data

The others are totalsegmentator-ct-small and amos22. Each gets a folder as fedgin.py reads it. The
same command again goes on where it stopped, and mends files that were cut off since.
"""

import argparse
import hashlib
import http.client
import io
import re
import shlex
import shutil
import struct
import sys
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from tqdm import tqdm

from scans import files
from scans.files import DataError
from study.console import run_command, use_any_characters

DATA_SETS = {  # Zenodo's record, zip file, flag of fedgin.py, scans in the zip, its size in GB
    "totalsegmentator-ct": (10047292, "Totalsegmentator_dataset_v201", "ct", 1228, 23.6),
    "totalsegmentator-ct-small": (10047263, "Totalsegmentator_dataset_small_v201", "ct", 102, 3.2),
    "totalsegmentator-mri": (14710732, "TotalsegmentatorMRI_dataset_v200", "mri", 616, 5.1),
    "amos22": (7262581, "amos22", "test", 600, 24),
}
TERMS = {  # licence, what to cite
    "ct": ("CC BY 4.0", "Wasserthal et al. 2023, doi:10.1148/ryai.230024"),
    "mri": ("see the record's page", "Akinci D'Antonoli et al. 2025, doi:10.1148/radiol.241613"),
    "test": ("CC BY 4.0", "Ji et al. 2022, arXiv:2206.08023"),
}
# What is taken, by the end of its name: a folder may stand before it, and none is led out of.
MASKS = "gallbladder|kidney_left|kidney_right|liver|pancreas|spleen"
TOTALSEGMENTATOR = r"(?:.*/)?((?P<id>s[0-9]{4})/(?:ct|mri|segmentations/[^/]+)\.nii\.gz|meta\.csv)"
AMOS22 = r"(?:.*/)?((?:images|labels)(?:Tr|Va)/(?P<id>amos_[0-9]{4})\.nii\.gz|dataset\.json)"
EMPTY = 256  # bytes that a mask of some hundred voxels has, compressed, above an empty one
BLOCK = 2**18  # bytes to ask for at least, so that neighbours come together: servers count requests
CHUNK = 2**24  # bytes to read at once; of larger files that are here only the size is compared
WAITS: tuple[int, ...] = (1, 3, 10, 30, 60)  # seconds before the next try
AGENT = "FedGIN-download/1 (https://arxiv.org/abs/2508.05137)"  # Zenodo refuses libraries' names
MIRROR = r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?"
# What zipfile raises for what is damaged, has a password or is packed in a way unknown to it.
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)

Members = dict[str, zipfile.ZipInfo]  # by their paths in the data set's folder


class DownloadError(Exception):
    """What keeps a zip file from being read."""


class RemoteFile(io.RawIOBase):
    """A seekable file on a web server: what is read is asked for, and nothing else."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version: tuple | None = None  # until the first answer tells it, and the size
        self.position, self.fetched, self.size = 0, 0, 1
        self.readinto(bytearray(1))

    readable = seekable = lambda _: True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer, or what the file has of it; DownloadError if no try succeeds."""
        start, tries = self.position, 0
        view = memoryview(buffer)[: max(self.size - start, 0)]
        while self.position - start < len(view):
            try:
                self._request(view[self.position - start :])
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._wait(error, tries)
                tries += 1
        return len(view)

    def _request(self, view: memoryview) -> None:
        """Ask for as many bytes as the view has; what arrives moves the position on."""
        span = f"bytes={self.position}-{self.position + len(view) - 1}"
        request = urllib.request.Request(self.url, headers={"Range": span, "User-Agent": AGENT})
        with urllib.request.urlopen(request, timeout=60) as response:
            pattern = rf"bytes {self.position}-([0-9]+)/([0-9]+)"
            part = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
            if response.status != 206 or not part or int(part[1]) < self.position:
                raise DownloadError("the server does not send parts of a file")
            version = part[2], response.headers.get("ETag", response.headers.get("Last-Modified"))
            if self.version not in (None, version):
                raise DownloadError("the file has changed on the server; use another --out")
            self.version, self.size = version, int(part[2])
            view = view[: int(part[1]) + 1 - self.position]
            n = response.readinto(view)
            self.position, self.fetched = self.position + n, self.fetched + n
            if n < len(view):
                raise ConnectionError("the connection was closed too early")

    def _wait(self, error: Exception, tries: int) -> None:
        """Wait before the next try, as long as the server asks for if it does."""
        what, asked = getattr(error, "reason", error), ""
        # Where nobody has answered yet, the address is wrong rather than busy.
        waits = WAITS if self.version or isinstance(what, ConnectionResetError) else WAITS[:1]
        if isinstance(error, HTTPError):
            what, asked = error, error.headers.get("Retry-After", "")
            waits = WAITS if error.code >= 500 or error.code in (408, 429) else ()
        if tries >= len(waits):
            raise DownloadError(str(what)) from error
        seconds = min(int(asked), 3600) if asked.isdecimal() else waits[tries]
        tqdm.write(f"download: {what}; next try in {seconds} s", file=sys.stderr)
        time.sleep(seconds)


def find_cases(archive: zipfile.ZipFile, pattern: str) -> tuple[Members, dict[str, Members]]:
    """The file about all cases, and the complete cases in the order in which everybody takes them.

    Cases with most organs come first. A mask that is no larger, compressed, than the smallest of
    its case's 50 and more is empty; the labels of AMOS22 do not tell. Equals are shuffled.
    """
    found: dict[str, Members] = {"": {}}
    for info in sorted(archive.infolist(), key=lambda info: (len(info.filename), info.filename)):
        if match := re.fullmatch(pattern, info.filename):  # of two, the shorter name's is taken
            found.setdefault(match["id"] or "", {}).setdefault(match[1], info)
    about, cases, ranks = found.pop(""), {}, {}
    for id_, members in found.items():
        masks = {name: i.compress_size for name, i in members.items() if "/segmentations/" in name}
        wanted = [name for name in masks if re.search(rf"/({MASKS})\.", name)]
        cases[id_] = {name: i for name, i in members.items() if name in wanted or name not in masks}
        organs = sum(masks[name] > min(masks.values()) + EMPTY for name in wanted)
        ranks[id_] = -organs, hashlib.sha256(id_.encode()).digest()
    complete = [i for i, members in cases.items() if len(members) == (2 if i[0] == "a" else 7)]
    return about, {id_: cases[id_] for id_ in sorted(complete, key=ranks.__getitem__)}


def find_lacking(members: Members, root: Path) -> Members:
    """Those that the folder lacks; a scan or mask that is not the zip's is moved aside."""
    lacking = {}
    for name, info in members.items():
        path = root / name
        if path.exists():
            size = path.stat().st_size
            small = size == info.file_size <= CHUNK
            if zlib.crc32(path.read_bytes()) == info.CRC if small else size == info.file_size:
                continue
            what = f"{path}: is not the zip's, but cut off, changed or of another release"
            if path.parent == root:  # the file about all cases, which tells releases apart
                raise DataError(f"{what}; choose another --out, or delete it")
            path.replace(f"{path}.old")
            tqdm.write(f"download: {what}; fetched again, it is kept as .old", file=sys.stderr)
        lacking[name] = info
    return lacking


def fetch(archive: zipfile.ZipFile, members: Members, root: Path) -> None:
    """Put members into a folder once all of them are here and whole, a case's scan last."""
    with files.temporary_folder(root) as partial:
        for path, info in sorted(members.items(), key=lambda item: item[1].header_offset):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, open(partial / path, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK)  # to the end, where zipfile checks the CRC
        for path in sorted(members, reverse=True):  # segmentations, ct; labelsTr, imagesTr
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).replace(root / path)


def download(url: str, root: Path, number: int) -> bool:
    """Fetch what the folder of a data set lacks; False if some of it is damaged in the zip."""
    remote = RemoteFile(url)
    try:
        archive = zipfile.ZipFile(io.BufferedReader(remote, BLOCK))
    except (*DAMAGED, OSError) as error:  # OSError: a place before the file's beginning
        raise DownloadError(f"is no zip file, or a damaged one ({error})") from error
    amos = root.name == "amos22"
    about, cases = find_cases(archive, AMOS22 if amos else TOTALSEGMENTATOR)
    if not cases:
        raise DownloadError("the zip holds no complete case")
    mri = [id_ for id_ in cases if amos and id_ > "amos_0500"]
    chosen = [id_ for id_ in cases if id_ not in mri][:number] + mri[:number]
    root.mkdir(parents=True, exist_ok=True)
    damaged = 0
    with files.lock(root / "lock") as held:
        if not held:
            who = files.holder(root / "lock") or "another process"
            raise DataError(f"{root}: {who} is at work there; wait for it, or choose another --out")
        parts = [find_lacking(part, root) for part in (about, *map(cases.__getitem__, chosen))]
        for lacking in tqdm(parts, desc=root.name, unit="case", disable=None):
            try:
                if lacking:
                    fetch(archive, lacking, root)
            except DAMAGED as error:
                name = root / min(lacking)
                tqdm.write(f"download: {name} is left out: {error}", file=sys.stderr)
                damaged += 1
    print(f"  {len(chosen)} of {len(cases)} cases, {damaged} of them damaged and left out")
    print(f"  {remote.fetched:,} of {remote.size:,} bytes fetched")
    return not damaged


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python -m scripts.download DATA_SET [DATA_SET …] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="+", choices=DATA_SETS, metavar="DATA_SET")
    text = "how many, of amos22 in each modality (default: 40)"
    parser.add_argument("--cases", type=int, default=40, metavar="N", help=text)
    parser.add_argument("--all", action="store_true", help="all cases that have labels")
    parser.add_argument("--out", type=Path, default="data", metavar="DIR", help="(default: data)")
    parser.add_argument("--mirror", metavar="URL", help="another folder that holds the zip files")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and end")
    args = parser.parse_args(argv)
    if args.cases < 1:
        parser.error(f"--cases {args.cases}: must be 1 or more")
    if args.mirror and not re.fullmatch(MIRROR, args.mirror):
        what = "must be as http://localhost:8000/data, in ASCII with %XX for other signs"
        parser.error(f"--mirror {args.mirror}: {what}")
    return args


def run(args: argparse.Namespace) -> int:
    """Fetch the data sets in turn and say how to go on; 1 if some of it is damaged."""
    folders: dict[str, list[str]] = {"ct": [], "mri": [], "test": []}
    whole = True
    for name in dict.fromkeys(args.names):
        record, file, flag, scans, gigabytes = DATA_SETS[name]
        root, page = args.out / name, f"https://zenodo.org/records/{record}"
        url = f"{page}/files/{file}.zip?download=1"
        url = f"{args.mirror.rstrip('/')}/{file}.zip" if args.mirror else url
        licence, citation = TERMS[flag]
        folders[flag].append(shlex.quote(str(root)))
        number = scans if args.all else args.cases
        n = min(scans, 2 * number if flag == "test" else number)
        size = f"about {n / scans * gigabytes:.1f} of {gigabytes} GB"
        print(f"{name}: {page}; licence: {licence}; cite: {citation}\n  from {url}")
        print(f"  at most {n} cases, {size}, to {root}", flush=True)
        try:
            whole &= args.dry_run or download(url, root, number)
        except DownloadError as error:
            about = root / ("dataset.json" if flag == "test" else "meta.csv")
            by_hand = f"by hand: download it, and unpack it so that {about} is there"
            raise OSError(f"{url}: {error}; {by_hand}") from error
    ct, mri, test = (" ".join(names) for names in folders.values())
    print(f"Next:\n  python -m scripts.check {' '.join(filter(None, (ct, mri, test)))}")
    command = f"python fedgin.py --scenario complete --ct {ct or 'DIR'} --mri {mri or 'DIR'}"
    print(f"  {command}{f' --test {test}' if test else ''}")
    return int(not whole)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if something could not be had, 2 for bad input."""
    use_any_characters()
    args = parse(argv)
    return run_command("download", lambda: run(args), "; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
