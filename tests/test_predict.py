"""predict.py as a user meets it: a checkpoint and scans in, label maps and scores out."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import (
    awkward_affine,
    save,
    shift,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)
from monai.inferers import sliding_window_inference
from torch.nn import functional as F

import fedgin
import predict
from data import NORMALIZATION, normalize, to_model_grid
from datasets import ORGANS, DataError, find_cases
from evaluate import dice
from nifti import read_nifti
from phantom import SPACING, phantom
from unet3d import UNet3D

CPU = torch.device("cpu")
TINY = ["--rounds", "1", "--local-steps", "1", "--batch-size", "2"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert fedgin.main([*TINY, "--arms", "fl", "--out", str(out)]) == 0
    return out / "fl-1-5-seed42.pt"


def run(checkpoint, images, out, *args):
    paths = ["--checkpoint", checkpoint, "--images", *np.atleast_1d(images), "--out", out]
    return predict.main([str(arg) for arg in (*paths, *args)])


# ------------------------------------------------------------------------------------- the model


class Threshold(torch.nn.Module):
    """Organ n where a voxel is above n."""

    def __init__(self, organs=3):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.arange(organs + 1.0))

    def forward(self, x):
        scores = [n * x - n * (n + 1) / 2 for n in self.slope]  # n overtakes n - 1 at x = n
        return torch.cat(scores, dim=1)


@pytest.mark.parametrize("shape", [(20, 31, 7), (8, 8, 8), (40, 3, 8)])
def test_a_model_that_looks_at_single_voxels_is_the_same_on_any_volume(shape):
    image = np.random.default_rng(0).uniform(-1, 5, shape).astype(np.float32)
    labels = predict.segment(Threshold(), image, 8, shape)
    clear = abs(image - np.rint(image)) > 1e-3
    np.testing.assert_array_equal(labels[clear], np.floor(image).clip(0, 3)[clear])
    assert labels.dtype == np.uint8


def test_a_volume_is_segmented_as_by_monai_and_brought_to_the_scans_grid():
    torch.manual_seed(0)
    model = UNet3D(1, 4, 4, 3)
    image = normalize(phantom(1, "ct", 0)[0], "ct")
    size = (50, 41, 20)
    labels = predict.segment(model, image, 16, size)
    assert not model.training
    with torch.no_grad():
        logits = sliding_window_inference(
            torch.from_numpy(image)[None, None], (16,) * 3, 2, model, 0.5, "gaussian", 0.125
        )
    logits = F.interpolate(logits, size, mode="trilinear")[0]
    first, second = logits.topk(2, dim=0).values
    clear = (first - second > 1e-3).numpy()
    assert clear.mean() > 0.97
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels[clear], logits.argmax(0).numpy()[clear])


class OutOfMemoryOnce(Threshold):
    """The memory of a GPU is full in the middle of the first attempt."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_what_does_not_fit_a_gpu_is_put_together_on_the_cpu(monkeypatch):
    image = np.random.default_rng(0).uniform(-1, 5, (20, 31, 7)).astype(np.float32)
    expected = predict.segment(Threshold(), image, 8, (40, 31, 20))
    monkeypatch.setattr(predict, "has_room", lambda *_: True)
    model = OutOfMemoryOnce()
    np.testing.assert_array_equal(predict.segment(model, image, 8, (40, 31, 20)), expected)
    assert model.calls > 6
    monkeypatch.setattr(predict, "has_room", lambda *_: False)
    with pytest.raises(torch.cuda.OutOfMemoryError):  # nothing is left to try
        predict.segment(OutOfMemoryOnce(), image, 8, (40, 31, 20))


