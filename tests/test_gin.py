"""GIN against a plain loop over images, and its promises: norm, dtype, device, randomness."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import gin_layer
from gin import GIN, gin


def plain_gin(x, seed, n_layers=4, hidden=2, kernel_sizes=(1, 3)):
    """The formula of the paper, image by image, with the same random numbers."""
    generator = torch.Generator().manual_seed(seed)
    batch, c = x.shape[:2]
    conv = [F.conv1d, F.conv2d, F.conv3d][x.ndim - 3]
    channels = [c] + [hidden] * (n_layers - 1) + [c]
    layers = []
    for c_in, c_out in itertools.pairwise(channels):
        k = kernel_sizes[torch.randint(len(kernel_sizes), (1,), generator=generator).item()]
        kernels = torch.randn(batch * c_out, c_in, *[k] * (x.ndim - 2), generator=generator)
        biases = torch.randn(batch * c_out, generator=generator)
        layers.append((k, kernels.split(c_out), biases.split(c_out)))
    alphas = torch.rand(batch, generator=generator)
    outputs = []
    for i in range(batch):
        h = x[i : i + 1].double()
        for n, (k, kernels, biases) in enumerate(layers):
            h = conv(h, kernels[i].double(), biases[i].double(), padding=k // 2)
            if n < n_layers - 1:
                h = torch.where(h > 0, h, 0.01 * h)
        m = alphas[i] * h + (1 - alphas[i]) * x[i]
        norm_x, norm_m = (math.sqrt((t.double() ** 2).sum()) for t in (x[i], m))
        outputs.append(m * norm_x / (norm_m + 1e-5))
    return torch.cat(outputs)


@pytest.mark.parametrize("shape", [(3, 1, 40), (2, 3, 9, 14), (3, 1, 8, 7, 10), (1, 2, 5, 6, 7)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_plain_loop(shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    expected = plain_gin(x, seed)
    redrawn = gin(x, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(redrawn.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_benchmarks_naive_form_has_kernels_of_the_same_sizes(channels, monkeypatch):
    x, sizes = torch.randn(2, channels, 6, 5, 7), {}

    def convolve(name, conv3d=F.conv3d):
        def wrapper(h, kernel, *args, **options):
            sizes.setdefault(name, []).append(kernel.shape)
            return conv3d(h, kernel, *args, **options)

        return wrapper

    for name, side in gin_layer.sides(x, calls=5).items():
        monkeypatch.setattr(F, "conv3d", convolve(name))
        monkeypatch.setitem(sys.modules["gin"].CONVOLUTION, 3, F.conv3d)
        side()
    assert sizes["naive"] == sizes["gin"]
    assert len(sizes["gin"]) == 5 * 4


def convolve(image, kernels, biases):
    """(C, D, H, W) with (C_out, C, k, k, k), voxel by voxel; outside the image everything is 0."""
    reach = kernels.shape[-1] // 2
    padded = np.pad(image, [(0, 0)] + [(reach, reach)] * 3)
    out = np.zeros((len(kernels), *image.shape[1:]))
    for o, z, y, x in np.ndindex(out.shape):
        out[o, z, y, x] = biases[o]
        for c, i, j, k in np.ndindex(kernels.shape[1:]):
            out[o, z, y, x] += kernels[o, c, i, j, k] * padded[c, z + i, y + j, x + k]
    return out


@pytest.mark.parametrize("sizes", [[3, 1, 3], [1, 1, 1], [1, 3, 1], [3]])
def test_equals_numpy_on_fixed_numbers(sizes, monkeypatch):
    """Two images with two channels, the random numbers given: nothing here is PyTorch's."""
    rng = np.random.default_rng(len(sizes))
    images = rng.normal(size=(2, 2, 3, 2, 4))
    alphas, channels = [0.3, 0.8], [2] + [3] * (len(sizes) - 1) + [2]
    layers = [
        (rng.normal(size=(2, c_out, c_in, k, k, k)), rng.normal(size=(2, c_out)))
        for k, (c_in, c_out) in zip(sizes, itertools.pairwise(channels), strict=True)
    ]
    drawn = {
        torch.randint: [np.array([(1, 3).index(k)]) for k in sizes],
        torch.randn: [a.reshape(-1, *a.shape[2:]) for layer in layers for a in layer],
        torch.rand: [np.reshape(alphas, (2, 1, 1, 1, 1))],
    }

    def draw(sampler, shape, *_):
        numbers = drawn[sampler].pop(0)
        assert numbers.shape == shape
        return torch.tensor(numbers).to(torch.int64 if sampler is torch.randint else torch.float32)

    monkeypatch.setattr(sys.modules["gin"], "_draw", draw)
    redrawn = gin(torch.tensor(images), n_layers=len(sizes), hidden_channels=3)
    assert not any(drawn.values())
    for i, image in enumerate(images):
        h = image
        for n, (kernels, biases) in enumerate(layers):
            h = convolve(h, kernels[i], biases[i])
            if n + 1 < len(layers):
                h = np.maximum(h, 0) + 0.01 * np.minimum(h, 0)
        m = alphas[i] * h + (1 - alphas[i]) * image
        expected = m * np.sqrt((image**2).sum()) / (np.sqrt((m**2).sum()) + 1e-5)
        np.testing.assert_allclose(redrawn[i], expected, rtol=1e-5, atol=1e-5)


