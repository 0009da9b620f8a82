"""Federated averaging: hospitals train one model together, and only its weights travel.

FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1): every round each of K
hospitals starts from the global weights w, trains locally and returns its w_k, and

    w ← Σ_k (n_k / Σ_j n_j) · w_k,   n_k the number of training cases at hospital k.

Any model and any data will do; this file needs torch alone. With 8 cases at one hospital, 40 at
another and a model that learns to double a number:

    import torch, federated
    model, loss = torch.nn.Linear(1, 1), torch.nn.MSELoss()
    x = {"north": torch.rand(8, 1), "south": torch.rand(40, 1)}
    clients = {k: federated.Client(len(v), lambda _, v=v: [(v, 2 * v)], loss) for k, v in x.items()}
    print(*federated.federated_rounds(model, clients, rounds=50, lr=lambda _: 0.1))
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


class Client(NamedTuple):
    """A hospital as the server sees it: how much its weights count, and what it trains on."""

    n_k: float  # training cases
    batches: Callable[[int], Iterable[tuple[Tensor, Any]]]  # round → its (inputs, targets)
    loss_function: Callable[[Tensor, Any], Tensor]  # (float32 logits, targets) → scalar


def weighted_average(pairs: Iterable[tuple[State, float]]) -> dict[str, Tensor]:
    """Average state dicts by their n_k: Σ_k (n_k / Σ_j n_j) · w_k, FedAvg's server step.

    `pairs` yields (state dict, n_k) and is read once; only a running sum is kept. Sums are float64
    (complex128 for complex tensors); results have the states' dtypes and devices and share no
    memory with them. Integer and boolean entries are averaged like all others and then rounded.

    Raises ValueError for no pairs, n_k that are not positive and finite, and keys or shapes that
    differ from the first state's, FloatingPointError for weights that are NaN or infinite; it
    counts the states from 0.
    """
    total, sums, dtypes = 0.0, {}, {}
    for index, (state, n_k) in enumerate(pairs):
        if not (n_k > 0 and math.isfinite(n_k)):
            raise ValueError(f"state {index}: n_k must be positive and finite, not {n_k}")
        if index == 0:
            dtypes = {key: w.dtype for key, w in state.items()}
            sums = {
                key: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float64))
                for key, w in state.items()
            }
        _check_state(state, sums, index)
        total += n_k
        for key, w in state.items():
            sums[key].add_(w.detach().to(sums[key]), alpha=n_k)  # on the first state's device
    if not sums:
        raise ValueError("nothing to average: there are no states, or they are empty")
    return {key: _cast(s.div_(total), dtypes[key]) for key, s in sums.items()}


def train_locally(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    loss_function: Callable[[Tensor, Any], Tensor],
    *,
    lr: float,
    weight_decay: float = 1e-4,
    max_norm: float = 1.0,
    autocast: torch.dtype | None = None,
) -> float:
    """Train `model` for one optimizer step per (inputs, targets) batch; return the mean loss.

    The optimizer is a fresh AdamW, gradients are clipped to max_norm. Batches lie on the model's
    device already; targets may be anything that loss_function(float32 logits, targets) takes.
    `autocast` is the dtype for mixed precision, None for none. Raises ValueError without a batch.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    losses = []
    model.train()
    for inputs, targets in batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(inputs)
        loss = loss_function(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.detach())  # .item() here would make the accelerator wait at each step
    if not losses:
        raise ValueError("train_locally got no batch")
    return torch.stack(losses).mean().item()


def federated_rounds(
    model: nn.Module,
    clients: Mapping[str, Client],
    rounds: int,
    lr: Callable[[int], float],
    start: int = 0,
    train: Callable[..., float] = train_locally,
    average: Callable[[Iterable[tuple[State, float]]], State] = weighted_average,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run FedAvg on `model`, yielding (round, loss by hospital) while it holds the new weights.

    Rounds count from 1, lr(round) is the learning rate, and hospitals train in the order of
    `clients`, by `train`. A hospital keeps nothing from round to round, so
    a model that went through `start` rounds before goes on as if it had never stopped. Raises
    FloatingPointError for a loss or a weight that is not finite. Whatever is raised in a round says
    in a note which round and hospital it was.
    """

    def updates(round_: int, losses: dict[str, float]) -> Iterator[tuple[State, float]]:
        global_weights = {key: w.clone() for key, w in model.state_dict().items()}
        for hospital, client in clients.items():
            losses[hospital] = math.nan  # the hospital at work, should it fail
            model.load_state_dict(global_weights)  # broadcast w
            batches = client.batches(round_)
            losses[hospital] = train(model, batches, client.loss_function, lr=lr(round_))
            if not math.isfinite(losses[hospital]):
                loss = losses[hospital]
                raise FloatingPointError(f"the loss is {loss}; a lower learning rate may help")
            yield {key: w.clone() for key, w in model.state_dict().items()}, client.n_k

    for round_ in range(start + 1, rounds + 1):
        losses: dict[str, float] = {}
        try:
            model.load_state_dict(average(updates(round_, losses)))  # w ← Σ_k (n_k / Σ_j n_j) · w_k
        except Exception as error:
            error.add_note(f"round {round_}, hospital {next(reversed(losses), 'none')}")
            raise
        yield round_, losses


def _check_state(state: State, sums: State, index: int) -> None:
    """Raise unless `state` can be added to `sums`."""
    if state.keys() != sums.keys():
        odd = sorted(state.keys() ^ sums.keys())
        raise ValueError(f"state {index}: keys differ from state 0's: {', '.join(odd)}")
    for key, w in state.items():
        if w.shape != sums[key].shape:
            shapes = f"{tuple(w.shape)}, not {tuple(sums[key].shape)}"
            raise ValueError(f"state {index}: {key} has shape {shapes} as in state 0")
        if not torch.isfinite(w).all():
            raise FloatingPointError(f"state {index}: {key} has weights that are NaN or infinite")


def _cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    return mean.to(dtype) if dtype.is_floating_point or dtype.is_complex else mean.round().to(dtype)
