"""Federated rounds beside the same model, data and steps in a Flower simulation.

    python -m benchmarks.federation [--device cuda]

Each side is a process of its own, started anew for each measurement; its memory is that of all
processes which it starts. Flower may train two hospitals at a time, with a thread each.
"""

import itertools
import json
import sys
import time

import torch

import fedgin
from benchmarks.compare import device_argument, in_processes, phantom_hospitals, report, settings
from data import patches
from evaluate import mixed_precision
from federated import federated_rounds, train_locally

ROUNDS = 3


def prepare(hospitals: int, device_name: str):
    """The model and a function that trains it at hospital k in a round: the same for both sides."""
    config = settings("--sites", str(hospitals // 2), "--scenario", "complete")
    cases = [hospital.train for hospital in phantom_hospitals(config)]
    device = torch.device(device_name)
    model = fedgin.make_model(config, 0, device)

    def train(k: int, round_: int) -> float:
        loss = fedgin.segmentation_loss(cases[k], config, device)
        draws = fedgin.generator(0, round_, k)
        drawn = patches(cases[k], config.patch, config.batch_size, config.local_steps, draws)
        batches = ((x.to(device), (y.to(device), known.to(device))) for x, y, known in drawn)
        autocast = mixed_precision(device)
        return train_locally(model, batches, loss, lr=config.lr, autocast=autocast)

    return model, train, [len(c) for c in cases]


def ours(hospitals: int, device: str) -> list[float]:
    """Seconds of each round."""
    model, train, n_k = prepare(hospitals, device)
    ends = [time.perf_counter()]
    by_name = {str(k): n for k, n in enumerate(n_k)}
    for _ in federated_rounds(model, by_name, lambda name, r: train(int(name), r), ROUNDS):
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
        model, train, n_k = kept["it"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        k = int(context.node_config["partition-id"])
        loss = train(k, int(message.content["config"]["server-round"]))
        metrics = MetricRecord({"loss": loss, "num-examples": n_k[k]})
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
