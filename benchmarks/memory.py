"""Peak memory as the same 512 cases are split over 2, 64 and 512 hospitals, or trained 16 rounds.

python -m benchmarks.memory [--device cuda]
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import data
import fedgin
from arms import ARMS
from benchmarks.compare import device_argument, in_processes, peak_memory, settings
from cache import CachedVolume, write_entry
from datasets import Case
from federated import federated_rounds
from hospitals import Hospital
from phantom import phantom

CASES, REPEATS = 512, 2
LAYOUTS = ((2, 1), (64, 1), (512, 1), (2, 16))  # hospitals, rounds


def write_cases(folder: Path) -> None:
    """CASES phantoms in the form in which preprocessed scans are cached."""
    for index in range(CASES):
        image, labels = phantom(0, "ct", index)
        image = data.normalize(image, "ct")
        volume = data.make_volume(str(index), "ct", image, labels, np.ones(6, bool))
        write_entry(folder / str(index), volume)


def train(folder: Path, hospitals: int, rounds: int, device: torch.device) -> dict:
    """As many steps in all, whatever the number of hospitals and rounds."""
    steps = str(CASES // hospitals // rounds)
    config = settings("--scenario", "complete", "--local-steps", steps)
    case = Case("file", str(folder), "", "ct", "", folder, {})
    volumes = [
        CachedVolume(folder / str(i), case._replace(id=str(i)), np.ones(6, bool), write_cases)
        for i in range(CASES)
    ]
    split = [
        Hospital(f"hospital {k}", "ct", volumes[k::hospitals], [], []) for k in range(hospitals)
    ]
    clients = fedgin.make_clients(config, 0, ARMS["ct-only+gin"], split, device)
    model = fedgin.make_model(config, 0, device)
    for _ in federated_rounds(model, clients, rounds, lambda _: config.lr):
        pass
    cuda = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    return {"host": peak_memory(), "device": cuda}


def main() -> None:
    if len(sys.argv) > 3:
        folder, hospitals, rounds, device = sys.argv[1:]
        found = train(Path(folder), int(hospitals), int(rounds), torch.device(device))
        print(json.dumps(found))
        return
    device = device_argument(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder))
        sides = {
            f"{k} hospitals, {r} rounds": [folder, str(k), str(r), device.type] for k, r in LAYOUTS
        }
        found = in_processes("benchmarks.memory", sides, REPEATS)
    for place in ("host", "device") if device.type == "cuda" else ("host",):
        base = None
        for what, runs in found.items():
            peaks = [run[place] for run in runs]
            base = base or np.median(peaks)
            spread = f"{min(peaks):.1f} … {max(peaks):.1f}"
            change = np.median(peaks) / base - 1
            print(f"{what}: {place} {np.median(peaks):.1f} MB ({spread}), {change:+.1%}")


if __name__ == "__main__":
    main()