def test_room_on_a_gpu_is_for_both_grids_and_pytorchs_own_memory_counts(monkeypatch):
    image, size = np.zeros((10, 10, 10), np.float32), (100, 100, 50)
    taken = {}
    for name in ("mem_get_info", "memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: taken[name])

    def room(free, reserved, allocated, size=size):
        taken.update(mem_get_info=(free, 10**12), memory_reserved=reserved)
        taken.update(memory_allocated=allocated)
        return predict.has_room(torch.device("cuda"), image, size)

    wanted = 20 * 4 * 10**3 + 14 * 500_000
    assert room(wanted + 1, 0, 0)
    assert not room(wanted, 0, 0)
    assert not room(wanted, 10**9, 10**9)
    assert room(1, wanted + 10**6, 10**6)
    assert room(20 * 4 * 10**3 + 14 * 10**3 + 1, 0, 0, image.shape)
    assert not predict.has_room(torch.device("cpu"), image, size)


def test_a_checkpoint_gives_its_model_back(checkpoint):
    model, model_config = predict.load_model(checkpoint, CPU)
    weights = torch.load(checkpoint, weights_only=True)["weights"]
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(w, weights[key]) for key, w in model.state_dict().items())
    assert {key: model_config[key] for key in ("spacing", "patch", "width", "depth")} == {
        "spacing": SPACING,
        "patch": 32,
        "width": 2,
        "depth": 2,
    }
    assert tuple(model_config["organs"]) == ORGANS


def test_a_checkpoint_runs_no_code_and_must_be_one(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weights": Evil(), "model": {}}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("evil.pt", "text.pt", "junk.pt", "empty.pt", "other.pt", "missing.pt"):
        assert run(tmp_path / name, tmp_path, tmp_path / "out") == 2
        shown = capsys.readouterr()
        assert f"predict.py: {tmp_path / name}: no checkpoint of fedgin.py (" in shown.err
        assert "code ran" not in shown.out
        assert len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_network_or_normalization_is_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "model": {**content["model"], "width": 3}}, tmp_path / "wide.pt")
    with pytest.raises(DataError, match=r"wide.pt: no checkpoint of fedgin.py \(Error.* loading"):
        predict.load_model(tmp_path / "wide.pt", CPU)
    window = {**NORMALIZATION, "ct": (-100.0, 240.0)}
    torch.save({**content, "model": {**content["model"], "normalization": window}}, tmp_path / "w")
    with pytest.raises(DataError, match=r"w: was trained with another normalization: .*-100.0"):
        predict.load_model(tmp_path / "w", CPU)


# ----------------------------------------------------------------------------------- which scans


