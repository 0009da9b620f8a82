"""Fetch some cases of the public data sets out of their zip files, by HTTP range requests.

    python download.py totalsegmentator-ct totalsegmentator-mri --cases 40 --out data

The others are totalsegmentator-ct-small and amos22. Each gets a folder in the layout that
datasets.py reads; the same command again goes on where it stopped.
"""

import argparse
import hashlib
import http.client
import io
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from tqdm import tqdm

DATA_SETS = {  # Zenodo's record, zip file, flag of fedgin.py, scans in the zip, its size in GB
    "totalsegmentator-ct": (10047292, "Totalsegmentator_dataset_v201", "ct", 1228, 23.6),
    "totalsegmentator-ct-small": (10047263, "Totalsegmentator_dataset_small_v201", "ct", 102, 3.2),
    "totalsegmentator-mri": (14710732, "TotalsegmentatorMRI_dataset_v200", "mri", 616, 5.1),
    "amos22": (7262581, "amos22", "test", 600, 24),
}
TERMS = {  # licence, what to cite, the file about all cases
    "ct": ("CC BY 4.0", "Wasserthal et al. 2023, doi:10.1148/ryai.230024", "meta.csv"),
    "mri": ("see there", "Akinci D'Antonoli et al. 2025, doi:10.1148/radiol.241613", "meta.csv"),
    "test": ("CC BY 4.0", "Ji et al. 2022, arXiv:2206.08023", "dataset.json"),
}
# What is taken, by the end of its name: a folder may stand before it, and none is led out of.
TOTALSEGMENTATOR = r"(?:.*/)?((?P<id>s[0-9]{4})/(?:ct|mri|segmentations/[^/]+)\.nii\.gz|meta\.csv)"
AMOS22 = r"(?:.*/)?((?:images|labels)(?:Tr|Va)/(?P<id>amos_[0-9]{4})\.nii\.gz|dataset\.json)"
MASKS = ("gallbladder", "kidney_left", "kidney_right", "liver", "pancreas", "spleen")
EMPTY = 256  # bytes that a mask of some hundred voxels has, compressed, above an empty one
BLOCK = 2**18  # bytes to ask for at least, so that neighbours come together: servers count requests
CHUNK = 2**24  # bytes to read at once
WAITS = (1, 3, 10, 30, 60)  # seconds before the next try
PARTIAL = ".partial-"  # how temporary folders begin
AGENT = "FedGIN-download/1 (https://arxiv.org/abs/2508.05137)"  # Zenodo refuses libraries' names

Members = dict[str, zipfile.ZipInfo]  # by their paths in the data set's folder


class DownloadError(Exception):
    """What ends the download; the message says what to do."""


class RemoteFile(io.RawIOBase):
    """A seekable file on a web server: what is read is asked for, and nothing else."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version: tuple | None = None
        self.position = self.fetched = 0
        self.size = 1  # until the first answer tells it
        self.readinto(bytearray(1))

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer, or what the file has of it; DownloadError if WAITS are not enough."""
        start, end = self.position, min(self.position + len(buffer), self.size)
        waits = iter(WAITS)
        while self.position < end:
            try:
                self._request(memoryview(buffer)[self.position - start : end - start])
            except (OSError, http.client.HTTPException) as error:
                self._wait(error, next(waits, None))
        return self.position - start

    def _request(self, view: memoryview) -> None:
        """Ask for as many bytes as the view has; what arrives moves the position on."""
        wanted = f"bytes={self.position}-{self.position + len(view) - 1}"
        headers = {"Range": wanted, "User-Agent": AGENT}
        request = urllib.request.Request(self.url, headers=headers)
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
            while view:
                n = response.readinto(view)
                if not n:
                    raise ConnectionError("the connection was closed too early")
                self.position, self.fetched, view = self.position + n, self.fetched + n, view[n:]

    def _wait(self, error: Exception, seconds: int | None) -> None:
        """Wait before the next try, as long as the server asks for if it does."""
        if isinstance(error, HTTPError):
            asked = error.headers.get("Retry-After", "")
            if error.code < 500 and error.code not in (408, 429):
                seconds = None
            elif seconds is not None and asked.isdecimal():
                seconds = min(int(asked), 3600)
        if seconds is None:
            raise DownloadError(str(error)) from error
        tqdm.write(f"download.py: {error}; next try in {seconds} s", file=sys.stderr)
        time.sleep(seconds)


