"""What ranks tell one another, in threads linked by gloo: messages, sums, and why one fails."""

import math
import time

import pytest
import torch
from ranks import outcomes, together

from scans.files import DataError


def test_what_ranks_exchange_comes_back_by_rank():
    values = [{"liver": 0.5, "best": -math.inf}, [1, None, "x" * 5000], "ü\udcff"]
    assert together(3, lambda peers: peers.exchange(values[peers.rank])) == [values] * 3


def test_a_rank_may_be_slower_than_the_others_again_and_again():
    """By less than the timeout each time, and by more than that all in all."""

    def act(peers):
        for call in range(3):
            time.sleep(1.2 * (call % 2 == peers.rank))
            peers.add_up(torch.ones(1))

    began = time.monotonic()
    together(2, act, timeout=3)
    assert time.monotonic() - began > 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("no scan"), "no scan"),
        (BrokenPipeError("nobody reads stdout"), "nobody reads stdout"),
        (KeyboardInterrupt(), "was stopped"),
    ],
)
def test_all_ranks_end_with_the_reason_of_one_that_fails(error, reason, capsys):
    """At their next call, whatever it is; no note blames what they were at themselves."""

    def act(peers):
        if peers.rank == 0:
            time.sleep(0.2)
            raise error
        try:
            peers.exchange(1) if peers.rank == 1 else peers.add_up(torch.ones(1))
        except ConnectionError as heard:
            heard.add_note("round 2, hospital b")
            raise

    own, *others = outcomes(3, act)
    assert own is error
    for heard in others:
        assert type(heard) is ConnectionError
        assert (str(heard), heard.__notes__) == (f"rank 0 (a): {reason}", [])
    assert capsys.readouterr().err == f"rank 0 (a): {reason}; telling the other ranks\n"


def test_a_rank_that_is_stopped_in_a_call_closes_its_links_at_once():
    """It says nothing, because the others would take that for its part of the call."""

    def act(peers):
        if peers.rank == 0:
            with peers._call():
                raise KeyboardInterrupt
        peers.exchange(None)

    began = time.monotonic()
    stopped, *others = outcomes(3, act)
    assert type(stopped) is KeyboardInterrupt
    for heard in others:
        assert type(heard) is ConnectionError
        assert str(heard).startswith("another rank was stopped, is cut off or takes longer than")
    assert time.monotonic() - began < 20


def states(n):
    generator = torch.Generator().manual_seed(n)
    return {
        "conv": torch.randn(3, 2, generator=generator),
        "norm": torch.randn(4, generator=generator).double() * 1e3,
        "scale": torch.randn((), generator=generator),
        "count": torch.tensor([10 * n, 7 - n]),
    }


def test_the_average_over_ranks_is_the_weighted_average():
    pairs = [(states(1), 8), (states(2), 1), (states(3), 40)]
    for found in together(3, lambda peers: peers.average(*pairs[peers.rank])):
        for key, w in states(1).items():
            expected = sum(n / 49 * weights[key].double() for weights, n in pairs)
            assert found[key].dtype == w.dtype
            if key == "count":
                expected = expected.round()
            torch.testing.assert_close(found[key], expected.to(w), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("state", "n_k", "error"),
    [
        ({"w": torch.tensor([1.0, math.nan])}, 1, FloatingPointError),
        ({"w": torch.ones(2)}, 0, ValueError),
    ],
)
def test_a_rank_sends_no_weights_that_are_not_finite(state, n_k, error):
    def average(peers):
        with pytest.raises(error):
            peers.average(state, n_k)
        return list(sent)

    sent = []
    assert together(1, average, sent=sent) == [[]]