def write_empty(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(paths, modality=None, layout=None):
    """{name of the label map: (modality, scan)}"""
    out = Path("out")
    scans = predict.find_scans([str(path) for path in paths], out, modality, layout)
    names = {path.relative_to(out): case for path, case in scans.items()}
    assert all(name.name == f"{case.id}.nii.gz" for name, case in names.items())
    return {
        str(name).removesuffix(".nii.gz"): (case.modality, case.image)
        for name, case in names.items()
    }


def test_files_and_folders_of_files_are_found(tmp_path):
    write_empty(tmp_path, "in/a.nii.gz", "in/b_0000.nii", "in/._c.nii.gz", "in/notes.txt", "d.nii")
    assert found([tmp_path / "in"], "mri") == {
        "a": ("mri", tmp_path / "in/a.nii.gz"),
        "b": ("mri", tmp_path / "in/b_0000.nii"),
    }
    assert found([tmp_path / "in", tmp_path / "d.nii"], "mri") == {
        "in/a": ("mri", tmp_path / "in/a.nii.gz"),
        "in/b": ("mri", tmp_path / "in/b_0000.nii"),
        "d": ("mri", tmp_path / "d.nii"),
    }
    with pytest.raises(DataError, match="a.nii.gz: CT or MRI\\? Say so with --modality"):
        found([tmp_path / "in"])


def test_totalsegmentators_file_names_tell_the_modality_and_their_folder_the_id(tmp_path):
    write_empty(tmp_path, "s1/ct.nii.gz", "s2/mri.nii.gz")
    files = {"s1": ("ct", tmp_path / "s1/ct.nii.gz"), "s2": ("mri", tmp_path / "s2/mri.nii.gz")}
    assert found([tmp_path / "s1/ct.nii.gz", tmp_path / "s2/mri.nii.gz"]) == files
    assert list(found([tmp_path / "s1", tmp_path / "s2"])) == ["s1/s1", "s2/s2"]
    assert found([tmp_path]) == files
    assert found([tmp_path], "mri") == {"s2": files["s2"]}


def test_a_folder_in_a_known_layout_comes_with_its_labels(tmp_path):
    write_amos(tmp_path, "ct", 1)
    scans = predict.find_scans([str(tmp_path)], Path("out"), None, None)
    assert list(scans.values()) == find_cases(tmp_path)
    write_totalsegmentator(tmp_path, "ct", 1)
    with pytest.raises(DataError, match="--layout"):
        found([tmp_path])
    assert list(found([tmp_path], layout="totalsegmentator")) == ["s0000"]


def test_scans_of_one_name_and_paths_without_scans_are_refused(tmp_path):
    write_empty(tmp_path, "a/x.nii.gz", "b/x_0000.nii")
    with pytest.raises(DataError, match="b/x_0000.nii: there is another scan named x"):
        found([tmp_path / "a/x.nii.gz", tmp_path / "b/x_0000.nii"], "ct")
    assert list(found([tmp_path / "a", tmp_path / "b"], "ct")) == ["a/x", "b/x"]
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        found([tmp_path / "nowhere"], "ct")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no labelled case found; expected"):
        found([tmp_path / "empty"], "ct")


# ----------------------------------------------------------------------------------- label maps


def test_predictions_lie_on_the_scans_own_grid(checkpoint, tmp_path, capsys):
    write_totalsegmentator(tmp_path / "scans", "mri", 2)
    order, affine = (2, 0, 1), awkward_affine((9, 8, 10), (1, -1, 1), (2, 0, 1))
    for path in (tmp_path / "scans").rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order)[5:], affine)
    assert run(checkpoint, tmp_path / "scans", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "| fl-1-5-seed42 |" in shown
    assert f"{checkpoint} segments liver, kidneys, spleen, pancreas, gallbladder" in shown
    assert "WARNING: it was trained on PHANTOMS" in shown
    assert f"2 of 2 scans segmented, in {tmp_path / 'out'}" in shown
    ids = json.loads((tmp_path / "out/labels.json").read_text())
    assert ids == {"background": 0, **{organ: n for n, organ in enumerate(ORGANS, start=1)}}
    model, model_config = predict.load_model(checkpoint, CPU)
    assert model_config["spacing"] == SPACING
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["organ"] for row in rows] == [*ORGANS, *ORGANS]
    for case in find_cases(tmp_path / "scans"):
        source = nibabel.load(case.image)
        written = nibabel.load(tmp_path / f"out/{case.id}.nii.gz")
        assert written.shape == source.shape
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_allclose(written.affine, source.affine)
        scan = read_nifti(case.image)
        labels = predict.segment(model, to_model_grid(scan, "mri", SPACING), 32, scan.voxels.shape)
        back = nibabel.as_closest_canonical(written)
        np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
        liver = nibabel.load(case.image.parent / "segmentations/liver.nii.gz")
        score = dice(np.asarray(written.dataobj) == 1, np.asarray(liver.dataobj) == 1)
        [row] = [r for r in rows if (r["case"], r["organ"]) == (case.id, "liver")]
        assert float(row["dice"]) == score
        assert row["modality"] == "mri"


