"""Devices, precision, whole scans against MONAI, and models that are read or refused."""

import math

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from tiny import assert_equal
from torch.nn import functional as F

from data import NORMALIZATION, normalize
from scans.files import DataError
from scans.organs import ORGANS
from scans.phantom import SPACING, make_phantom
from study import inference
from study.config import Checkpoint, Config, Training
from study.inference import (
    bfloat16_problem,
    choose_device,
    copy_to_cpu,
    load_model,
    mixed_precision,
    segment,
)
from study.results import TrainingFolder
from unet3d import UNet3D, memory_format

CPU = torch.device("cpu")

# --------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    ("device", "native", "emulated", "dtype"),
    [
        ("cuda", True, True, torch.bfloat16),
        ("cuda", False, True, None),
        ("cuda", False, False, None),
        ("cpu", True, True, None),
    ],
)
def test_mixed_precision_is_for_gpus_that_compute_in_it(
    device, native, emulated, dtype, monkeypatch
):
    def supported(including_emulation=True):
        return emulated if including_emulation else native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(inference, "bfloat16_problem", lambda: "")
    assert mixed_precision.__wrapped__(torch.device(device)) is dtype


@pytest.mark.parametrize(
    ("version", "wrong"),
    [(None, ""), (90701, ""), (90800, "9.8"), (91002, "9.10"), (91400, "9.14"), (91500, "")],
)
def test_cudnn_known_to_be_wrong_in_bfloat16_is_left_to_float32_and_it_is_said_once(
    version, wrong, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    mixed_precision.cache_clear()
    found = {mixed_precision(torch.device("cuda")) for _ in range(2)}
    mixed_precision.cache_clear()
    assert found == ({None} if wrong else {torch.bfloat16})
    problem, said = bfloat16_problem(), capsys.readouterr().err
    assert said == (f"{problem}: computing in float32, which is slower\n" if wrong else "")
    assert bool(problem) == bool(wrong) == ("pip install 'nvidia-cudnn-cu" in problem)
    assert f"cuDNN {wrong};" in problem or not wrong


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert [choose_device(), choose_device(3)] == [torch.device("cuda", n) for n in (0, 1)]
    assert chosen == [torch.device("cuda", n) for n in (0, 1)]
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32


# ------------------------------------------------------------------------------------ whole scans


class Threshold(torch.nn.Module):
    """Organ n where a voxel is above n."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        scores = [n * x - n * (n + 1) / 2 for n in self.slope]  # n overtakes n - 1 at x = n
        return torch.cat(scores, dim=1)


@pytest.mark.parametrize("shape", [(20, 31, 7), (8, 8, 8), (40, 3, 8)])
def test_a_model_that_looks_at_single_voxels_is_the_same_on_any_volume(shape):
    image = np.random.default_rng(0).uniform(-1, 5, shape).astype(np.float32)
    labels = segment(Threshold(), image, 8, shape)
    clear = abs(image - np.rint(image)) > 1e-3
    np.testing.assert_array_equal(labels[clear], np.floor(image).clip(0, 3)[clear])
    assert labels.dtype == np.uint8


def test_a_volume_is_segmented_as_by_monai_and_brought_to_the_scans_grid():
    torch.manual_seed(0)
    model = UNet3D(1, 4, 4, 3)
    image = normalize(make_phantom(1, "ct", 0)[0], "ct")
    size = (50, 41, 20)
    labels = segment(model, image, 16, size)
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


@pytest.mark.parametrize("message", ["CUDA out of memory", "shapes differ"])
def test_a_cpu_that_has_no_memory_has_nothing_left_to_try(message):
    def failing(_, x):
        calls.append(x)
        raise RuntimeError(message)

    calls, model = [], Threshold()
    model.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match=message):
        segment(model, np.zeros((8, 8, 8), np.float32), 8, (8, 8, 8))
    assert len(calls) == 1


# ----------------------------------------------------------------------------------- a saved model


def test_a_copy_of_the_weights_is_one():
    state = UNet3D(1, 4, 4, 3).to(memory_format=torch.channels_last_3d).state_dict()
    copy = copy_to_cpu(state)
    assert copy.keys() == state.keys()
    for key, w in state.items():
        assert torch.equal(copy[key], w)
        assert copy[key].stride() == w.stride()
        assert copy[key].data_ptr() != w.data_ptr()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model.pt of a training."""
    weights = UNet3D(1, 6, 2, 2).state_dict()
    settings = {"width": 2, "depth": 2, "ct_window": (-100.0, 300.0)}
    config = Config(**settings, out=str(tmp_path_factory.mktemp("run")))
    folder = TrainingFolder(config, Training(42, "fl", "1:5"))
    folder.keep_model(Checkpoint(1, weights, 1, 0.5, weights))
    return folder.path / "model.pt"


def test_a_model_comes_back_with_what_it_takes_to_use_it(saved):
    model, metadata = load_model(saved, CPU)
    assert_equal(model.state_dict(), torch.load(saved, weights_only=True)["weights"])
    assert metadata == {
        "organs": ORGANS,
        "spacing": SPACING,
        "patch": 32,
        "width": 2,
        "depth": 2,
        "normalization": {**NORMALIZATION, "ct": (-100.0, 300.0)},
        "phantoms": True,
        "arm": "fl 1:5",
        "seed": 42,
    }
    assert all(w.device == CPU for w in model.state_dict().values())
    kernel = model.encoders[0][0].weight
    assert kernel.is_contiguous(memory_format=memory_format(CPU))
    assert model(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 6, 32, 32, 32)


def refusal(path):
    with pytest.raises(DataError) as error:
        load_model(path, CPU)
    assert str(error.value).startswith(f"{path}: cannot be read (")
    return str(error.value)


def test_a_model_runs_no_code_and_must_be_one(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weights": Evil(), "model": {}}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("evil.pt", "text.pt", "empty.pt", "list.pt", "other.pt", "missing.pt"):
        reason = refusal(tmp_path / name)
        assert (name in ("list.pt", "other.pt")) == ("is not a model.pt" in reason)
    assert "code ran" not in capsys.readouterr().out


def test_a_model_with_a_bit_turned_is_refused(saved, tmp_path):
    """In its weights, which torch.load would not notice."""
    content, path = saved.read_bytes(), tmp_path / "turned.pt"
    weight = torch.load(saved, weights_only=True)["weights"]["head.bias"].numpy().tobytes()
    place = content.index(weight)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert torch.load(path, weights_only=True)["weights"]["head.bias"].isfinite().all()
    assert "damaged" in refusal(path)
    path.write_bytes(content[: len(content) // 2])
    refusal(path)


def of_mri(low, high):
    return {"normalization": {**NORMALIZATION, "mri": (low, high)}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 3}, "Error(s) in loading state_dict"),
        ({"organs": ORGANS[:3]}, "Error(s) in loading state_dict"),
        ({"width": 10**4}, "Error(s) in loading state_dict"),  # without its memory
        ({"depth": 40}, "patch 32 does not fit depth 40"),
        ({"patch": 31}, "patch 31 does not fit depth 2"),
        ({"patch": 2}, "patch 2 does not fit depth 2"),
        ({"patch": None}, "NoneType"),
        ({"organs": None}, "organs None"),
        ({"organs": ()}, "organs ()"),
        ({"spacing": 0.0}, "spacing 0.0"),
        ({"spacing": float("nan")}, "spacing nan"),
        (of_mri(1.0, 99.0), "another normalization: {'ct': (-160.0, 240.0), 'mri': (1.0, 99.0)"),
        ({"normalization": {**NORMALIZATION, "ct": (240.0, -160.0)}}, "another normalization"),
        ({"normalization": {**NORMALIZATION, "ct": (0.0, math.inf)}}, "another normalization"),
        ({"normalization": None}, "'NoneType' object has no attribute"),
    ],
)
def test_a_model_of_another_form_is_refused_at_once(change, reason, saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "model": content["model"] | change}, tmp_path / "other.pt")
    assert reason in refusal(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "spoil", [lambda w: w * torch.nan, lambda w: w / 0, torch.Tensor.double, torch.Tensor.half]
)
def test_weights_that_are_not_finite_or_not_float32_are_refused(spoil, saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    content["weights"]["head.bias"] = spoil(content["weights"]["head.bias"])
    torch.save(content, tmp_path / "sick.pt")
    assert "weights that are not float32 or not finite" in refusal(tmp_path / "sick.pt")
