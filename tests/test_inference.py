"""Devices, precision, whole scans against MONAI, and models that are read or refused."""

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from tiny import assert_equal
from torch.nn import functional as F

import fedgin
from data import NORMALIZATION, normalize
from scans.files import DataError
from scans.layouts import ORGANS
from scans.phantom import SPACING, make_phantom
from study import inference
from study.inference import (
    bfloat16_problem,
    choose_device,
    copy_to_cpu,
    load_model,
    mixed_precision,
    segment,
)
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
    monkeypatch.setattr(inference, "bfloat16_problem", lambda device: "")
    assert mixed_precision.__wrapped__(torch.device(device)) is dtype


def test_a_gpu_that_computes_wrong_in_bfloat16_is_left_to_float32_and_it_is_said(
    monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(inference, "bfloat16_problem", lambda d: asked.append(d) or "it is wrong")
    mixed_precision.cache_clear()
    for _ in range(2):
        assert mixed_precision(torch.device("cuda")) is None
    mixed_precision.cache_clear()
    assert asked == [torch.device("cuda")]
    assert capsys.readouterr().err == "it is wrong: computing in float32, slower\n"


@pytest.mark.parametrize(
    ("version", "refused"),
    [(None, ""), (90701, ""), (90800, "9.8"), (91002, "9.10"), (91400, "9.14"), (91500, "")],
)
def test_versions_known_to_be_wrong_in_bfloat16_are_refused(version, refused, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    problem = bfloat16_problem(torch.device("cpu"))
    assert problem == "" or f"cuDNN {refused};" in problem
    assert bool(problem) == bool(refused) == ("pip install 'nvidia-cudnn-cu" in problem)


def test_a_wrong_convolution_in_bfloat16_is_noticed(monkeypatch):
    """As in pytorch#163539: a part of the output is not what it should be."""
    conv3d = F.conv3d

    def wrong(x, *args, **kwargs):
        found = conv3d(x, *args, **kwargs)
        if x.dtype == torch.bfloat16:
            found[0, 3, 2, 5, 5] = 0
            found[1, :, 2:] *= 1.05
        return found

    monkeypatch.setattr(F, "conv3d", wrong)
    assert "a convolution in bfloat16 is off by" in bfloat16_problem(torch.device("cpu"))


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

    def __init__(self, organs=3):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.arange(organs + 1.0))

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


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes differ")]
)
def test_a_cpu_that_has_no_memory_has_nothing_left_to_try(error):
    class Failing(Threshold):
        def forward(self, x):
            calls.append(x)
            raise error

    calls = []
    with pytest.raises(type(error), match=str(error)):
        segment(Failing(), np.zeros((8, 8, 8), np.float32), 8, (8, 8, 8))
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
    """The model.pt of a run."""
    out = tmp_path_factory.mktemp("run") / "out"
    tiny = ["--rounds", "1", "--local-steps", "1", "--batch-size", "2", "--arms", "fl"]
    tiny += ["--patch", "32", "--width", "2", "--depth", "2"]
    assert fedgin.main([*tiny, "--out", str(out)]) == 0
    return out / "fl-1-5-seed42/model.pt"


def test_a_model_comes_back_with_what_it_takes_to_use_it(saved):
    model, about = load_model(saved, CPU)
    assert_equal(model.state_dict(), torch.load(saved, weights_only=True)["weights"])
    assert about == {
        "organs": ORGANS,
        "spacing": SPACING,
        "patch": 32,
        "width": 2,
        "depth": 2,
        "normalization": NORMALIZATION,
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
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_a_model_runs_no_code_and_must_be_one(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weights": Evil(), "model": {}}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "text.pt", "junk.pt", "empty.pt", "list.pt", "missing.pt"):
        assert ": cannot be read (" in refusal(tmp_path / name)
    torch.save({"weights": {}}, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt").endswith("; give a model.pt of fedgin.py")
    assert "code ran" not in capsys.readouterr().out


def test_a_model_with_a_bit_turned_is_refused(saved, tmp_path):
    """In its weights, which torch.load would not notice."""
    content, path = saved.read_bytes(), tmp_path / "turned.pt"
    weight = torch.load(saved, weights_only=True)["weights"]["head.bias"].numpy().tobytes()
    place = content.index(weight)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert torch.load(path, weights_only=True)["weights"]["head.bias"].isfinite().all()
    assert "is damaged" in refusal(path)
    path.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 3}, "Error(s) in loading state_dict"),
        ({"organs": ORGANS[:3]}, "Error(s) in loading state_dict"),
        ({"width": 10**9}, "width 1000000000"),
        ({"width": 2.0}, "width 2.0"),
        ({"depth": 40}, "depth 40"),
        ({"depth": 10**20}, "depth 100000000000000000000"),
        ({"depth": 0}, "depth 0"),
        ({"patch": 31}, "patch 31 does not fit depth 2"),
        ({"patch": 2}, "patch 2 does not fit depth 2"),
        ({"patch": None}, "patch None"),
        ({"organs": None}, "organs None"),
        ({"organs": ()}, "organs ()"),
        ({"spacing": 0.0}, "spacing 0.0"),
        ({"spacing": float("nan")}, "spacing nan"),
        (
            {"normalization": {**NORMALIZATION, "mri": (1.0, 99.0)}},
            "it was trained with another normalization: {'ct': (-160.0, 240.0), 'mri': (1.0, 99.0)",
        ),
        ({"normalization": None}, "AttributeError"),
    ],
)
def test_a_model_of_another_form_is_refused_at_once(change, reason, saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "model": content["model"] | change}, tmp_path / "other.pt")
    message = refusal(tmp_path / "other.pt")
    assert ": is not as this program left it (" in message
    assert reason in message
    assert message.endswith("; give a model.pt of fedgin.py")


def test_a_model_may_have_a_ct_window_of_its_own_and_says_so(saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    window = {**NORMALIZATION, "ct": (-100.0, 300.0)}
    torch.save({**content, "model": content["model"] | {"normalization": window}}, tmp_path / "w")
    _, about = load_model(tmp_path / "w", CPU)
    assert about["normalization"] == window


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.fill_(float("nan")),
        lambda w: w.fill_(float("inf")),
        lambda w: w.double(),
        lambda w: w.half(),
    ],
)
def test_weights_that_are_not_finite_or_not_float32_are_refused(spoil, saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    content["weights"]["head.bias"] = spoil(content["weights"]["head.bias"])
    torch.save(content, tmp_path / "sick.pt")
    assert "weights that are not float32 or not finite" in refusal(tmp_path / "sick.pt")
