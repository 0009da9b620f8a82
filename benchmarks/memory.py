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
from benchmarks.compare import device_argument, in_processes, peak_memory, settings
from federated import federated_rounds
from scans.cache import CachedVolume, pack_target, write_entry
from scans.cases import PreparedCase
from scans.phantom import SPACING, make_phantom
from study.config import Training
from study.hospitals import Hospital

CASES, REPEATS = 512, 2
LAYOUTS = ((2, 1), (64, 1), (512, 1), (2, 16))  # hospitals, rounds


def write_cases(folder: Path) -> None:
    """CASES phantoms in the form in which preprocessed scans are cached."""
    for index in range(CASES):
        image, labels = make_phantom(0, "ct", index)
        image = data.normalize(image, "ct")
        volume = data.make_volume(str(index), "ct", image, labels, np.ones(6, bool))
        write_entry(folder / str(index), volume, pack_target(labels, (SPACING,) * 3), [])


def train(folder: Path, hospitals: int, rounds: int, device: torch.device) -> dict:
    """As many steps in all, whatever the number of hospitals and rounds."""
    config = settings(local_steps=CASES // hospitals // rounds)
    volumes = [CachedVolume(folder / str(i), str(i), "ct", np.ones(6, bool)) for i in range(CASES)]
    cases = [PreparedCase(volume, volume.read_target, files=[]) for volume in volumes]
    split = [Hospital(f"hospital {k}", "ct", cases[k::hospitals], [], []) for k in range(hospitals)]
    clients = fedgin.make_clients(config, Training(0, "ct-only+gin", p=1.0), split, device)
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