def label_maps(out):
    return {path.name: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_again_goes_on_with_what_is_missing(checkpoint, tmp_path, capsys):
    scans, out = tmp_path / "scans", tmp_path / "out"
    write_totalsegmentator(scans, "mri", 3)
    assert run(checkpoint, scans, out) == 0
    scores, before = (out / "scores.csv").read_text(), label_maps(out)
    (out / "s0001.nii.gz").unlink()
    (out / "tmp-s0001.nii.gz").write_bytes(b"of a killed process")
    assert run(checkpoint, scans, out) == 0
    assert "3 of 3 scans segmented" in capsys.readouterr().out
    again = label_maps(out)
    assert again.keys() == before.keys()
    assert {name for name in again if again[name] != before[name]} == {"s0001.nii.gz"}
    assert (out / "scores.csv").read_text() == scores


def test_another_checkpoint_does_not_go_on(checkpoint, tmp_path, capsys):
    write_totalsegmentator(tmp_path / "scans", "mri", 1)
    assert run(checkpoint, tmp_path / "scans", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    content = torch.load(checkpoint, weights_only=True)
    content["weights"]["head.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    assert run(tmp_path / "other.pt", tmp_path / "scans", tmp_path / "out") == 2
    assert "out: holds predictions of another checkpoint" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_no_scan_and_no_label_is_overwritten(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "set", "ct", 1)
    save(tmp_path / "flat/pat.nii.gz", phantom(1, "ct", 0)[0])
    before = contents(tmp_path)
    for images, out in (
        ("flat", "flat"),
        ("flat", "flat/below"),
        ("flat/pat.nii.gz", "flat"),
        ("set", "set/labelsTr"),
        ("set", "set/imagesTr/below"),
    ):
        assert run(checkpoint, tmp_path / images, tmp_path / out, "--modality", "ct") == 2
        assert "which holds scans or labels" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    for name in ("pat.nii.gz", "scores.csv", "labels.json"):
        (tmp_path / "out" / name).write_bytes(b"of somebody else")
        assert run(checkpoint, tmp_path / "flat", tmp_path / "out", "--modality", "ct") == 2
        assert f"out/{name}: is there, and not of this command" in capsys.readouterr().err
        assert (tmp_path / "out" / name).read_bytes() == b"of somebody else"
        (tmp_path / "out" / name).unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_scan_that_fails_does_not_keep_the_others(
    error, checkpoint, tmp_path, monkeypatch, capsys
):
    write_nnunet(tmp_path / "in", "ct", 3)
    segment, calls = predict.segment, []

    def fails_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return segment(*args)

    monkeypatch.setattr(predict, "segment", fails_second)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert f"case_001_0000.nii.gz: {error}" in shown.err
    assert "2 of 3 scans segmented" in shown.out
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    assert len(label_maps(tmp_path / "out")) == 3


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (OSError, 1)])
def test_stopped_while_it_writes_it_leaves_no_half_file(
    stop, code, checkpoint, tmp_path, monkeypatch, capsys
):
    write_nnunet(tmp_path / "in", "ct", 2)

    def stops(image, path):
        path.write_bytes(b"half")
        raise stop

    monkeypatch.setattr(nibabel, "save", stops)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == code
    goes_on = "the same command goes on with what is missing" in capsys.readouterr().err
    assert goes_on == (code == 130)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["labels.json", "predictions.json"]
    monkeypatch.undo()
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0


def test_a_bug_in_the_network_is_not_a_failed_scan(checkpoint, tmp_path, monkeypatch):
    write_nnunet(tmp_path / "in", "ct", 1)

    def bug(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(predict, "segment", bug)
    with pytest.raises(RuntimeError, match="mat1"):
        run(checkpoint, tmp_path / "in", tmp_path / "out")


def test_folders_with_equal_ids_have_folders_of_their_own(checkpoint, tmp_path):
    write_totalsegmentator(tmp_path / "ct_set", "ct", 1)
    write_totalsegmentator(tmp_path / "mri_set", "mri", 1)
    images = ["--images", str(tmp_path / "ct_set"), str(tmp_path / "mri_set")]
    out = tmp_path / "out"
    assert predict.main(["--checkpoint", str(checkpoint), "--out", str(out), *images]) == 0
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.nii.gz"))
    assert found == ["ct_set/s0000.nii.gz", "mri_set/s0000.nii.gz"]
    with (out / "scores.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"ct_set/s0000", "mri_set/s0000"}


@pytest.mark.parametrize(
    "change", [{"depth": 40}, {"depth": 10**20}, {"depth": 0}, {"width": 10**9}, {"organs": None}]
)
def test_a_checkpoint_that_asks_for_too_much_is_refused_at_once(change, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "model": content["model"] | change}, tmp_path / "greedy.pt")
    with pytest.raises(DataError, match="greedy.pt: no checkpoint of fedgin.py"):
        predict.load_model(tmp_path / "greedy.pt", CPU)


def test_weights_that_are_not_finite_are_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["weights"]["head.bias"][0] = float("nan")
    torch.save(content, tmp_path / "sick.pt")
    with pytest.raises(DataError, match="sick.pt: no checkpoint of fedgin.py"):
        predict.load_model(tmp_path / "sick.pt", CPU)


def test_organs_that_a_data_set_does_not_label_are_not_scored(checkpoint, tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "rest": [2, 3, 4, 8, 10]}
    write_nnunet(tmp_path / "in", "ct", 1, labels=labels)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--nsd-tolerance", 9) == 0
    with (tmp_path / "out/scores.csv").open() as file:
        rows = {row["organ"]: row for row in csv.DictReader(file)}
    assert {organ for organ in ORGANS if rows[organ]["outcome"] == "unlabelled"} == {
        "kidneys",
        "pancreas",
        "gallbladder",
    }
    assert rows["kidneys"]["dice"] == ""
    assert 0 <= float(rows["liver"]["dice"]) <= 1


def test_files_without_labels_and_odd_sizes(checkpoint, tmp_path, capsys):
    save(tmp_path / "in/tiny.nii.gz", np.random.default_rng(0).normal(size=(3, 40, 9)))
    save(tmp_path / "in/flat.nii", np.random.default_rng(0).normal(size=(50, 20, 1)))
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 2
    assert "--modality" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--modality", "ct") == 0
    assert nibabel.load(tmp_path / "out/tiny.nii.gz").shape == (3, 40, 9)
    assert np.asarray(nibabel.load(tmp_path / "out/flat.nii.gz").dataobj).shape[:2] == (50, 20)
    assert not (tmp_path / "out/scores.csv").exists()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("imagesTr/case_000_0000.nii.gz", truncate, "cannot be read"),
        ("labelsTr/case_000.nii.gz", shift, "lies at another place than its scan"),
    ],
)
def test_one_bad_scan_does_not_keep_the_others(checkpoint, name, spoil, message, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 2)
    spoil(tmp_path / "in" / name)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert f"predict.py: {tmp_path / 'in' / name}: {message}" in shown.err
    assert "1 of 2 scans segmented" in shown.out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["case_001.nii.gz"]


