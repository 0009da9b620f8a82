"""Federated rounds compared with a Flower simulation with the same model, data and steps.

    python -m benchmarks.federation [--device cuda]

Each measurement starts a new process; its memory includes that of all processes which it starts.
On the CPU, Flower trains each hospital with one thread, and several at a time if there are cores.
"""

import functools
import itertools
import json
import sys
import time

import torch

from benchmarks.compare import in_processes, parse, phantom_clients, report
from federated import federated_rounds, train_locally
from study.inference import mixed_precision

ROUNDS, LR = 3, 4e-3


def prepare(hospitals: int, device_name: str):
    """The model, its hospitals and the function that trains it, the same for both sides."""
    device = torch.device(device_name)
    train = functools.partial(train_locally, autocast=mixed_precision(device))
    return *phantom_clients(24, hospitals, device), train


def ours(hospitals: int, device: str) -> list[float]:
    """Seconds of each round."""
    model, clients, train = prepare(hospitals, device)
    ends = [time.perf_counter()]
    for _ in federated_rounds(model, clients, ROUNDS, lambda _: LR, train=train):
        ends.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(ends)]


def flower(hospitals: int, device: str) -> list[float]:
    """Seconds of each round of a Flower simulation."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, ends = ClientApp(), ServerApp(), []
    kept: dict = {}

    @client.train()
    def fit(message: Message, context: Context):
        if device == "cpu":
            torch.set_num_threads(1)
        if not kept:  # an actor keeps what it has prepared
            kept["it"] = prepare(hospitals, device)
        model, clients, train = kept["it"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        hospital = list(clients.values())[int(context.node_config["partition-id"])]
        batches = hospital.batches(int(message.content["config"]["server-round"]))
        loss = train(model, batches, hospital.loss_function, lr=LR)
        metrics = MetricRecord({"loss": loss, "num-examples": hospital.n_k})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context):
        model, *_ = prepare(hospitals, "cpu")
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=ROUNDS,
            evaluate_fn=lambda *_: ends.append(time.perf_counter()),
        )

    gpus = 0.5 if device == "cuda" else 0.0
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": gpus}}
    run_simulation(server, client, num_supernodes=hospitals, backend_config=resources)
    return [b - a for a, b in itertools.pairwise(ends)]


def main() -> None:
    if len(sys.argv) > 3:
        side, n, device_name = sys.argv[1:]
        seconds = {"ours": ours, "Flower": flower}[side](int(n), device_name)
        print(json.dumps({"rounds": seconds}))
        return
    device = parse(__doc__).device
    for hospitals in (2, 8):
        sides = {name: [name, str(hospitals), device.type] for name in ("ours", "Flower")}
        results = in_processes("benchmarks.federation", sides, repeats=3)
        parts = {  # what is measured: its unit, and how it follows from a run
            "first round, start-up included": ("s", lambda r: r["seconds"] - sum(r["rounds"][1:])),
            "each further round": ("s", lambda r: r["rounds"][-1]),
            "peak memory": ("MB", lambda r: r["peak_mb"]),
        }
        for title, (unit, part) in parts.items():
            values = {name: [part(run) for run in runs] for name, runs in results.items()}
            report(f"{hospitals} hospitals, {title}", values, unit)


if __name__ == "__main__":
    main()
