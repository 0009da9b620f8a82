"""Fetch cases of the public data sets out of their zip files, by HTTP range requests.

    python -m scripts.download totalsegmentator-ct totalsegmentator-mri --cases 40 --out data

The same command continues where it was stopped.
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
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scans.files import DataError, lock, write
from study.config import new_parser
from study.console import run_command, use_any_characters

DATA_SETS = {  # Zenodo's record, zip file, flag of fedgin.py, scans in the zip, its size in GB
    "totalsegmentator-ct": (10047292, "Totalsegmentator_dataset_v201", "ct", 1228, 23.6),
    "totalsegmentator-ct-small": (10047263, "Totalsegmentator_dataset_small_v201", "ct", 102, 3.2),
    "totalsegmentator-mri": (14710732, "TotalsegmentatorMRI_dataset_v200", "mri", 616, 5.1),
    "amos22": (7262581, "amos22", "test", 600, 24),
}
TERMS = {
    "ct": "CC BY 4.0; cite: Wasserthal et al. 2023, doi:10.1148/ryai.230024",
    "mri": "see the record's page; cite: Akinci D'Antonoli et al. 2025, doi:10.1148/radiol.241613",
    "test": "CC BY 4.0; cite: Ji et al. 2022, arXiv:2206.08023",
}
# What is taken from a zip. Group 1 is the path in the folder, so that no name leads out of it.
MASKS = "gallbladder|kidney_left|kidney_right|liver|pancreas|spleen"
TOTALSEGMENTATOR = r"(?:.*/)?((?P<id>s[0-9]{4})/(?:ct|mri|segmentations/[^/]+)\.nii\.gz|meta\.csv)"
AMOS22 = r"(?:.*/)?((?:images|labels)(?:Tr|Va)/(?P<id>amos_[0-9]{4})\.nii\.gz|dataset\.json)"
BLOCK = 2**18  # bytes to request at least, because servers count requests
CHUNK = 2**24  # bytes to request at most; larger files on disk are compared by size only
WAITS: tuple[int, ...] = (1, 3, 10, 30, 60)  # seconds before the next try
HIDDEN = ".download"  # the folder of files that are not complete yet
AGENT = "FedGIN-download/1 (https://arxiv.org/abs/2508.05137)"  # Zenodo refuses libraries' names
# What zipfile raises for a file that is damaged, has a password or is packed in an unknown way.
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)
Members = dict[str, zipfile.ZipInfo]  # by their paths in the data set's folder


class RemoteFile(io.RawIOBase):
    """A seekable file on a web server; only what is read is fetched."""

    def __init__(self, url: str) -> None:
        self.url, self.position, self.fetched = url, 0, 0
        self.size = 1  # until the first answer tells it
        self.readinto(bytearray(1))

    readable = seekable = lambda _: True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as the file goes. Raises HTTPException: zipfile hides OSErrors."""
        start, tries = self.position, 0
        view = memoryview(buffer)[: max(self.size - start, 0)]
        while rest := view[self.position - start :][:CHUNK]:
            try:
                self._request(rest)
                tries = 0
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._wait(error, tries)
                tries += 1
        return len(view)

    def _request(self, view: memoryview) -> None:
        """Request as many bytes as fit, and advance the position by those that arrive."""
        span = f"bytes={self.position}-{self.position + len(view) - 1}"
        request = urllib.request.Request(self.url, headers={"Range": span, "User-Agent": AGENT})
        with urllib.request.urlopen(request, timeout=60) as response:
            pattern = rf"bytes {self.position}-([0-9]+)/([0-9]+)"
            sent = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
            if response.status != 206 or not sent or int(sent[1]) < self.position:
                raise ConnectionError("the server does not send parts of a file")
            self.size = int(sent[2])
            view = view[: int(sent[1]) + 1 - self.position]
            n = response.readinto(view)
        self.position, self.fetched = self.position + n, self.fetched + n
        if n < len(view):
            raise ConnectionError("the connection was closed too early")

    def _wait(self, error: Exception, tries: int) -> None:
        """Wait before the next try, as long as the server asks for; raise if there is none."""
        reason, asked, waits = getattr(error, "reason", error), "", WAITS
        if isinstance(error, urllib.error.HTTPError):
            reason, asked = error, error.headers.get("Retry-After", "")
            waits = WAITS if error.code >= 500 or error.code in (408, 429) else ()
        elif not self.fetched and not isinstance(reason, ConnectionResetError):
            waits = WAITS[:1]  # nobody has answered yet, so the address may well be wrong
        if tries >= len(waits):
            raise http.client.HTTPException(str(reason)) from error
        seconds = min(int(asked), 3600) if asked.isdecimal() else waits[tries]
        tqdm.write(f"download: {reason}; next try in {seconds} s", file=sys.stderr)
        time.sleep(seconds)


def find_cases(archive: zipfile.ZipFile, amos: bool) -> tuple[Members, dict[str, Members]]:
    """Return the metadata file, and the complete cases in an order that is the same for everyone.

    Cases with most organs come first, and a hash orders equals. A mask counts as empty if it has at
    most 256 bytes more, compressed, than the smallest of its case. AMOS22's labels do not show it.
    """
    cases: dict[str, Members] = {"": {}}
    for info in sorted(archive.infolist(), key=lambda info: (len(info.filename), info.filename)):
        if match := re.fullmatch(AMOS22 if amos else TOTALSEGMENTATOR, info.filename):
            cases.setdefault(match["id"] or "", {}).setdefault(match[1], info)  # the shortest name
    metadata, ranked = cases.pop(""), []
    for id_, members in cases.items():
        sizes = {name: i.compress_size for name, i in members.items() if "/segmentations/" in name}
        masks = [name for name in sizes if re.search(rf"/({MASKS})\.", name)]
        organs = sum(sizes[name] > min(sizes.values()) + 256 for name in masks)
        wanted = {name: i for name, i in members.items() if name in masks or name not in sizes}
        if len(wanted) == (2 if amos else 7):
            ranked.append((-organs, hashlib.sha256(id_.encode()).digest(), id_, wanted))
    return metadata, {id_: wanted for _, _, id_, wanted in sorted(ranked)}


