"""What a GPU would be asked to do, by PyTorch's fake tensors, which need none.

They know devices, dtypes and shapes and hold no numbers; an operator on tensors of two devices
raises. The forward pass runs as it is. The backward pass would need a GPU's driver: gradients of
zeros stand in for it.
"""

import collections
import os

import conftest
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedgin
from federated import train_locally
from study import inference
from study.config import Config, Training
from study.hospitals import load_hospitals

GPU = torch.device("cuda", 0)
STEPS = 3
CONFIG = Config("complete", rounds=1, local_steps=STEPS, width=2, depth=2)


class Watch(TorchDispatchMode):
    """Counts where the CPU would wait for the GPU: to read a number, to copy from it, to count."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def number(self, tensor):
        """What stands in for a number: weights there are finite, labels here are not complete."""
        on_gpu = tensor.device.type == "cuda"
        self.waits["number"] += on_gpu
        return {torch.bool: on_gpu, torch.int64: 1}.get(tensor.dtype, 0.5)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self.number(*args)
        found = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], found) if name == "_to_copy" else (args[1], args[0])
            self.waits["copy"] += (source.device.type, target.device.type) == ("cuda", "cpu")
        self.waits["count"] += name == "nonzero" and args[0].device.type == "cuda"
        return found


class Calls(TorchFunctionMode):
    """Does without a driver, for which PyTorch asks where tensors are indexed, read and copied."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensor = torch.Tensor
        if function in (tensor.__float__, tensor.__int__, tensor.__bool__, tensor.item):
            return self.watch.number(*args)
        if function is tensor.copy_:
            return args[0].add_(args[1].to(args[0].device))
        if function not in (tensor.__getitem__, tensor.__setitem__):
            return function(*args, **(kwargs or {}))
        x, index, *value = args
        if isinstance(index, tensor):
            return x.masked_fill_(index, *value)
        like = torch.empty_strided(x.shape, x.stride(), device="meta")[index]
        offset = x.storage_offset() + like.storage_offset()
        part = x.as_strided(like.shape, like.stride(), offset)
        return part.add_(*value) if value else part


@pytest.fixture
def watch(monkeypatch):
    """A GPU that computes in bfloat16, and a watch over it."""
    to_numpy = torch.Tensor.numpy

    def numpy(tensor):
        if not isinstance(tensor, FakeTensor):
            return to_numpy(tensor)
        assert tensor.device.type == "cpu"
        return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    def backward(loss):
        assert loss.device == GPU
        for w in weights:
            w.grad = torch.zeros_like(w)

    def move(model, device, **_):
        """nn.Module.to would move weights in their place, which fake tensors do not allow."""
        for module in model.modules():
            for name, w in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(w.to(device), requires_grad=False)
        weights[:] = model.parameters()
        return model

    weights = []
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(inference, "bfloat16_problem", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    not_available = "torch.cuda.amp.common.amp_definitely_not_available"
    monkeypatch.setattr(not_available, lambda: False, raising=False)
    inference.mixed_precision.cache_clear()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), Watch() as watch, Calls(watch):
        yield watch
    inference.mixed_precision.cache_clear()


@pytest.fixture(scope="module")
def everyone():
    return load_hospitals(CONFIG)[0][42]


@pytest.mark.parametrize(
    ("marks", "seen"), [("", ""), ("not thorough", ""), ("not cuda", ""), ("cuda", "0,1")]
)
def test_only_the_tests_for_a_gpu_see_one(marks, seen, pytestconfig, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(pytestconfig.option, "markexpr", marks)
    conftest.pytest_configure(pytestconfig)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.fixture
def model(watch):
    return fedgin.make_model(CONFIG, 42, GPU)


def train(everyone, model):
    """The steps of a hospital in a round, some of whose cases lack an organ's labels."""
    for hospital in everyone:
        for case in hospital.train[::2]:
            case.read_volume().labelled[2] = False
    clients = fedgin.make_clients(CONFIG, Training(42, "fedgin", p=0.5), everyone, GPU)
    client, dtype = clients["mri"], inference.mixed_precision(GPU)
    return train_locally(model, client.batches(1), client.loss_function, lr=1e-3, autocast=dtype)


@pytest.mark.parametrize(
    ("hook", "waits"),
    [
        (lambda found: found, 1),  # for the mean loss, at the end
        (lambda found: found * found.mean().item(), 1 + STEPS),  # this would be noticed
    ],
)
def test_a_training_step_waits_for_nothing(hook, waits, watch, model, everyone):
    dtypes = []
    model.head.register_forward_hook(lambda module, x, y: dtypes.append(y.dtype) or hook(y))
    watch.waits.clear()
    train(everyone, model)
    assert +watch.waits == {"number": waits}
    assert dtypes == [torch.bfloat16] * STEPS


def test_a_round_and_its_validation_end_on_the_cpu(watch, everyone):
    training = Training(42, "fedgin", p=1.0)
    clients = fedgin.make_clients(CONFIG, training, everyone, GPU)
    held_out = [hospital.val[0] for hospital in everyone if hospital.val]
    [checkpoint] = fedgin.train_arm(CONFIG, training, clients, held_out, GPU)
    weights = checkpoint.best_weights
    assert {w.device.type for w in weights.values()} == {"cpu"}
    assert len({w.untyped_storage()._cdata for w in weights.values()}) == 1  # a single copy


def test_the_test_of_a_case_waits_for_its_lowest_voxel_and_its_labels(watch, model, everyone):
    watch.waits.clear()
    [(_, _, scores)] = fedgin.run_test(CONFIG, model, [(everyone[0], everyone[0].test[0])])
    assert +watch.waits == {"number": 1, "copy": 1}
    assert scores.keys() == set(CONFIG.organs)


@pytest.mark.parametrize("text", ["CUDA out of memory", "GET was unable to find an engine to"])
def test_a_volume_that_does_not_fit_is_put_together_on_the_cpu(text, watch, model):
    errors = [RuntimeError(text)]

    def fail_once(module, inputs):
        if errors:
            raise errors.pop()

    model.register_forward_pre_hook(fail_once)
    image, size = np.zeros((40, 32, 32), np.float32), (50, 40, 40)
    watch.waits.clear()
    assert inference.segment(model, image, 32, size).shape == size
    assert watch.waits["copy"] == 1  # the logits of the only batch of windows
    errors.append(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        inference.segment(model, image, 32, size)
