"""Bytes that a rank sends in a round, beside the model's size, and a round's time on 1 and 2 ranks.

    python -m benchmarks.ranks

Linux only: it counts the bytes on the loopback device, so nothing else should use that device.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.compare import parse
from fedgin import make_model
from scans.phantom import ORGANS, SPACING, make_phantom
from study.config import Config

FEW, MANY = 3, 11  # rounds; their difference leaves out start-up, testing and the end
CASES = 24  # per modality
SETTINGS = ("--patch", "32", "--width", "8", "--depth", "4", "--local-steps", "20")


def write_folder(folder: Path, modality: str) -> None:
    """Write phantoms of a modality in nnU-Net's raw layout."""
    affine = np.diag([SPACING, SPACING, SPACING, 1])
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index in range(CASES):
        image, labels = make_phantom(42, modality, index)
        case = f"case{index:02d}"
        nibabel.save(nibabel.Nifti1Image(image, affine), folder / f"imagesTr/{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), folder / f"labelsTr/{case}.nii.gz")
    description = {
        "channel_names": {"0": modality.upper()},
        "labels": {name: label for label, name in enumerate(("background", *ORGANS))},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def commands(ranks: int, folder: Path) -> list[list[str]]:
    """What to start Python with: fedgin.py for one rank, scripts.multisite on each of two."""
    mri, ct = ["--mri", str(folder / "mri")], ["--ct", str(folder / "ct")]
    if ranks == 1:
        arm = ["--scenario", "complete", "--arms", "fedgin", "--gin-probability", "1"]
        return [["fedgin.py", *arm, *mri, *ct]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
    return [
        [*torchrun, str(rank), "-m", "scripts.multisite", *data]
        for rank, data in enumerate((mri, ct))
    ]


def run(ranks: int, rounds: int, folder: Path) -> tuple[float, int]:
    """Seconds and bytes of a run of so many rounds."""
    common = ["--rounds", str(rounds), "--spacing", str(SPACING), *SETTINGS]
    common += ["--cache", str(folder / "cache"), "--out"]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    before, began = loopback_bytes(), time.perf_counter()
    processes = []
    for rank, command in enumerate(commands(ranks, folder)):
        args = [sys.executable, *command, *common, str(folder / f"{ranks}-{rounds}-{rank}")]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(args, env=environment, **pipes))
    for process in processes:
        _, error = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(process.args)} failed:\n{error[-4000:]}")
    return time.perf_counter() - began, loopback_bytes() - before


def main() -> None:
    parse(__doc__)
    model = make_model(Config("complete"), 0)
    size = sum(w.numel() * w.element_size() for w in model.state_dict().values())
    print(f"model: {size / 1e6:.3f} MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for modality in ("mri", "ct"):
            write_folder(folder / modality, modality)
        for ranks in (1, 2):
            (few, sent_few), (many, sent_many) = (run(ranks, n, folder) for n in (FEW, MANY))
            seconds = (many - few) / (MANY - FEW)
            sent = (sent_many - sent_few) / (MANY - FEW) / ranks
            print(
                f"{ranks} ranks: {seconds:.2f} s per round, {sent / 1e6:.3f} MB sent per rank and "
                f"round, {sent / size:.2f} of the model's size",
                flush=True,
            )


if __name__ == "__main__":
    main()