def fetch(archive: zipfile.ZipFile, members: Members, root: Path) -> None:
    """Put members into a folder once all of them are whole and on the disk, a case's scan last."""
    for path, info in sorted(members.items(), key=lambda item: item[1].header_offset):
        write(root / HIDDEN / path, archive.read(info))  # zipfile checks the CRC
    for path in sorted(members, reverse=True):  # segmentations, ct; labelsTr, imagesTr
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / HIDDEN / path).replace(root / path)


def download(url: str, root: Path, number: int) -> bool:
    """Fetch what the folder of a data set lacks; False if a case is damaged in the zip."""
    remote, amos, damaged = RemoteFile(url), root.name == "amos22", 0
    try:
        archive = zipfile.ZipFile(io.BufferedReader(remote, BLOCK))
    except (*DAMAGED, OSError) as error:  # OSError: seeks before the beginning
        raise zipfile.BadZipFile(f"is not a zip file, or is damaged ({error})") from error
    metadata, cases = find_cases(archive, amos)
    if not cases:
        raise zipfile.BadZipFile("the zip holds no complete case")
    mri = [id_ for id_ in cases if amos and id_ > "amos_0500"]
    chosen = [id_ for id_ in cases if id_ not in mri][:number] + mri[:number]
    with lock(root / "lock") as held:
        if not held:
            raise DataError(f"{root}: another process is at work; wait, or choose another --out")
        parts = [metadata, *(cases[id_] for id_ in chosen)]
        there = {root / n: i for part in parts for n, i in part.items() if (root / n).exists()}
        for path, info in there.items():
            large = path.stat().st_size == info.file_size > CHUNK
            if not large and zlib.crc32(path.read_bytes()) != info.CRC:
                raise DataError(f"{path}: differs from the zip; delete it, or choose another --out")
        for part in tqdm(parts, desc=root.name, unit="case", disable=None):
            lacking = {name: info for name, info in part.items() if root / name not in there}
            try:
                fetch(archive, lacking, root)
            except DAMAGED as error:
                if part is metadata:
                    raise zipfile.BadZipFile(f"{min(lacking)}: {error}") from error
                damaged += 1
                tqdm.write(f"download: {root / min(lacking)} is left out: {error}", file=sys.stderr)
            finally:
                shutil.rmtree(root / HIDDEN, ignore_errors=True)
    print(f"  {len(chosen)} of {len(cases)} cases, {damaged} of them damaged and left out")
    print(f"  {remote.fetched:,} of {remote.size:,} bytes fetched")
    return not damaged


def run(args: argparse.Namespace) -> int:
    """Fetch the data sets in turn and say how to continue; 1 if a case is damaged."""
    folders, whole = {"ct": "", "mri": "", "test": ""}, True
    for name in dict.fromkeys(args.names):
        record, file, flag, scans, gb = DATA_SETS[name]
        root, page = args.out / name, f"https://zenodo.org/records/{record}"
        url = f"{page}/files/{file}.zip?download=1"
        url = f"{args.mirror.rstrip('/')}/{file}.zip" if args.mirror else url
        folders[flag] += f" {shlex.quote(str(root))}"
        number = scans if args.all else args.cases
        n = min(scans, 2 * number if flag == "test" else number)
        print(f"{name}: {page}; licence: {TERMS[flag]}\n  from {url}")
        print(f"  at most {n} cases, about {n / scans * gb:.1f} of {gb} GB, to {root}", flush=True)
        try:
            whole &= args.dry_run or download(url, root, number)
        except (http.client.HTTPException, zipfile.BadZipFile) as error:
            metadata = root / ("dataset.json" if flag == "test" else "meta.csv")
            by_hand = f"by hand: download it, and unpack it so that {metadata} is there"
            raise OSError(f"{url}: {error}; {by_hand}") from error
    print(f"Next:\n  python -m scripts.check{''.join(folders.values())}")
    ct, mri = folders["ct"] or " DIR", folders["mri"] or " DIR"
    test = folders["test"] and f" --test{folders['test']}"
    print(f"  python fedgin.py --scenario complete --ct{ct} --mri{mri}{test} --skip-bad")
    return int(not whole)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if something could not be fetched, 2 for bad input."""
    use_any_characters()
    parser = new_parser(__doc__, "python -m scripts.download DATA_SET [DATA_SET …] [options]")
    add, text = parser.add_argument, "number of cases per modality (default: 40)"
    add("names", nargs="+", choices=DATA_SETS, metavar="DATA_SET", help="out of %(choices)s")
    add("--cases", type=int, default=40, metavar="N", help=text)
    add("--all", action="store_true", help="all cases that have labels")
    text = "folder for the data sets, each in a folder of its name (default: data)"
    add("--out", type=Path, default="data", metavar="DIR", help=text)
    add("--mirror", metavar="URL", help="fetch the zip files from this folder instead of Zenodo")
    add("--dry-run", action="store_true", help="only say what would be fetched")
    args = parser.parse_args(argv)
    if args.cases < 1:
        parser.error(f"--cases {args.cases}: must be 1 or more")
    return run_command("download", lambda: run(args), "; repeat the command to continue")


if __name__ == "__main__":
    sys.exit(main())
