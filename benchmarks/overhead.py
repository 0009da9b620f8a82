"""A federated round with its checkpoint, beside the bare training steps.

python -m benchmarks.overhead [--device cuda]
"""

import tempfile
from pathlib import Path

import torch

import fedgin
from benchmarks.compare import alternate, device_argument, phantom_hospitals, report, settings
from data import patches
from evaluate import mixed_precision
from federated import federated_rounds, train_locally


def main() -> None:
    device = device_argument(__doc__)
    for sites in (1, 4):
        config = settings("--sites", str(sites), "--scenario", "complete")
        hospitals = {h.name: h.train for h in phantom_hospitals(config)}
        n_k = {name: len(cases) for name, cases in hospitals.items()}
        model = fedgin.make_model(config, 0, device)
        drawn = {}
        for name, cases in hospitals.items():
            found = patches(
                cases, config.patch, config.batch_size, config.local_steps, torch.Generator()
            )
            drawn[name] = [(x.to(device), (y.to(device), k.to(device))) for x, y, k in found]
        losses = {n: fedgin.segmentation_loss(c, config, device) for n, c in hospitals.items()}
        autocast = mixed_precision(device)

        def train(name, _, drawn=drawn, losses=losses, model=model, autocast=autocast):
            return train_locally(model, drawn[name], losses[name], lr=1e-3, autocast=autocast)

        with tempfile.TemporaryDirectory() as folder:

            def federated(model=model, n_k=n_k, folder=folder, train=train):
                for _ in federated_rounds(model, n_k, train, rounds=1):
                    weights = {key: w.cpu().clone() for key, w in model.state_dict().items()}
                    state = {"weights": weights, "best": {"weights": weights}}
                    fedgin.save(Path(folder) / "checkpoint.pt", state)

            def bare(n_k=n_k, train=train):
                for name in n_k:
                    train(name, 1)

            times = alternate({"federated": federated, "bare steps": bare}, device, repeats=7)
        report(f"{len(n_k)} hospitals", times)


if __name__ == "__main__":
    main()