def find_cases(archive: zipfile.ZipFile, pattern: str) -> tuple[Members, dict[str, Members]]:
    """The file about all cases, and the complete cases in the order in which everybody takes them.

    Cases with most organs come first. A mask that is no larger, compressed, than the smallest of
    its case's 50 and more is empty; the labels of AMOS22 do not tell. Equals are shuffled.
    """
    cases: dict[str, Members] = {"": {}}
    smallest: dict[str, int] = {}
    for info in sorted(archive.infolist(), key=lambda info: (len(info.filename), info.filename)):
        if match := re.fullmatch(pattern, info.filename):
            id_, path = match["id"] or "", Path(match[1])
            if path.parent.name == "segmentations":
                smallest[id_] = min(info.compress_size, smallest.get(id_, info.compress_size))
                if path.name.removesuffix(".nii.gz") not in MASKS:
                    continue
            cases.setdefault(id_, {}).setdefault(match[1], info)  # of two, the shorter name's

    def rank(id_: str) -> tuple[int, bytes]:
        masks = [info for path, info in cases[id_].items() if "/segmentations/" in path]
        organs = sum(mask.compress_size > smallest[id_] + EMPTY for mask in masks)
        return -organs, hashlib.sha256(id_.encode()).digest()

    about = cases.pop("")
    complete = [i for i, files in cases.items() if len(files) == (2 if i[0] == "a" else 7)]
    return about, {id_: cases[id_] for id_ in sorted(complete, key=rank)}


def fetch(archive: zipfile.ZipFile, members: Members, root: Path) -> None:
    """Put members into a folder once all of them are here and whole, a case's scan last."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=root) as folder:
        partial = Path(folder)
        for path, info in sorted(members.items(), key=lambda item: item[1].header_offset):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, open(partial / path, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK)  # to the end, where zipfile checks the CRC
        for path in sorted(members, reverse=True):  # segmentations, ct; labelsTr, imagesTr
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).replace(root / path)


def download(url: str, root: Path, number: int) -> bool:
    """Fetch what the folder of a data set lacks; False if some of it is damaged."""
    remote = RemoteFile(url)
    archive = zipfile.ZipFile(io.BufferedReader(remote, BLOCK))
    amos = root.name == "amos22"
    about, cases = find_cases(archive, AMOS22 if amos else TOTALSEGMENTATOR)
    if not cases:
        raise DownloadError("the zip holds no complete case")
    mri = [id_ for id_ in cases if amos and id_ > "amos_0500"]
    chosen = [id_ for id_ in cases if id_ not in mri][:number] + mri[:number]
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{PARTIAL}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    damaged = 0
    wanted = [about, *(cases[id_] for id_ in chosen)]
    for members in tqdm(wanted, desc=root.name, unit="case", disable=None):
        lacking = {path: info for path, info in members.items() if not (root / path).exists()}
        try:
            if lacking:
                fetch(archive, lacking, root)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            tqdm.write(f"download.py: {root / min(lacking)} is left out: {error}", file=sys.stderr)
            damaged += 1
    print(f"  {len(chosen)} of {len(cases)} cases, {damaged} of them damaged and left out")
    print(f"  {remote.fetched:,} of {remote.size:,} bytes fetched")
    return not damaged


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
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
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        parser.error(f"--mirror {args.mirror}: must begin with http:// or https://")
    return args


def run(args: argparse.Namespace) -> bool:
    """Fetch the data sets in turn and say how to go on; False if some of it is damaged."""
    folders: dict[str, list[str]] = {"ct": [], "mri": [], "test": []}
    whole = True
    for name in dict.fromkeys(args.names):
        record, file, flag, scans, gigabytes = DATA_SETS[name]
        licence, citation, about = TERMS[flag]
        root = args.out / name
        folders[flag].append(shlex.quote(str(root)))
        page = f"https://zenodo.org/records/{record}"
        url = f"{page}/files/{file}.zip?download=1"
        url = f"{args.mirror.rstrip('/')}/{file}.zip" if args.mirror else url
        number = scans if args.all else args.cases
        n = min(scans, 2 * number if flag == "test" else number)
        print(f"{name}: {page}; licence: {licence}; cite: {citation}\n  from {url}")
        size = f"about {n / scans * gigabytes:.1f} of {gigabytes} GB"
        print(f"  at most {n} cases, {size}, to {root}", flush=True)
        try:
            whole &= args.dry_run or download(url, root, number)
        except (DownloadError, zipfile.BadZipFile) as error:
            by_hand = f"download it, and unpack it so that {root / about} is there"
            raise DownloadError(f"{url}: {error}. By hand: {by_hand}") from error
    ct, mri, test = (" ".join(names) for names in folders.values())
    print(f"Next:\n  python check.py {' '.join(filter(None, (ct, mri, test)))}")
    command = f"python fedgin.py --scenario complete --ct {ct or 'DIR'} --mri {mri or 'DIR'}"
    print(f"  {command}{f' --test {test}' if test else ''}")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if something could not be had, 130 if it was stopped."""
    args = parse(argv)
    try:
        return 0 if run(args) else 1
    except KeyboardInterrupt:
        print("\ndownload.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    except (DownloadError, OSError) as error:
        print(f"download.py: {error}", file=sys.stderr)
        print("What is whole is kept; the same command goes on.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
