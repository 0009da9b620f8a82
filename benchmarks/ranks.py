"""Bytes that a rank sends in a round, beside the model's size, and a round's time on 1 and 2 ranks.

    python -m benchmarks.ranks

Linux only: it reads what passes through the loopback device, so nothing else should use that.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.compare import device_argument, settings
from fedgin import make_model
from scans.organs import ORGANS
from scans.phantom import SPACING, make_phantom
from study.hospitals import PHANTOM_SPLITS

FEW, MANY = 3, 11  # rounds; the difference leaves out the start, the test and the end
SETTINGS = ("--patch", "32", "--width", "8", "--depth", "4", "--local-steps", "20")


def write_folder(root: Path, modality: str) -> None:
    """The phantoms of a modality as files, both kidneys in the mask of the left one."""
    affine = np.diag([SPACING, SPACING, SPACING, 1])
    for index in (i for indices in PHANTOM_SPLITS.values() for i in indices):
        image, labels = make_phantom(42, modality, index)
        masks = root / modality / f"s{index:04d}/segmentations"
        masks.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(image, affine), masks.parent / f"{modality}.nii.gz")
        for organ in ORGANS:
            names = ["kidney_left", "kidney_right"] if organ == "kidneys" else [organ]
            for n, name in enumerate(names):
                mask = (labels == ORGANS.index(organ) + 1) & (n == 0)
                nifti = nibabel.Nifti1Image(mask.astype(np.uint8), affine)
                nibabel.save(nifti, masks / f"{name}.nii.gz")


def loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def run(ranks: int, rounds: int, folder: Path) -> tuple[float, int]:
    """Seconds and bytes of a run with the settings of phantoms but for the number of rounds."""
    common = ["--rounds", str(rounds), "--spacing", str(SPACING), *SETTINGS]
    common += ["--cache", str(folder / "cache")]
    sides = {m: [f"--{m}", str(folder / m)] for m in ("mri", "ct")}
    if ranks == 1:
        arm = ["--scenario", "complete", "--arms", "fedgin", "--gin-probability", "1"]
        commands = [["fedgin.py", *arm, *sides["mri"], *sides["ct"]]]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
        commands = [
            [*torchrun, str(rank), "-m", "scripts.multisite", *side]
            for rank, side in enumerate(sides.values())
        ]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    before, began = loopback_bytes(), time.perf_counter()
    processes = []
    for rank, command in enumerate(commands):
        args = [
            sys.executable,
            *command,
            *common,
            "--out",
            str(folder / f"{ranks}-{rounds}-{rank}"),
        ]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(args, env=environment, **pipes))
    for process in processes:
        _, error = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(process.args)} failed:\n{error[-4000:]}")
    return time.perf_counter() - began, loopback_bytes() - before


def main() -> None:
    device = device_argument(__doc__)
    model = make_model(settings(), 0, device)
    size = sum(w.numel() * w.element_size() for w in model.state_dict().values())
    print(f"model: {size / 1e6:.3f} MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for modality in ("mri", "ct"):
            write_folder(folder, modality)
        for ranks in (1, 2):
            (few, sent_few), (many, sent_many) = (run(ranks, n, folder) for n in (FEW, MANY))
            seconds = (many - few) / (MANY - FEW)
            sent = (sent_many - sent_few) / (MANY - FEW) / ranks
            print(
                f"{ranks} ranks: {seconds:.2f} s a round, {sent / 1e6:.3f} MB sent by a rank in a "
                f"round, {sent / size:.2f} of the model's size",
                flush=True,
            )


if __name__ == "__main__":
    main()
