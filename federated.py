"""Federated averaging: hospitals train one model together, and only its weights travel.

FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1) in one process: every round
each of K hospitals starts from the global weights w, trains locally and returns its w_k, and

    w ← Σ_k (n_k / Σ_j n_j) · w_k,   n_k the number of training cases at hospital k.

Any model and any data will do; this file needs torch alone:

    from federated import federated_rounds, train_locally
    n_cases = {"north": 12, "south": 40}  # name → n_k
    work = lambda name, round_: train_locally(model, batches(name, round_), loss, lr=1e-3)
    for round_, losses in federated_rounds(model, n_cases, work, rounds=10):
        print(round_, losses)  # and `model` holds the global weights
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def weighted_average(pairs: Iterable[tuple[State, float]]) -> dict[str, Tensor]:
    """Average state dicts by their n_k: Σ_k (n_k / Σ_j n_j) · w_k, FedAvg's server step.

    `pairs` yields (state dict, n_k) and is read once; only a running sum is kept, so it may train
    each client just before it yields the client's state, all of them in one model. Sums are float64
    (complex128 for complex tensors); results have the clients' dtypes and devices and share no
    memory with them. Integer and boolean entries are averaged like all others and then rounded.

    Raises ValueError for no pairs, n_k that are not positive and finite, keys or shapes that differ
    from the first state's, and weights that are NaN or infinite; it counts the states from 0.
    """
    total, sums, dtypes = 0.0, {}, {}
    for index, (state, n_k) in enumerate(pairs):
        if not (n_k > 0 and math.isfinite(n_k)):
            raise ValueError(f"state {index}: n_k must be positive and finite, not {n_k}")
        if index == 0:
            sums = {
                key: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float64))
                for key, w in state.items()
            }
            dtypes = {key: w.dtype for key, w in state.items()}
        _check_state(state, sums, index)
        total += n_k
        for key, w in state.items():
            sums[key].add_(w.detach().to(sums[key]), alpha=n_k)  # on the first state's device
    if not sums:
        raise ValueError("nothing to average: there are no states, or they are empty")
    return {key: _cast(s.div_(total), dtypes[key]) for key, s in sums.items()}


def federated_rounds(
    model: nn.Module,
    n_cases: Mapping[str, float],
    train: Callable[[str, int], float],
    rounds: int,
    start: int = 0,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run FedAvg on `model`, yielding (round, loss by hospital) while it holds the new weights.

    n_cases: hospital → n_k, in the order of training; rounds count from 1. train(hospital, round)
    trains `model` in place on that hospital's cases and returns its mean loss. A hospital keeps
    nothing from round to round, so a model that went through `start` rounds before goes on as if
    it had never stopped. Raises RuntimeError, with round and hospital, when a loss or a weight is
    not finite and when train fails.
    """
    for round_ in range(start + 1, rounds + 1):
        losses: dict[str, float] = {}
        try:
            updates = _updates(model, n_cases, train, round_, losses)
            model.load_state_dict(weighted_average(updates))  # w ← Σ_k (n_k / Σ_j n_j) · w_k
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            hospital = next(reversed(losses), "none")
            raise RuntimeError(f"round {round_}, hospital {hospital}: {error}") from error
        yield round_, losses


def _updates(model, n_cases, train, round_, losses) -> Iterator[tuple[State, float]]:
    """Broadcast to each hospital and train there, the one model standing in for all of theirs."""
    global_weights = {key: w.clone() for key, w in model.state_dict().items()}
    for hospital, n_k in n_cases.items():
        losses[hospital] = math.nan  # the hospital at work, should it fail
        model.load_state_dict(global_weights)
        losses[hospital] = train(hospital, round_)
        if not math.isfinite(losses[hospital]):
            raise ValueError(f"the loss is {losses[hospital]}; a lower learning rate may help")
        yield model.state_dict(), n_k


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


def _check_state(state: State, sums: State, index: int) -> None:
    """Raise ValueError unless `state` can be added to `sums`."""
    if state.keys() != sums.keys():
        odd = sorted(state.keys() ^ sums.keys())
        raise ValueError(f"state {index}: keys differ from state 0's: {', '.join(odd)}")
    for key, w in state.items():
        if w.shape != sums[key].shape:
            shapes = f"{tuple(w.shape)}, not {tuple(sums[key].shape)}"
            raise ValueError(f"state {index}: {key} has shape {shapes} as in state 0")
        if not torch.isfinite(w).all():
            raise ValueError(f"state {index}: {key} has weights that are NaN or infinite")


def _cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    return mean.to(dtype) if dtype.is_floating_point or dtype.is_complex else mean.round().to(dtype)
