"""What ranks tell one another, in threads linked by gloo: messages, sums, and why one fails."""

import math
import threading
import time

import pytest
import torch
from ranks import outcomes, together

from scans.files import DataError
from scripts.peers import pack, unpack


def test_what_ranks_exchange_comes_back_by_rank():
    values = [{"liver": 0.5, "best": -math.inf}, [1, None, "x" * 5000], "ü\udcff"]
    assert together(3, lambda peers: peers.exchange(values[peers.rank])) == [values] * 3


def test_numbers_are_added_up_over_ranks():
    for found in together(3, lambda peers: peers.add_up(torch.tensor([1.0, peers.rank]))):
        assert found.tolist() == [3, 3]


def test_a_rank_may_be_slower_than_the_others_again_and_again():
    """By most of the timeout each time, and by more than that all in all."""

    def act(peers):
        for call in range(3):
            time.sleep(1.2 * (call % 2 == peers.rank))
            peers.add_up(torch.ones(1))

    began = time.monotonic()
    together(2, act, timeout=3)
    assert time.monotonic() - began > 3


def test_all_ranks_end_with_the_reason_of_one_that_fails(capsys):
    """At the next call, whatever it is; no note blames what they were at themselves."""

    def act(peers):
        if peers.rank == 0:
            time.sleep(0.5)
            raise DataError("no scan")
        try:
            peers.exchange(1) if peers.rank == 1 else peers.add_up(torch.ones(1))
        except ConnectionError as error:
            error.add_note("round 2, hospital b")
            raise

    first, *others = outcomes(3, act)
    assert (type(first), str(first)) == (DataError, "no scan")
    for heard in others:
        assert type(heard) is ConnectionError
        assert (str(heard), heard.__notes__) == ("rank 0 (a): no scan", [])
    assert capsys.readouterr().err == "rank 0 (a): no scan; telling the other ranks\n"


def test_ranks_that_fail_together_keep_their_own_reasons():
    def act(peers):
        if peers.rank < 2:
            raise DataError(f"no scan {peers.rank}")
        return peers.exchange(None)

    *failed, heard = outcomes(3, act)
    assert [str(error) for error in failed] == ["no scan 0", "no scan 1"]
    assert str(heard) == "rank 0 (a): no scan 0"


def test_a_rank_that_is_stopped_says_so():
    def act(peers):
        if peers.rank == 0:
            raise KeyboardInterrupt
        peers.exchange(None)

    stopped, heard = outcomes(2, act)
    assert type(stopped) is KeyboardInterrupt
    assert str(heard) == "rank 0 (a): was stopped"


def test_a_rank_that_is_stopped_in_a_call_closes_its_links():
    """It says nothing, as the others would take that for its part of the call."""

    def act(peers):
        if peers.rank == 0:
            with peers._call():
                raise KeyboardInterrupt
        peers.exchange(None)

    stopped, heard = outcomes(2, act)
    assert type(stopped) is KeyboardInterrupt
    assert str(heard).startswith("another rank was stopped, is cut off or takes longer than")


def test_a_rank_that_ends_without_a_word_is_noticed_at_once():
    def act(peers):
        if peers.rank == 0:
            peers.in_step = False  # as if it had been killed
            raise SystemExit
        peers.exchange(None)

    began = time.monotonic()
    for heard in outcomes(3, act)[1:]:
        assert type(heard) is ConnectionError
        assert str(heard).startswith("another rank was stopped, is cut off or takes longer than")
    assert time.monotonic() - began < 20


def test_a_silent_rank_is_waited_for_no_longer_than_the_timeout():
    given_up = threading.Barrier(3)

    def act(peers):
        began = time.monotonic()
        try:
            if peers.rank != 1:
                peers.exchange(peers.rank)
        finally:
            waited[peers.rank] = time.monotonic() - began
            given_up.wait(60)

    waited = [0, 0, 0]
    a, _, c = outcomes(3, act, timeout=2)
    for error in (a, c):
        expected = "another rank was stopped, is cut off or takes longer than --timeout 2 ("
        assert str(error).startswith(expected)
    assert max(waited) < 2 + 3


def states(n):
    generator = torch.Generator().manual_seed(n)
    return {
        "conv": torch.randn(3, 2, generator=generator),
        "norm": torch.randn(4, generator=generator).double() * 1e3,
        "scale": torch.randn((), generator=generator),
    }


def test_the_average_over_ranks_is_the_weighted_average():
    pairs = [(states(1), 8), (states(2), 1), (states(3), 40)]
    for found in together(3, lambda peers: peers.average(*pairs[peers.rank])):
        for key, w in states(1).items():
            expected = sum(n / 49 * weights[key].double() for weights, n in pairs)
            assert found[key].dtype == w.dtype
            torch.testing.assert_close(found[key], expected.to(w), rtol=1e-7, atol=1e-10)


def test_the_average_over_ranks_rounds_integers():
    counts = [torch.tensor([0, 10]), torch.tensor([3, 20])]
    for found in together(
        2, lambda peers: peers.average({"n": counts[peers.rank]}, 1 + peers.rank)
    ):
        assert found["n"].dtype == torch.int64
        assert found["n"].tolist() == [2, 17]  # of 2 and 16.67


def test_unpack_gives_back_what_pack_took():
    weights = states(1)
    found = unpack(pack(weights), like=weights)
    assert found.keys() == weights.keys()
    for key, w in weights.items():
        assert found[key].dtype == w.dtype
        assert torch.equal(found[key], w)


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
