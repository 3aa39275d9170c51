from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from plain_models import randomise
from torch import nn

from benchmarks.pretended_gpu import PretendedGPU
from gsoft import RotationConfig
from gsoft import cache as module
from gsoft.cache import RotationCache
from gsoft.linear import RotatedLayer
from gsoft.rotation import Rotation


def layers(count: int = 3, config: RotationConfig | None = None, side: int = 24):
    """Linear layers and their rotated layers, each alone, with random parameters."""
    torch.manual_seed(0)
    linears = [nn.Linear(side, 40).requires_grad_(False) for _ in range(count)]
    rotated = [RotatedLayer(Rotation(config or RotationConfig(nblocks=4), side, 40)) for _ in range(count)]
    for seed, one in enumerate(rotated):
        randomise(one.rotation, seed)
    return linears, rotated


def join(linears, rotated):
    cache = RotationCache([one.rotation for one in rotated], linears)
    for index, one in enumerate(rotated):
        one.share(cache, index)
    return cache


def outputs_and_gradients(linears, rotated, tokens: int = 5):
    x = torch.randn(tokens, linears[0].in_features, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for one in rotated:
        one.rotation.zero_grad()
    outputs = [one(linear, x) for linear, one in zip(linears, rotated, strict=True)]
    sum(y.square().sum() for y in outputs).backward()
    return [
        *(y.detach() for y in outputs),
        x.grad,
        *(p.grad.clone() for one in rotated for p in one.rotation.parameters()),
    ]


@pytest.fixture
def calls(monkeypatch):
    """How often blocks and rotated weights are made."""
    counted = {"orthogonal_blocks": 0, "rotate_weights": 0}

    def count(name):
        original = getattr(module, name)

        def counting(*args, **options):
            counted[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, counting)

    for name in counted:
        count(name)
    return counted


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("output_scale", [True, False])
@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
@pytest.mark.parametrize("together", [1, 2, 2**17])
def test_together_as_alone(double, output_scale, parametrization, together, monkeypatch):
    """Outputs and gradients, whichever side is rotated and however many weights are made at a time."""
    config = RotationConfig(nblocks=4, double=double, output_scale=output_scale, parametrization=parametrization)
    linears, rotated = layers(config=config)
    alone = outputs_and_gradients(linears, rotated)
    monkeypatch.setattr(module, "weights_at_once", lambda weight: together)
    join(linears, rotated)
    for ours, expected in zip(outputs_and_gradients(linears, rotated), alone, strict=True):
        torch.testing.assert_close(ours, expected)


def test_one_call_makes_all_blocks_of_a_step(calls):
    linears, rotated = layers()
    join(linears, rotated)
    outputs_and_gradients(linears, rotated)
    assert calls == {"orthogonal_blocks": 2, "rotate_weights": 1}  # q_in and q_out; the three small weights at once


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sampling_makes_everything_once(calls, mode):
    linears, rotated = layers()
    join(linears, rotated)
    with mode():
        first, *_, last = [rotated[1](linears[1], torch.ones(1, 24)) for _ in range(4)]
    assert calls == {"orthogonal_blocks": 2, "rotate_weights": 1}
    assert torch.equal(first, last)


@pytest.mark.parametrize("tokens", [5, 5000])
@pytest.mark.parametrize("grouped", [False, True])
def test_accumulation_makes_blocks_once_and_adds_up(calls, tokens, grouped):
    """But for the second batch of all: there is nothing yet to tell that no optimizer changed values unnoticed."""
    linears, rotated = layers()
    if grouped:
        join(linears, rotated)
    once = [
        p.grad
        for _ in [outputs_and_gradients(linears, rotated, tokens)]
        for q in rotated
        for p in q.rotation.parameters()
    ]
    once = [grad.clone() for grad in once]
    first = dict(calls)
    for one in rotated:
        one.rotation.zero_grad()
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(2))
    made = []
    for _ in range(3):
        sum(p(linear, x).square().sum() for linear, p in zip(linears, rotated, strict=True)).backward()
        made.append(dict(calls))
    for grad, p in zip(once, (p for q in rotated for p in q.rotation.parameters()), strict=True):
        torch.testing.assert_close(p.grad, 3 * grad)
    assert made == [{name: 2 * count for name, count in first.items()}] * 3


