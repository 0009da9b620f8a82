"""A federated round with its checkpoint, beside the bare training steps.

python -m benchmarks.overhead [--device cuda]
"""

import functools
import tempfile

import fedgin
from benchmarks.compare import alternate, device_argument, phantom_hospitals, report, settings
from federated import federated_rounds, train_locally
from study.config import Checkpoint, Round, Training
from study.inference import mixed_precision
from study.trainings import TrainingFolder


def main() -> None:
    device = device_argument(__doc__)
    for sites in (1, 4):
        config, training = settings(sites=sites), Training(0, "fl")
        model = fedgin.make_model(config, 0, device)
        clients = fedgin.make_clients(config, training, phantom_hospitals(config), device)
        for name, client in clients.items():
            drawn = list(client.batches(1))
            clients[name] = client._replace(batches=lambda _, drawn=drawn: drawn)
        train = functools.partial(train_locally, autocast=mixed_precision(device))

        with tempfile.TemporaryDirectory() as out:
            folder = TrainingFolder(settings(out=out), "", training)

            def federated(model=model, clients=clients, folder=folder, train=train):
                for n, losses in federated_rounds(model, clients, 1, lambda _: 1e-3, train=train):
                    done = Round(n, losses, val_dice={"mri": 0.5}, seconds=1.0)
                    folder.keep_round(fedgin.keep_round(Checkpoint(), model, done))

            def bare(model=model, clients=clients, train=train):
                for client in clients.values():
                    train(model, client.batches(1), client.loss_function, lr=1e-3)

            times = alternate({"federated": federated, "bare steps": bare}, device, repeats=7)
        report(f"{len(clients)} hospitals", times)


if __name__ == "__main__":
    main()
