"""A federated round with its checkpoint, beside the bare training steps.

python -m benchmarks.overhead [--device cuda]
"""

import functools
import tempfile
from pathlib import Path

import fedgin
import results
from arms import ARMS
from benchmarks.compare import alternate, device_argument, phantom_hospitals, report, settings
from evaluate import mixed_precision
from federated import federated_rounds, train_locally


def main() -> None:
    device = device_argument(__doc__)
    for sites in (1, 4):
        config = settings("--sites", str(sites), "--scenario", "complete")
        model = fedgin.make_model(config, 0, device)
        clients = fedgin.make_clients(config, 0, ARMS["fl"], phantom_hospitals(config), device)
        for name, client in clients.items():
            drawn = list(client.batches(1))
            clients[name] = client._replace(batches=lambda _, drawn=drawn: drawn)
        train = functools.partial(train_locally, autocast=mixed_precision(device))

        with tempfile.TemporaryDirectory() as folder:

            def federated(model=model, clients=clients, folder=folder, train=train):
                for _ in federated_rounds(model, clients, 1, lambda _: 1e-3, train=train):
                    weights = {key: w.cpu().clone() for key, w in model.state_dict().items()}
                    state = {"weights": weights, "best": {"weights": weights}}
                    results.save(Path(folder) / "checkpoint.pt", state)

            def bare(model=model, clients=clients, train=train):
                for client in clients.values():
                    train(model, client.batches(1), client.loss_function, lr=1e-3)

            times = alternate({"federated": federated, "bare steps": bare}, device, repeats=7)
        report(f"{len(clients)} hospitals", times)


if __name__ == "__main__":
    main()
