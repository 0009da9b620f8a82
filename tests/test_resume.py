"""What keeps a run from being lost: refusals, and every fault with its message and its repair."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import truncate, write_totalsegmentator
from tiny import assert_same, command, outcome

import data
import fedgin


def test_resume_refuses_other_settings_other_data_and_other_formats(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out) == 0
    before = outcome(out)
    assert command("--out", out, "--resume") == 0  # nothing left to do
    assert_same(before, outcome(out))
    capsys.readouterr()
    assert command("--out", out, "--resume", "--lr", "1e-3", "--width", "4") == 2
    assert "holds a run with other width, lr;" in capsys.readouterr().err
    assert command("--out", out, "--resume", "--sites", "2") == 2
    assert "holds a run with other sites;" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "hospitals").iterdir()) == ["ct.json", "mri.json"]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "format": 0}))
    assert command("--out", out, "--resume") == 2
    assert "holds a run with other format;" in capsys.readouterr().err


def test_resume_names_a_damaged_file(tmp_path, capsys):
    assert command("--out", tmp_path) == 0
    torch.save({}, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    for name in ("checkpoint.pt", "results.json", "config.json"):
        for content in (b"junk", (tmp_path / name).read_bytes()[:100]):
            (tmp_path / name).write_bytes(content)
            assert command("--out", tmp_path, "--resume") == 2
            error = capsys.readouterr().err
            assert f"{name}: cannot be read" in error
            assert len(error.splitlines()) == 1


def test_resume_refuses_files_that_changed(tmp_path, ct_folder, mri_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    words = [
        "--ct",
        ct_folder,
        "--mri",
        tmp_path / "mri",
        "--spacing",
        12,
        "--out",
        tmp_path / "out",
    ]
    assert command(*words) == 0
    os.utime(tmp_path / "mri/labelsTr/case_000.nii.gz", (1, 1))
    assert command(*words, "--resume") == 2
    assert "holds a run with other files;" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ faults


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two hospitals, and what an undisturbed run over them ends in."""
    root = tmp_path_factory.mktemp("scans")
    for modality in ("ct", "mri"):
        write_totalsegmentator(root / modality, modality, 4)
    words = ["--ct", root / "ct", "--mri", root / "mri", "--spacing", 12, "--mri-cases", 1]
    assert command(*words, "--out", root / "calm", "--cache", root / "calm-cache") == 0
    return words, root / "calm"


class After:
    """Let the n-th call of fedgin.save (a checkpoint a round) be followed by something bad."""

    def __init__(self, monkeypatch, n, action):
        self.calls, save = 0, fedgin.save

        def counting(path, content):
            save(path, content)
            self.calls += 1
            if self.calls == n:
                action()

        monkeypatch.setattr(fedgin, "save", counting)


def fails_then_resumes(words, calm, tmp_path, capsys, message, repair=lambda: None):
    words = [*words, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert command(*words) == 1
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if "the run failed" in line)
    assert "Traceback" not in error
    for part in message:
        assert part in line
    assert "--resume goes on" in error.splitlines()[-1]
    repair()
    assert command(*words, "--resume") == 0
    assert_same(outcome(calm), outcome(tmp_path / "out"))


def cached(tmp_path, name):
    return sorted((tmp_path / "cache").glob(f"*/{name}.npy"))


def test_a_file_that_turns_unreadable(scans, tmp_path, monkeypatch, capsys):
    """The preprocessed scans are truncated after round 3: the hospital at work names its case."""
    words, calm = scans
    copies = tmp_path / "copies"

    def spoil():
        shutil.copytree(tmp_path / "cache", copies)
        for path in cached(tmp_path, "image"):
            truncate(path)

    def repair():
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(copies, tmp_path / "cache")

    After(monkeypatch, 3, spoil)
    message = ["seed 42", "arm fl", "round 4", "hospital mri", "case s000"]
    fails_then_resumes(words, calm, tmp_path, capsys, message, repair)


