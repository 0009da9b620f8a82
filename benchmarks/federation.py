"""Federated rounds beside the same model, data and steps in a Flower simulation.

    python -m benchmarks.federation [--device cuda]

Each side is a process of its own, started anew for each measurement; its memory is that of all
processes which it starts. Flower may train two hospitals at a time, with a thread each.
"""

import functools
import itertools
import json
import sys
import time

import torch

import fedgin
from benchmarks.compare import device_argument, in_processes, phantom_hospitals, report, settings
from federated import federated_rounds, train_locally
from study.config import Training
from study.inference import mixed_precision

ROUNDS = 3


def prepare(hospitals: int, device_name: str):
    """The model, who trains it, and how: the same for both sides."""
    config = settings(sites=hospitals // 2)
    device = torch.device(device_name)
    everyone = phantom_hospitals(config)
    clients = fedgin.make_clients(config, Training(0, "fl"), everyone, device)
    train = functools.partial(train_locally, autocast=mixed_precision(device))
    return fedgin.make_model(config, 0, device), clients, train, config.lr


def ours(hospitals: int, device: str) -> list[float]:
    """Seconds of each round."""
    model, clients, train, lr = prepare(hospitals, device)
    ends = [time.perf_counter()]
    for _ in federated_rounds(model, clients, ROUNDS, lambda _: lr, train=train):
        ends.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(ends)]


def flowers(hospitals: int, device: str) -> list[float]:
    """The same in a Flower simulation."""
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
        model, clients, train, lr = kept["it"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        hospital = list(clients.values())[int(context.node_config["partition-id"])]
        batches = hospital.batches(int(message.content["config"]["server-round"]))
        loss = train(model, batches, hospital.loss_function, lr=lr)
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
        side, hospitals, device = sys.argv[1:]
        seconds = {"ours": ours, "Flower": flowers}[side](int(hospitals), device)
        print(json.dumps({"rounds": seconds}))
        return
    device = device_argument(__doc__)
    for hospitals in (2, 8):
        sides = {name: [name, str(hospitals), device.type] for name in ("ours", "Flower")}
        found = in_processes("benchmarks.federation", sides, repeats=3)
        parts = {
            "a first round from nothing": lambda run: run["seconds"] - sum(run["rounds"][1:]),
            "each further round": lambda run: run["rounds"][-1],
        }
        for what, seconds in parts.items():
            pick = {name: [seconds(run) for run in runs] for name, runs in found.items()}
            report(f"{hospitals} hospitals, {what}", pick)
        pick = {name: [run["peak_mb"] for run in runs] for name, runs in found.items()}
        report(f"{hospitals} hospitals, peak memory", pick, "MB")


if __name__ == "__main__":
    main()
