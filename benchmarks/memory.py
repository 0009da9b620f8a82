"""Peak memory for 512 cases divided among 2, 64 and 512 hospitals, and for 16 rounds of 2.

    python -m benchmarks.memory [--device cuda]

Every setting trains the same number of steps. Linux only: it reads /proc.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.compare import in_processes, parse, phantom_clients
from federated import federated_rounds

CASES, REPEATS = 512, 2
SETTINGS = ((2, 1), (64, 1), (512, 1), (2, 16))  # hospitals, rounds


def train(hospitals: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Train CASES steps in all; return the peak memory in MB on the host and on the device."""
    steps = CASES // hospitals // rounds
    model, clients = phantom_clients(CASES, hospitals, device, p=1.0, steps=steps)
    for _ in federated_rounds(model, clients, rounds, lambda _: 4e-3):
        pass
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    host = int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 2**10
    cuda = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    return {"host": host, "device": cuda}


def main() -> None:
    if len(sys.argv) > 3:
        hospitals, rounds, device_name = sys.argv[1:]
        print(json.dumps(train(int(hospitals), int(rounds), torch.device(device_name))))
        return
    device = parse(__doc__).device
    sides = {f"{k} hospitals, {r} rounds": [str(k), str(r), device.type] for k, r in SETTINGS}
    results = in_processes("benchmarks.memory", sides, REPEATS)
    for place in ("host", "device") if device.type == "cuda" else ("host",):
        first = None
        for title, runs in results.items():
            peaks = [run[place] for run in runs]
            median = statistics.median(peaks)
            first = first or median
            ends = f"{min(peaks):.1f} … {max(peaks):.1f}"
            print(f"{title}: {place} {median:.1f} MB ({ends}), {median / first - 1:+.1%}")


if __name__ == "__main__":
    main()