def test_a_poisoned_volume(scans, tmp_path, monkeypatch, capsys):
    words, calm = scans
    good = {}

    def poison():
        for path in cached(tmp_path, "image"):
            good[path] = path.read_bytes()
            np.save(path, np.full_like(np.load(path), np.nan))

    def repair():
        for path, content in good.items():
            path.write_bytes(content)

    After(monkeypatch, 2, poison)
    message = ["seed 42", "arm fl", "round 3", "hospital mri", "case s000", "NaN"]
    fails_then_resumes(words, calm, tmp_path, capsys, message, repair)


def test_a_scan_that_is_gone_when_it_is_tested(scans, tmp_path, monkeypatch, capsys):
    words, calm = scans
    ours = tmp_path / "scans"
    shutil.copytree(words[1].parent, ours, copy_function=shutil.copy2)
    words = [ours / word.name if isinstance(word, Path) else word for word in words]
    masks = sorted(ours.rglob("liver.nii.gz"))
    kept = {path: (path.read_bytes(), path.stat()) for path in masks}

    def repair():
        for path, (content, stat) in kept.items():
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    After(
        monkeypatch, 5, lambda: [truncate(path) for path in masks]
    )  # 4 rounds and the arm's model
    message = ["seed 42", "arm fl", "liver.nii.gz: cannot be read"]
    fails_then_resumes(words, calm, tmp_path, capsys, message, repair)


def test_a_full_disk(scans, tmp_path, monkeypatch, capsys):
    words, calm = scans
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    def repair():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    After(monkeypatch, 2, full)
    try:
        message = ["seed 42", "arm fl", "File too large"]
        fails_then_resumes(words, calm, tmp_path, capsys, message, repair)
    finally:
        repair()


def test_a_full_disk_while_preprocessing(scans, tmp_path, capsys):
    words, calm = scans
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        assert command(*words, "--out", tmp_path / "out", "--cache", tmp_path / "cache") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the run failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words = [*words, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--resume"]
    assert command(*words) == 0
    assert_same(outcome(calm), outcome(tmp_path / "out"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: torch.empty(2**62, dtype=torch.int8), "allocate"),  # the allocator's own error
        (lambda x: x * float("nan"), "the loss is nan"),
        (lambda x: x * float("inf"), "the loss is"),
        (lambda x: 1e6 * x, "the loss has exploded"),
    ],
)
def test_memory_and_losses(broken, message, scans, tmp_path, monkeypatch, capsys):
    """Out of memory, NaN, infinite and exploding losses in the network itself, from round 3 on."""
    words, calm = scans
    forward, sick = fedgin.UNet3D.forward, []

    def sometimes(self, x):
        logits = forward(self, x)
        return broken(logits) if sick and self.training else logits

    monkeypatch.setattr(fedgin.UNet3D, "forward", sometimes)
    After(monkeypatch, 2, lambda: sick.append(True))
    message = ["seed 42", "arm fl", "round 3", "hospital mri", message]
    fails_then_resumes(words, calm, tmp_path, capsys, message, sick.clear)


# -------------------------------------------------------------------------------------- determinism


def test_more_arms_and_more_processes_change_nothing_in_the_others(tmp_path, monkeypatch):
    for modality in ("ct", "mri"):
        write_totalsegmentator(tmp_path / modality, modality, 8)
    words = ["--ct", tmp_path / "ct", "--mri", tmp_path / "mri", "--spacing", 12]
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)
    assert command(*words, "--out", tmp_path / "one/out") == 0
    monkeypatch.setattr(data.os, "cpu_count", lambda: 2)
    arms = ["--arms", "mri-only", "centralized+gin", "fedgin"]
    assert command(*words, "--out", tmp_path / "two/out", *arms) == 0
    a, b = (torch.load(tmp_path / x / "out/fedgin.pt", weights_only=True) for x in ("one", "two"))
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    assert a["val_dice"] == b["val_dice"]