def test_a_bad_scan_without_labels_is_named(checkpoint, tmp_path, capsys):
    save(tmp_path / "in/good.nii.gz", phantom(1, "ct", 0)[0])
    save(tmp_path / "in/bad.nii.gz", phantom(1, "ct", 0)[0])
    truncate(tmp_path / "in/bad.nii.gz")
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--modality", "ct") == 1
    shown = capsys.readouterr()
    assert f"predict.py: {tmp_path / 'in/bad.nii.gz'}: cannot be read" in shown.err
    assert "1 of 2 scans segmented" in shown.out
    assert (tmp_path / "out/good.nii.gz").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: --checkpoint, --images, --out"),
        (["--modality", "pet"], "argument --modality: invalid choice: 'pet'"),
        (["--nsd-tolerance", "far"], "argument --nsd-tolerance: invalid"),
        (["--nsd-tolerance", "-1"], "argument --nsd-tolerance: must be a positive number"),
        (["--nsd-tolerance", "0"], "argument --nsd-tolerance: must be a positive number"),
        (["--nsd-tolerance", "nan"], "argument --nsd-tolerance: must be a positive number"),
        (["--check", "x"], "--checkpoint"),  # flags are not abbreviated
    ],
)
def test_bad_flags_end_with_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main(args)
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.endswith("--checkpoint FILE --images PATH [PATH …] --out DIR [options]")
    assert message in error