def test_settings_reach_the_network():
    x = torch.randn(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(9))
    settings = {"n_layers": 2, "hidden_channels": 5, "kernel_sizes": (5,)}
    expected = plain_gin(x, 3, n_layers=2, hidden=5, kernel_sizes=(5,))
    redrawn = gin(x, generator=torch.Generator().manual_seed(3), **settings)
    torch.testing.assert_close(redrawn.double(), expected, rtol=1e-4, atol=1e-5)


def test_keeps_the_norm_of_each_image_and_changes_it():
    x = torch.randn(4, 1, 12, 12, 12) * torch.tensor([1e-2, 1, 10, 1e3]).view(4, 1, 1, 1, 1)
    redrawn = gin(x)
    torch.testing.assert_close(
        redrawn.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-3, atol=0
    )
    assert ((redrawn - x).flatten(1).norm(dim=1) > 0.01 * x.flatten(1).norm(dim=1)).any()


def test_each_image_has_a_network_of_its_own():
    x = torch.randn(1, 1, 8, 8, 8).expand(4, -1, -1, -1, -1)
    redrawn = gin(x, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(redrawn[i], redrawn[j], rtol=0.01)


def test_statistics_of_the_draws():
    """One linear layer with kernel 1 can be undone, which gives α, the kernel and the bias back."""
    n, x = 20000, torch.tensor([[[2.0, 1.0, 0.0]]], dtype=torch.float64)
    torch.manual_seed(0)
    replay = torch.random.get_rng_state()
    redrawn = gin(x.expand(n, 1, 3), n_layers=1, kernel_sizes=(1,))[:, 0].double()
    torch.random.set_rng_state(replay)
    torch.randint(1, (1,))
    kernel, bias, alpha = torch.randn(n), torch.randn(n), torch.rand(n)
    m = alpha[:, None] * (kernel[:, None] * x[0] + bias[:, None]) + (1 - alpha[:, None]) * x[0]
    expected = m * 5**0.5 / (m.norm(dim=1, keepdim=True) + 1e-5)
    torch.testing.assert_close(redrawn, expected, rtol=1e-3, atol=1e-4)
    for draws, mean, variance in ((kernel, 0, 1), (bias, 0, 1), (alpha, 0.5, 1 / 12)):
        assert abs(draws.mean() - mean) < 0.03
        assert abs(draws.var() - variance) < 0.03


def test_kernel_sizes_are_drawn_evenly():
    torch.manual_seed(0)
    impulse = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]])
    reached = 0
    for _ in range(400):
        redrawn = gin(impulse, n_layers=1)[0, 0]
        reached += bool((redrawn[1] - redrawn[0]).abs() > 1e-4)  # a kernel of 3 reaches neighbours
    assert 160 < reached < 240


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_arithmetic_is_float32(dtype):
    x = torch.randn(2, 1, 8, 8, 8).to(dtype)
    redrawn = gin(x, generator=torch.Generator().manual_seed(0))
    assert redrawn.dtype == dtype
    assert redrawn.shape == x.shape
    in_float32 = gin(x.float(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(redrawn, in_float32.to(dtype))


def test_autocast_changes_nothing():
    x = torch.randn(2, 1, 8, 8, 8)
    expected = gin(x, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gin(x, generator=torch.Generator().manual_seed(0)), expected)


def test_zero_image_stays_finite_and_input_untouched():
    x = torch.zeros(2, 1, 6, 6, 6)
    assert torch.equal(gin(x), torch.zeros_like(x))
    x = torch.randn(2, 1, 6, 6)
    copy = x.clone()
    gin(x)
    assert torch.equal(x, copy)


def test_no_gradient():
    x = torch.randn(1, 1, 6, 6, requires_grad=True)
    assert not gin(x).requires_grad


def test_non_contiguous_input():
    x = torch.randn(2, 1, 6, 7, 8).transpose(2, 4)
    one, two = (torch.Generator().manual_seed(0) for _ in range(2))
    torch.testing.assert_close(gin(x, generator=one), gin(x.contiguous(), generator=two))


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 4), torch.zeros(1, 1, 2, 2, 2, 2), torch.zeros(1, 1, 4, dtype=torch.int64)]
)
def test_bad_input_is_refused(x):
    with pytest.raises(ValueError, match="floats of shape"):
        gin(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_sizes": (2,)},
        {"kernel_sizes": (1, 4)},
        {"kernel_sizes": (0,)},
        {"kernel_sizes": (-1,)},
        {"n_layers": 0},
        {"hidden_channels": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="odd kernel sizes"):
        gin(torch.zeros(1, 1, 4), **settings)


def test_the_smallest_settings_will_do():
    x = torch.randn(2, 1, 5)
    settings = {"n_layers": 1, "hidden_channels": 1, "kernel_sizes": (1,)}
    assert gin(x, **settings).shape == x.shape


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_draws_are_the_cpus_whatever_the_default_device(generator):
    x = torch.randn(2, 1, 8)
    draws, found = generator or torch.default_generator, []
    for device in ("cpu", "meta"):
        draws.manual_seed(0)
        with torch.device(device):
            found.append(gin(x, generator=generator))
    assert torch.equal(*found)


def test_all_draws_reach_a_device_in_a_single_copy(monkeypatch):
    """The meta device stands in for a GPU: it takes tensors, though no numbers."""
    module, sent, copies = sys.modules["gin"], [], []
    send, to = module._send, torch.Tensor.to
    monkeypatch.setattr(module, "_send", lambda *args: sent.append(args[0]) or send(*args))
    GIN(kernel_sizes=(3,))(torch.randn(2, 1, 6, 6, 6))
    [drawn] = sent
    assert sum(part.numel() for part in drawn) == 2 * (27 * (2 + 4 + 4 + 2) + 2 + 2 + 2 + 1 + 1)

    def counted(tensor, *args, **kwargs):
        copies.append(tensor.shape)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    received = send(drawn, torch.device("meta"))
    assert copies == [(sum(part.numel() for part in drawn),)]
    assert [part.shape for part in received] == [part.shape for part in drawn]


def test_what_is_sent_together_arrives_as_it_was():
    sent = [torch.randn(shape) for shape in ((4, 1, 3, 3), (4,), (), (2, 1, 1))]
    received = sys.modules["gin"]._send(sent, "cpu")  # a name equals no device, so it is packed
    for a, b in zip(sent, received, strict=True):
        assert torch.equal(a, b)
    assert len({part.untyped_storage().data_ptr() for part in received}) == 1


def test_module_is_the_identity_in_eval_mode_and_at_p_0():
    x = torch.randn(2, 1, 6, 6, 6)
    assert GIN().eval()(x) is x
    assert GIN(p=0)(x) is x
    with pytest.raises(ValueError, match="between 0 and 1"):
        GIN(p=1.5)


@pytest.mark.parametrize("shape", [(2000, 2, 4), (2000, 1, 2, 2, 2)])
def test_module_redraws_a_share_p(shape):
    x = torch.randn(shape)
    once, again = (GIN(p=0.3, generator=torch.Generator().manual_seed(1))(x) for _ in range(2))
    assert once.shape == x.shape
    assert torch.equal(once, again)
    changed = (once != x).flatten(1)
    assert torch.equal(changed.any(dim=1), changed.float().mean(dim=1) > 0.9)  # whole images
    assert abs(changed.any(dim=1).float().mean() - 0.3) < 0.04
    assert (GIN()(x) != x).flatten(1).any(dim=1).all()


def test_module_equals_the_function():
    x = torch.randn(2, 1, 6, 6, 6)
    one, other = (torch.Generator().manual_seed(4) for _ in range(2))
    layer = GIN(n_layers=3, generator=one)
    for _ in range(2):
        assert torch.equal(layer(x), gin(x, n_layers=3, generator=other))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [gin, GIN(), GIN(0.5), nn.Sequential(GIN(), nn.Conv3d(1, 2, 3, padding=1))]
)
def test_it_compiles_for_batches_of_several_sizes(layer):
    """A DataLoader's last batch is smaller, and from the second size on sizes are symbolic."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for size in (4, 3, 2):
        x = torch.randn(size, 1, 8, 8, 8)
        torch.manual_seed(size)
        expected = layer(x)
        torch.manual_seed(size)
        torch.testing.assert_close(compiled(x), expected)


def test_a_layer_shows_its_settings_and_refuses_wrong_ones_at_once():
    assert repr(GIN(0.5)) == "GIN(p=0.5, n_layers=4, hidden_channels=2, kernel_sizes=(1, 3))"
    shown = repr(GIN(n_layers=1, hidden_channels=3, kernel_sizes=(5,)))
    assert shown == "GIN(p=1.0, n_layers=1, hidden_channels=3, kernel_sizes=(5,))"
    for wrong in ({"n_layers": 0}, {"hidden_channels": 0}, {"kernel_sizes": (1, 2)}):
        with pytest.raises(ValueError, match="odd kernel sizes"):
            GIN(0.5, **wrong)
    for wrong in ({"kernel_sizes": ()}, {"p": 1.5}):
        with pytest.raises(ValueError):
            GIN(**wrong)
    with pytest.raises(TypeError, match="layers"):
        GIN(0.5, layers=3)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8, 8), (2, 0, 8, 8), (2, 1, 8, 0, 8)])
def test_an_empty_batch_is_refused(shape):
    for redraw in (gin, GIN()):
        with pytest.raises(ValueError, match="gin needs floats of shape"):
            redraw(torch.zeros(shape))
