"""A federated round that writes its checkpoint, compared with the bare training steps.

python -m benchmarks.overhead [--device cuda]
"""

import functools
import tempfile
from pathlib import Path

from benchmarks.compare import alternate, parse, phantom_clients, report
from federated import federated_rounds, train_locally
from scans.files import to_pt, write
from study.inference import copy_to_cpu, mixed_precision

LR = 1e-3


def main() -> None:
    device = parse(__doc__).device
    train = functools.partial(train_locally, autocast=mixed_precision(device))
    for hospitals in (2, 8):
        model, clients = phantom_clients(24, hospitals, device)
        for name, client in clients.items():
            drawn = list(client.batches(1))
            clients[name] = client._replace(batches=lambda _, drawn=drawn: drawn)

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint.pt"

            def federated(model=model, clients=clients, checkpoint=checkpoint):
                for _ in federated_rounds(model, clients, 1, lambda _: LR, train=train):
                    write(checkpoint, to_pt(copy_to_cpu(model.state_dict())))

            def bare(model=model, clients=clients):
                for client in clients.values():
                    train(model, client.batches(1), client.loss_function, lr=LR)

            times = alternate({"federated": federated, "bare steps": bare}, device, repeats=7)
        report(f"{hospitals} hospitals", times)


if __name__ == "__main__":
    main()
