"""Properties of the weighted average that must hold for any clients (hypothesis)."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated import weighted_average

finite = st.floats(-1e6, 1e6, width=32)
n_k = st.integers(1, 10**6)
clients = st.lists(st.tuples(st.tuples(finite, finite, finite), n_k), min_size=1, max_size=20)


def states(pairs):
    """State dicts of a float32 matrix, a float64 scalar, a half and an integer, with their n_k."""
    return [
        (
            {
                "a.weight": torch.tensor([[a, b]], dtype=torch.float32),
                "a.scale": torch.tensor(c, dtype=torch.float64),
                "b.half": torch.tensor([c / 100], dtype=torch.float16),
                "b.count": torch.tensor(int(a), dtype=torch.int64),
            },
            n,
        )
        for (a, b, c), n in pairs
    ]


@given(clients, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_clients_does_not_matter(pairs, draw):
    shuffled = list(pairs)
    draw.shuffle(shuffled)
    ours, theirs = weighted_average(states(pairs)), weighted_average(states(shuffled))
    for key in ours:
        torch.testing.assert_close(ours[key].double(), theirs[key].double(), rtol=1e-6, atol=1e-2)


@given(clients, st.integers(1, 1000))
@settings(max_examples=50, deadline=None)
def test_only_the_ratios_of_n_k_matter(pairs, factor):
    scaled = [(values, n * factor) for values, n in pairs]
    ours, theirs = weighted_average(states(pairs)), weighted_average(states(scaled))
    for key in ours:
        torch.testing.assert_close(ours[key].double(), theirs[key].double(), rtol=1e-6, atol=1e-2)


@given(st.tuples(finite, finite, finite), st.lists(n_k, min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_identical_states_come_back_exactly(values, weights):
    state = states([(values, 1)])[0][0]
    mean = weighted_average((state, n) for n in weights)
    assert all(torch.equal(mean[key], state[key]) for key in state if key != "a.scale")
    torch.testing.assert_close(mean["a.scale"], state["a.scale"], rtol=1e-14, atol=0)


@given(clients)
@settings(max_examples=50, deadline=None)
def test_it_is_the_exact_mean_rounded_once(pairs):
    """Against exact sums (math.fsum) of each number, within one rounding of its dtype."""
    mean, total = weighted_average(states(pairs)), sum(n for _, n in pairs)
    exact = [math.fsum(v[i] * n for v, n in pairs) / total for i in range(3)]
    scale = max(abs(x) for v, _ in pairs for x in v) + 1e-30
    for ours, right in zip(mean["a.weight"][0].tolist(), exact[:2], strict=True):
        assert abs(ours - right) <= 2**-24 * abs(right) + 1e-12 * scale
    assert abs(mean["a.scale"].item() - exact[2]) <= 1e-12 * scale
    low, high = min(int(v[0]) for v, _ in pairs), max(int(v[0]) for v, _ in pairs)
    assert low <= mean["b.count"].item() <= high


@given(st.tuples(finite, finite, finite), n_k)
@settings(max_examples=30, deadline=None)
def test_one_client_is_left_as_it_is(values, n):
    [(state, _)] = states([(values, n)])
    mean = weighted_average([(state, n)])
    assert all(torch.equal(mean[key], state[key]) for key in state if key != "a.scale")


def test_a_thousand_clients():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, 5, generator=generator)
    sizes = torch.randint(1, 100, (1000,), generator=generator)
    mean = weighted_average(({"w": w}, n.item()) for w, n in zip(weights, sizes, strict=True))["w"]
    exact = (weights.double() * sizes[:, None]).sum(0) / sizes.sum()
    torch.testing.assert_close(mean, exact.float(), rtol=1e-7, atol=0)
