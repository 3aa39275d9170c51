"""The GPU that is not there: what it refuses, and what it counts."""

from __future__ import annotations

import io
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pretended_gpu import GPU, PretendedGPU


@pytest.fixture
def gpu():
    with PretendedGPU() as gpu:
        yield gpu


def test_numbers_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(3, 4)
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    with PretendedGPU():
        there = deepcopy(model).to("cuda")
        found = there(x.to("cuda"))
        found.square().sum().backward()
        assert found.device == GPU
        assert torch.equal(found.cpu(), y)
        assert all(torch.equal(p.grad.cpu(), g) for p, g in zip(there.parameters(), gradients, strict=True))


def test_complex_numbers_have_the_gradients_of_the_cpu():
    """As rotary embeddings use them: their gradients are products with conjugates, which PyTorch only marks as such."""
    torch.manual_seed(0)
    turns, x = torch.polar(torch.ones(3, 2), torch.randn(3, 2)), torch.randn(3, 2, 2)

    def gradient(x: Tensor) -> Tensor:
        turned = torch.view_as_real(torch.view_as_complex(x) * turns.to(x.device))
        return torch.autograd.grad(turned[..., 0].sum(), x)[0]

    with PretendedGPU():
        found = gradient(x.to("cuda").requires_grad_()).cpu()
    assert torch.equal(found, gradient(x.requires_grad_()))


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.stack([there.sum(), here.sum()]),
        lambda there, here: there @ here,
        lambda there, here: there.add_(here),
        lambda there, here: here.add_(there),
        lambda there, here: torch.randn(2, generator=torch.Generator(), device=there.device),
    ],
)
def test_what_a_gpu_refuses(gpu, mixed):
    with pytest.raises(RuntimeError, match="expected"):
        mixed(torch.ones(3, device="cuda"), torch.ones(3))


def test_what_a_gpu_takes_of_the_cpu(gpu):
    there = torch.ones(3, device="cuda:0")
    for result in (there * torch.tensor(2.0), there[torch.tensor([0, 2])], there.clone().copy_(torch.zeros(3))):
        assert result.is_cuda


@pytest.mark.parametrize(
    ("waits", "does"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool((x > 0).any())),
        ("_to_copy", lambda x: x.cpu()),
        ("_to_copy", lambda x: x.tolist()),
        ("_to_copy", lambda x: torch.ones(3).to("cuda")),
        ("_to_copy", lambda x: torch.tensor([1.0, 2.0], device="cuda")),
        ("copy_", lambda x: x.copy_(torch.ones(3))),
        ("nonzero", lambda x: x.nonzero()),
        ("_unique2", lambda x: x.unique()),
        ("equal", lambda x: torch.equal(x, x)),
        ("index", lambda x: x[x > 0]),
        ("index", lambda x: x[torch.tensor([1])]),
    ],
)
def test_waits_are_counted_where_they_are(gpu, waits, does):
    x = torch.ones(3, device="cuda")
    gpu.reset()
    does(x)
    ((place, count),) = gpu.waits.items()
    assert place.startswith(f"{waits} at tests/benchmarks/test_pretended_gpu.py:")
    assert count == 1


@pytest.mark.parametrize(
    "does",
    [
        lambda x: torch.ones(3).to("cuda", non_blocking=True),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
        lambda x: x.where(x > 0, 0).sum(),
        lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.arange(3, device=x.device),
    ],
)
def test_what_need_not_wait(gpu, does):
    x = torch.ones(3, device="cuda")
    gpu.reset()
    does(x)
    assert not gpu.waits


def test_kernels_are_counted_and_views_are_not(gpu):
    x = torch.ones(2, 3, device="cuda")
    gpu.reset()
    ((x @ x.mT).view(4)[1:] + 1).sum()
    assert gpu.kernels == {"mm": 1, "add": 1, "sum": 1}
    torch.ones(3) + 1  # on the CPU
    assert gpu.kernels.total() == 3


def test_files_and_copies_have_the_numbers(gpu):
    x = nn.Parameter(torch.arange(3.0, device="cuda"))
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["x"]
    assert isinstance(loaded, Tensor)
    assert loaded.tolist() == [0, 1, 2]
    copied = deepcopy(x)
    copied.data.add_(1)
    assert (x.tolist(), copied.tolist(), copied.requires_grad) == ([0, 1, 2], [1, 2, 3], True)


def test_what_uses_the_meta_device_runs_outside(gpu):
    with gpu.suspended(), torch.device("meta"):
        assert nn.Linear(2, 2).weight.is_meta
    assert torch.ones(1, device="cuda").is_cuda


def test_after_it_there_is_no_gpu_that_was_not_there():
    before = torch.cuda.is_available()
    with PretendedGPU():
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() == before
    assert type(torch.ones(1).to("cpu")) is Tensor
