"""The probe of a GPU runs, on a CPU and at a tiny size, before anybody rents one."""

import re
import sys

from torch import nn

from benchmarks import probe


def test_every_form_is_timed_or_named_with_what_failed(monkeypatch, capsys):
    def fail(model):
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(nn.Module, "compile", fail)
    args = "--patch 8 --width 2 --depth 2 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["probe", *args.split()])
    probe.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    forms = {name: seconds for name, _, seconds in (line.partition(": ") for line in lines)}
    assert forms.pop("step, bfloat16, compiled") == "failed, RuntimeError: no compiler is here"
    assert list(forms) == [
        "step, bfloat16",
        "step, float32",
        "step, bfloat16, channels-last",
        "step, bfloat16, without norms",
        "GIN, 5 calls, gin",
        "GIN, 5 calls, naive",
    ]
    assert all(re.fullmatch(r"first [\d.]+ s, then [\d.]+ s", line) for line in forms.values())
