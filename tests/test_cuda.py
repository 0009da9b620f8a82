"""A GPU gives what the CPU gives, within bounds that are written here; skipped where there is none.

pytest -m cuda
"""

import functools

import numpy as np
import pytest
import tiny
import torch

import data
from evaluate import sliding_window
from federated import Client, RunningAverage, federated_rounds, train_locally
from gin import GIN
from scans import files
from study import inference
from study.inference import choose_device, load_model, mixed_precision, segment
from study.results import TrainingFolder
from unet3d import UNet3D, memory_format, segmentation_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]
CPU, CLASSES = torch.device("cpu"), 6


@pytest.fixture
def device(monkeypatch):
    """A GPU that multiplies in float32 proper, not in TF32, which has 10 bits of mantissa."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # and back, after choose_device
    return choose_device()


def network(device, width=8, depth=3, dtype=torch.float32):
    torch.manual_seed(0)
    model = UNet3D(1, CLASSES, width, depth)
    return model.to(device, dtype, memory_format=memory_format(device))


def batches(n, patch, device, dtype=torch.float32):
    """n pairs of images and (labels, None), the same on every device."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        images = torch.randn(2, 1, patch, patch, patch, generator=generator)
        labels = torch.randint(CLASSES, (2, patch, patch, patch), generator=generator)
        yield images.to(device, dtype), (labels.to(device, torch.uint8), None)


def loss_function(device, dtype=torch.float32):
    weight = torch.arange(1.0, CLASSES + 1, device=device, dtype=dtype)
    return functools.partial(segmentation_loss, weight=weight)


def mean_loss(steps, device, autocast=None):
    """Of a new network that is trained for so many steps."""
    drawn, loss = batches(steps, 32, device), loss_function(device)
    return train_locally(network(device), drawn, loss, lr=1e-3, autocast=autocast)


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖"""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(3, 1, 40), (2, 3, 19, 24), (3, 1, 18, 17, 20)])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("p", [1, 0.5])
def test_gin_draws_and_computes_the_same(shape, seed, p, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    layers = [GIN(p, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
    expected, found = layers[0](x), layers[1](x.to(device))
    assert found.device == device
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("partial", [False, True])
def test_the_loss_is_the_same(partial, device):
    logits = torch.randn(2, CLASSES, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    [(_, (labels, _))] = batches(1, 8, CPU)
    labelled = torch.arange(2 * CLASSES).view(2, CLASSES) % 4 != 3
    losses = []
    for d in (CPU, device):
        known = labelled.to(d) if partial else None
        losses.append(loss_function(d)(logits.to(d), (labels.to(d), known)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_gradients_of_a_training_step_are_the_same(device):
    """In float64, where channels-last and contiguous, group and instance norm agree to 1e-13."""
    gradients, dtype = [], torch.float64
    for d in (CPU, device):
        model, [(images, targets)] = network(d, dtype=dtype), batches(1, 32, d, dtype)
        loss_function(d, dtype)(model(images), targets).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        assert distance(gradients[1][key], expected) < 1e-9, key


def test_training_goes_the_same_way(device):
    assert mean_loss(10, device) == pytest.approx(mean_loss(10, CPU), rel=1e-3)


def test_the_sliding_window_is_the_same(device):
    volume = torch.randn(1, 50, 33, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = (sliding_window(network(d), volume.to(d), 16) for d in (CPU, device))
        apart = sliding_window(lambda x: network(device)(x.to(device)), volume, 16)  # blended here
    assert (found.device, apart.device) == (device, CPU)
    assert distance(found, expected) < 1e-4
    assert distance(apart, expected) < 1e-4


def test_the_average_is_the_same_and_stays_there(device):
    generator, averages = torch.Generator().manual_seed(3), (RunningAverage(), RunningAverage())
    for n_k in (1, 5, 40):
        w_k = {"w": torch.randn(8, 27, generator=generator)}
        averages[0].add(w_k, n_k)
        averages[1].add({"w": w_k["w"].to(device)}, n_k)
    expected, found = (average.result()["w"] for average in averages)
    assert found.device == device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-7)


def test_training_in_bfloat16_goes_the_same_way(device):
    if mixed_precision(device) is None:
        pytest.skip("this GPU, or its cuDNN, has no bfloat16 that can be used")
    found = mean_loss(20, device, torch.bfloat16)
    assert found == pytest.approx(mean_loss(20, device), rel=0.02)


def test_memory_does_not_grow_with_the_hospitals(device):
    def peak_memory(hospitals, steps):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        client = Client(1, lambda _: batches(steps, 32, device), loss_function(device))
        clients = dict.fromkeys(range(hospitals), client)
        for _ in federated_rounds(network(device, width=16), clients, 2, lambda _: 1e-3):
            pass
        return torch.cuda.max_memory_allocated() - before

    peak_memory(2, 2)  # what cuDNN and cuBLAS keep
    assert peak_memory(32, 1) <= 1.01 * peak_memory(2, 16)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    args = ["--scenario", "limited", "--seeds", 1, "--out"]
    keep_round, kept = TrainingFolder.keep_round, []

    def stop(folder, checkpoint):
        keep_round(folder, checkpoint)
        kept.append(checkpoint.round)
        if len(kept) == 3:
            raise KeyboardInterrupt

    assert tiny.command(*args, tmp_path / "calm") == 0
    with monkeypatch.context() as patch:
        patch.setattr(TrainingFolder, "keep_round", stop)
        assert tiny.command(*args, tmp_path / "out") == 130
    assert kept == [1, 2, 3]
    assert tiny.command(*args, tmp_path / "out") == 0
    calm, resumed = (files.read_csv(tmp_path / name / "history.csv") for name in ("calm", "out"))
    for a, b in zip(calm, resumed, strict=True):  # cuDNN may add up in another order
        assert [b[name] for name in ("seed", "arm", "round")] == [a["seed"], a["arm"], a["round"]]
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=0.02)
    model, _ = load_model(tmp_path / "out/fedgin-1-5-p1-seed1/model.pt", CPU)  # by a GPU
    assert next(model.parameters()).device == CPU


def test_batches_are_pinned():
    batch = (torch.zeros(2, 1, 8, 8, 8), torch.ones(2, dtype=torch.int64))
    [found] = data.prefetch(iter([batch]), pin=True)
    assert all(part.is_pinned() for part in found)


def test_a_volume_that_does_not_fit_is_put_together_on_the_cpu(device):
    """The GPU is found full at the fourth batch of the first attempt."""
    image, calls = np.random.default_rng(0).normal(size=(40, 33, 50)).astype(np.float32), []
    size, model = (80, 66, 61), network(device).eval()
    on_gpu = segment(model, image, 16, size)

    def fill(module, inputs):
        calls.append(inputs[0].shape)
        if len(calls) == 4:
            torch.empty(2**60, dtype=torch.uint8, device=device)  # raises OutOfMemoryError

    model.register_forward_pre_hook(fill)
    recovered, n_calls = segment(model, image, 16, size), len(calls)
    on_cpu = inference._segment(model, image, 16, size, CPU)
    assert n_calls == 4 + len(calls) - n_calls  # the whole volume once more
    assert (recovered == on_cpu).mean() > 0.9999  # cuDNN may add up in another order
    assert (on_gpu == on_cpu).mean() > 0.999  # except for ties


def test_the_current_device_is_the_chosen_one():
    device = choose_device(torch.cuda.device_count())
    assert device == torch.device("cuda", 0)
    assert torch.cuda.current_device() == 0