CHANGES = {
    "optimizer": lambda linear, one: torch.optim.AdamW(one.rotation.parameters(), lr=0.1).step(),
    "fused optimizer": lambda linear, one: torch.optim.AdamW(one.rotation.parameters(), lr=0.1, fused=True).step(),
    "behind the version": lambda linear, one: one.rotation.q_in.data.add_(0.1),
    "load": lambda linear, one: one.rotation.load_state_dict(
        {name: tensor + 0.1 for name, tensor in one.rotation.state_dict().items()}
    ),
    "base weight": lambda linear, one: linear.weight.add_(1),
    "base dtype": lambda linear, one: linear.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_change_after_a_step_is_seen(change, grouped, training):
    linears, rotated = layers()
    if grouped:
        join(linears, rotated)

    def output():
        with torch.set_grad_enabled(training):
            return rotated[1](linears[1], torch.ones(1, 24, dtype=linears[1].weight.dtype)).detach()

    before = output()
    outputs_and_gradients(linears, rotated)
    with torch.no_grad():
        CHANGES[change](linears[1], rotated[1])
    after = output()
    assert not torch.equal(after, before.to(after.dtype))
    alone = RotatedLayer(Rotation(RotationConfig(nblocks=4), 24, 40))
    alone.rotation.load_state_dict(rotated[1].rotation.state_dict())
    torch.testing.assert_close(after, alone(linears[1], torch.ones(1, 24, dtype=after.dtype)).detach())


@pytest.mark.parametrize("tokens", [5, 5000])
def test_changes_behind_the_version_are_seen_every_time(tokens):
    linears, rotated = layers()
    join(linears, rotated)
    seen = [outputs_and_gradients(linears, rotated, tokens)[1]]
    for _ in range(3):
        rotated[1].rotation.q_in.data.add_(0.1)
        seen.append(outputs_and_gradients(linears, rotated, tokens)[1])
        assert torch.equal(outputs_and_gradients(linears, rotated, tokens)[1], seen[-1])
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(seen))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tokens", [5, 5000])
def test_sampling_between_steps_changes_no_gradient(mode, tokens):
    linears, rotated = layers()
    join(linears, rotated)
    expected = outputs_and_gradients(linears, rotated, tokens)
    for one in rotated:
        one.cache.clear()
    for _ in range(2):
        with mode():
            rotated[0](linears[0], torch.ones(1, 24))
        for ours, reference in zip(outputs_and_gradients(linears, rotated, tokens), expected, strict=True):
            assert torch.equal(ours, reference)


def test_copies_have_rotations_of_their_own():
    linears, rotated = layers()
    join(linears, rotated)
    outputs_and_gradients(linears, rotated)  # something with a graph is kept
    copied_linears, copies = copy.deepcopy((linears, rotated))
    x = torch.ones(1, 24)
    before = rotated[0](linears[0], x)
    assert torch.equal(copies[0](copied_linears[0], x), before)
    randomise(rotated[0].rotation, seed=9)
    assert torch.equal(copies[0](copied_linears[0], x), before)
    assert not torch.equal(rotated[0](linears[0], x), before)


@pytest.mark.parametrize("tokens", [5, 5000])
@pytest.mark.parametrize("side", [24, 400])
def test_rotated_that_are_not_used_get_no_gradient(tokens, side):
    linears, rotated = layers(side=side)
    join(linears, rotated)
    rotated[1](linears[1], torch.ones(tokens, side)).sum().backward()
    assert all(parameter.grad is not None for parameter in rotated[1].rotation.parameters())
    assert all(parameter.grad is None for index in (0, 2) for parameter in rotated[index].rotation.parameters())


def test_frozen_parameters_get_no_gradient():
    linears, rotated = layers()
    join(linears, rotated)
    outputs_and_gradients(linears, rotated)
    rotated[0].rotation.requires_grad_(False).zero_grad()
    x = torch.ones(1, 24, requires_grad=True)
    sum(p(linear, x).sum() for linear, p in zip(linears, rotated, strict=True)).backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in rotated[0].rotation.parameters())
    assert all(parameter.grad is not None for parameter in rotated[1].rotation.parameters())


@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
def test_nothing_is_kept_of_earlier_steps(parametrization):
    linears, rotated = layers(config=RotationConfig(nblocks=4, parametrization=parametrization))
    join(linears, rotated)
    optimizer = torch.optim.SGD([p for one in rotated for p in one.rotation.parameters()], lr=1e-3)
    alive = []
    for _ in range(4):
        outputs_and_gradients(linears, rotated)
        optimizer.step()
        gc.collect()
        alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert alive[-1] == alive[1]


def test_on_a_gpu_nothing_is_asked_once_there_was_a_backward_pass():
    """Accumulated gradients are the same as on a CPU, where values are compared to keep what was made."""
    linears, rotated = layers(side=400)
    join(linears, rotated)
    expected = outputs_and_gradients(linears, rotated)
    with PretendedGPU() as gpu:
        linears, rotated = layers(side=400)
        for linear, one in zip(linears, rotated, strict=True):
            linear.to("cuda")
            one.rotation.to("cuda")
        join(linears, rotated)
        x = torch.randn(5, 400, generator=torch.Generator().manual_seed(2)).to("cuda")

        def accumulate():
            outputs = [one(linear, x) for linear, one in zip(linears, rotated, strict=True)]
            sum(y.square().sum() for y in outputs).backward()
            return outputs

        outputs = accumulate()
        gpu.reset()
        accumulate()
        assert not gpu.waits
        gradients = [p.grad.cpu() / 2 for one in rotated for p in one.rotation.parameters()]
        for ours, reference in zip(
            [*(y.detach().cpu() for y in outputs), *gradients], [*expected[:3], *expected[4:]], strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-3)
