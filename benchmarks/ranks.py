"""Bytes that a rank sends in a round, beside the model's size, and a round's time on 1 and 2 ranks.

    python -m benchmarks.ranks

Linux only: it reads what passes through the loopback device, so nothing else should use that.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.compare import device_argument, settings
from fedgin import make_model

FEW, MANY = 3, 11  # rounds; the difference leaves out the start, the test and the end


def loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def run(ranks: int, rounds: int, folder: str) -> tuple[float, int]:
    """Seconds and bytes of a run with default settings but for the number of rounds."""
    out = f"{folder}/{ranks}-{rounds}"
    words = ["fedgin.py", "--arms", "fedgin", "--rounds", str(rounds), "--out", out]
    command = [sys.executable, *words]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, *words]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    before, began = loopback_bytes(), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return time.perf_counter() - began, loopback_bytes() - before


def main() -> None:
    device = device_argument(__doc__)
    model = make_model(settings(), 0, device)
    size = sum(w.numel() * w.element_size() for w in model.state_dict().values())
    print(f"model: {size / 1e6:.3f} MB")
    with tempfile.TemporaryDirectory() as folder:
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
