"""GIN against a plain loop over images, and its promises: dtype, device, randomness, refusals."""

import itertools
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import gin_layer
from gin import GIN, gin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(shape):
    """Noise; each image is ten times as bright as the one before it."""
    scale = 10.0 ** torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    return scale * torch.randn(shape, generator=seeded(9))


IMAGES = [*map(images, [(3, 1, 40), (2, 3, 9, 14), (3, 1, 8, 7, 10), (1, 2, 5, 6, 7)])]
IMAGES += [images((2, 1, 6, 7, 8)).transpose(2, 4), torch.zeros(1, 1, 6, 6)]  # strided; black


def convolve(image, kernels, biases):
    """(C, *space) with (C_out, C, *k): shifted, weighted and added; outside the image all is 0."""
    reach, axes = kernels.shape[-1] // 2, image.ndim - 1
    padded = np.pad(image, [(0, 0)] + [(reach, reach)] * axes)
    out = np.zeros((len(kernels), *image.shape[1:])) + biases.reshape(-1, *[1] * axes)
    for at in np.ndindex(kernels.shape[2:]):
        window = [slice(start, start + n) for start, n in zip(at, image.shape[1:], strict=True)]
        out += np.tensordot(kernels[:, :, *at], padded[:, *window], axes=1)
    return out


def plain_gin(x, generator, n_layers=4, hidden_channels=2, kernel_sizes=(1, 3)):
    """The formula of the paper, image by image, in NumPy, with the same random numbers."""
    batch, c = x.shape[:2]
    channels, layers = [c] + [hidden_channels] * (n_layers - 1) + [c], []
    for c_in, c_out in itertools.pairwise(channels):
        k = kernel_sizes[torch.randint(len(kernel_sizes), (1,), generator=generator).item()]
        kernels = torch.randn(batch * c_out, c_in, *[k] * (x.ndim - 2), generator=generator)
        biases = torch.randn(batch * c_out, generator=generator)
        layers.append((np.split(kernels.numpy(), batch), np.split(biases.numpy(), batch)))
    alphas, outputs = torch.rand(batch, generator=generator).tolist(), []
    for i, image in enumerate(x.double().numpy()):
        h = image
        for n, (kernels, biases) in enumerate(layers):
            h = convolve(h, kernels[i], biases[i])
            if n < n_layers - 1:
                h = np.where(h > 0, h, 0.01 * h)
        m = alphas[i] * h + (1 - alphas[i]) * image
        outputs.append(m * np.sqrt((image**2).sum()) / (np.sqrt((m**2).sum()) + 1e-5))
    return np.stack(outputs)


@pytest.mark.parametrize("x", IMAGES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_layers": 3, "hidden_channels": 3},
        {"n_layers": 2, "hidden_channels": 5, "kernel_sizes": (5,)},
        {"n_layers": 1, "hidden_channels": 1, "kernel_sizes": (1,)},
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_plain_loop(x, settings, seed):
    before, redrawn = x.clone(), gin(x, **settings, generator=seeded(seed))
    assert torch.equal(x, before)
    for found, expected in zip(redrawn, plain_gin(x, seeded(seed), **settings), strict=True):
        atol = 1e-5 * abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)
    torch.manual_seed(seed)
    assert torch.equal(gin(x, **settings), redrawn)  # without a generator: by the default one


def test_the_benchmarks_naive_form_has_kernels_of_the_same_sizes(monkeypatch):
    x, sizes = torch.randn(2, 3, 6, 5, 7), {}

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtype_is_kept_and_arithmetic_is_float32_without_gradient(dtype, autocast):
    x = torch.randn(2, 1, 8, 8, 8).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        redrawn = gin(x, generator=seeded())
    assert (redrawn.dtype, redrawn.requires_grad) == (dtype, False)
    assert torch.equal(redrawn, gin(x.float(), generator=seeded()).to(dtype))


@pytest.mark.parametrize("redraw", [gin, GIN()])
@pytest.mark.parametrize(
    "shape",
    [(4, 4), (1, 1, 2, 2, 2, 2), (0, 1, 8, 8, 8), (2, 0, 8, 8), (2, 1, 8, 0, 8), "integers"],
)
def test_bad_input_is_refused(redraw, shape):
    x = torch.zeros(1, 1, 4, dtype=torch.int64) if shape == "integers" else torch.zeros(shape)
    with pytest.raises(ValueError, match="gin needs floats of shape"):
        redraw(x)


@pytest.mark.parametrize(
    "settings",
    [
        *({"kernel_sizes": sizes} for sizes in [(2,), (1, 4), (0,), (-1,), ()]),
        {"n_layers": 0},
        {"hidden_channels": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    for redraw in (lambda: gin(torch.zeros(1, 1, 4), **settings), lambda: GIN(0.5, **settings)):
        with pytest.raises(ValueError, match="odd kernel sizes"):
            redraw()


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_draws_are_the_cpus_whatever_the_default_device(generator):
    x = torch.randn(2, 1, 8)
    draws, found = generator or torch.default_generator, []
    for device in ("cpu", "meta"):
        draws.manual_seed(0)
        with torch.device(device):
            found.append(gin(x, generator=generator))
    assert torch.equal(*found)


def test_all_draws_reach_a_device_in_a_single_copy_as_they_were(monkeypatch):
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
    received = send(drawn, "cpu")  # a name equals no device, so that it stands in for a GPU
    assert copies == [(sum(part.numel() for part in drawn),)]
    assert all(map(torch.equal, received, drawn))
    assert len({part.untyped_storage().data_ptr() for part in received}) == 1


def test_a_layer_is_the_identity_in_eval_mode_and_at_p_0():
    x = torch.randn(2, 1, 6, 6, 6)
    assert GIN().eval()(x) is x
    assert GIN(p=0)(x) is x
    for p in (1.5, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            GIN(p=p)


@pytest.mark.parametrize("shape", [(2000, 2, 4), (2000, 1, 2, 2, 2)])
def test_a_layer_redraws_with_probability_p(shape):
    x = torch.randn(shape)
    once, again = (GIN(p=0.3, generator=seeded(1))(x) for _ in range(2))
    assert torch.equal(once, again)
    changed = (once != x).flatten(1).any(dim=1)
    assert torch.equal(once[changed], gin(x, generator=seeded(1))[changed])  # whole images
    assert abs(changed.float().mean() - 0.3) < 0.04


def test_a_layer_equals_the_function_and_shows_its_settings():
    settings, generator = {"n_layers": 3, "hidden_channels": 4, "kernel_sizes": (5,)}, seeded(4)
    x, layer = torch.randn(2, 1, 6, 6, 6), GIN(**settings, generator=seeded(4))
    for _ in range(2):
        assert torch.equal(layer(x), gin(x, **settings, generator=generator))
    assert repr(layer) == "GIN(p=1.0, n_layers=3, hidden_channels=4, kernel_sizes=(5,))"


@pytest.mark.slow
def test_it_compiles_for_batches_of_several_sizes():
    """A DataLoader's last batch is smaller: its size is symbolic, here from the first batch on."""
    x, layer = torch.randn(3, 1, 8, 8, 8), GIN(0.5)
    torch.manual_seed(0)
    expected = layer(x)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), expected)
