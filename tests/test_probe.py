"""The probe of a GPU runs, on a CPU and at a tiny size, before anybody rents one."""

import functools
import re
import sys

from torch import nn

from benchmarks import probe


def test_every_form_is_timed_or_named_with_what_failed(monkeypatch, capsys):
    sizes = {"patch": 8, "width": 2, "depth": 2, "repeats": 1}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["probe", *flags])
    eager = functools.partialmethod(nn.Module.compile, backend="eager")  # in seconds
    monkeypatch.setattr(nn.Module, "compile", eager)

    def fail(model):
        raise RuntimeError("out of memory\nand more")

    lines = probe.main() or capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(": ")[0] for line in lines] == [
        "step, bfloat16",
        "step, float32",
        "step, bfloat16, channels-last",
        "step, bfloat16, without norms",
        "step, bfloat16, compiled",
        "GIN, 5 calls, gin",
        "GIN, 5 calls, naive",
    ]
    assert all(re.search(r": first [\d.]+ s, then [\d.]+ s$", line) for line in lines)
    monkeypatch.setattr(probe, "leave_out_norms", fail)
    probe.main()
    assert "without norms: failed, RuntimeError: out of memory and more" in capsys.readouterr().out
