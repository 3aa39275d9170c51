from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gsoft.blocks import free_numbers, orthogonal_blocks
from gsoft.group_and_shuffle import dense_reference
from gsoft.products import RotationBlocks, _tf32, rotate_activations, rotate_weights

SIDES = ["weight", "activations"]
MAPS = ("q_in", "q_out", "output_scale")
IN, OUT = 24, 40


def case(nfactors: int, outer: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def blocks(nblocks: int, size: int) -> Tensor:
        free = 0.3 * torch.randn(nfactors, nblocks, free_numbers(size), generator=generator, dtype=torch.float64)
        return orthogonal_blocks([free], size, "cayley")[0]

    scale = 1 + 0.3 * torch.randn(OUT, generator=generator, dtype=torch.float64)
    scale[3] = 0
    q_out = blocks(4, 10)
    tensors = {
        "x": torch.randn(2, 5, IN, generator=generator, dtype=torch.float64),
        "q_in": blocks(8, 3),
        "q_out": q_out if "rotation" in outer else None,
        "output_scale": scale if "scale" in outer else None,
        "weight": torch.randn(OUT, IN, generator=generator, dtype=torch.float64),
        "bias": torch.randn(OUT, generator=generator, dtype=torch.float64),
    }
    half = {name: t if t is None or dtype == torch.float64 else t.to(dtype) for name, t in tensors.items()}
    if dtype != torch.float64:  # rotations stay float32
        half |= {name: None if tensors[name] is None else tensors[name].float() for name in MAPS}
    return half


def product(
    side: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_in: Tensor,
    q_out: Tensor | None,
    output_scale: Tensor | None,
    identity: bool = False,
) -> Tensor:
    rotation = RotationBlocks(q_in, q_out, output_scale)
    if side == "weight":
        return F.linear(x, rotate_weights([weight], [rotation])[0], bias)
    if side == "activations":
        return rotate_activations(x, [(weight, bias)], [rotation], identity)[0]
    rotated = weight @ dense_reference(q_in)
    rotated = rotated if q_out is None else dense_reference(q_out) @ rotated
    return F.linear(x, rotated if output_scale is None else output_scale[:, None] * rotated, bias)


def value_and_gradients(side: str, tensors: dict[str, Tensor | None], with_bias: bool = True) -> list[Tensor]:
    leaves = {
        name: t if t is None or name in ("weight", "bias") else t.clone().requires_grad_()
        for name, t in tensors.items()
    }
    y = product(side, **(leaves if with_bias else leaves | {"bias": None}))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * grad.to(y.dtype)).sum().backward()
    return [y.detach(), *(t.grad for t in leaves.values() if t is not None and t.requires_grad)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("nfactors", [1, 2, 3])
@pytest.mark.parametrize("outer", ["none", "rotation", "scaled rotation", "scale"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_dense_reference(side, nfactors, outer, with_bias):
    """Value and gradients by x and the rotation; one of the scales is 0."""
    tensors = case(nfactors, outer)
    for ours, dense in zip(
        value_and_gradients(side, tensors, with_bias), value_and_gradients("dense", tensors, with_bias), strict=True
    ):
        torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_is_as_near_to_the_reference_as_the_dtype_allows(side, dtype, tolerance):
    """Largest error of value and of each gradient, relative to its largest entry; float32 gradients by the rotation."""
    ours = value_and_gradients(side, case(2, "scaled rotation", dtype))
    dense = value_and_gradients("dense", case(2, "scaled rotation"))
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, *[torch.float32] * 3]
    for tensor, reference in zip(ours, dense, strict=True):
        assert (tensor.double() - reference).abs().max() < tolerance * reference.abs().max()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_identities_change_no_bit(side, dtype, tokens):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(tokens, IN).to(dtype), torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
    rotation = (torch.eye(3).expand(2, 8, 3, 3), torch.eye(10).expand(2, 4, 10, 10), torch.ones(OUT))
    assert torch.equal(product(side, x, weight, bias, *rotation, identity=True), F.linear(x, weight, bias))


@pytest.mark.parametrize("nfactors", [1, 2])
@pytest.mark.parametrize("outer", ["none", "scaled rotation"])
def test_gradients_of_layers_at_the_start_are_those_of_identities(outer, nfactors):
    tensors = case(nfactors, outer)
    leaves = {name: tensors[name] for name in ("q_in", "q_out") if tensors[name] is not None}
    for name, blocks in leaves.items():
        tensors[name] = torch.eye(blocks.shape[-1], dtype=blocks.dtype).expand_as(blocks)
    if tensors["output_scale"] is not None:
        tensors["output_scale"] = torch.ones_like(tensors["output_scale"])
    results = []
    for identity in (False, True):
        given = {
            n: t if t is None or n in ("weight", "bias") else t.clone().requires_grad_() for n, t in tensors.items()
        }
        y = product("activations", **given, identity=identity)
        (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
        results.append([y.detach(), *(t.grad for t in given.values() if t is not None and t.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("outer", ["none", "scaled rotation"])
def test_layers_together_are_layers_one_by_one(outer):
    """Value and gradients; one of the outputs is not used."""
    tensors = case(2, outer)
    x = tensors["x"]
    layers, rotations = [], []
    for factor in (1.0, 0.5, -1.0):
        layers.append((factor * tensors["weight"], None if factor == 0.5 else tensors["bias"]))
        maps = [tensors[name] for name in MAPS]
        rotations.append(RotationBlocks(*(None if t is None else (factor * t).requires_grad_() for t in maps)))
    results = []
    for together in (False, True):
        given = x.clone().requires_grad_()
        made = (
            rotate_activations(given, layers, rotations, False)
            if together
            else [
                rotate_activations(given, [layer], [rotation], False)[0]
                for layer, rotation in zip(layers, rotations, strict=True)
            ]
        )
        loss = made[0].square().sum() + made[2].sum()
        leaves = [given, *(t for rotation in (rotations[0], rotations[2]) for t in rotation if t is not None)]
        results.append([*made, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("outer", ["none", "scaled rotation"])
def test_outputs_may_be_changed_in_place_one_by_one(outer, identity):
    """Also where another layer's output is kept for the backward pass."""
    tensors = case(2, outer)
    rotation = RotationBlocks(*(None if tensors[n] is None else tensors[n].clone().requires_grad_() for n in MAPS))
    results = []
    for in_place in (False, True):
        layers = [(tensors["weight"], tensors["bias"])] * 2
        first, second = rotate_activations(tensors["x"], layers, [rotation] * 2, identity)
        kept = second.square()
        first = first.mul_(2) if in_place else first * 2
        leaves = [tensor for tensor in rotation if tensor is not None]
        results.append([first, *torch.autograd.grad((first * kept).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


class TensorCores(TorchDispatchMode):
    """Rounds the factors of float32 products as a GPU does where it may use TF32; counts these products."""

    rounded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if allowed and func is torch.ops.aten.bmm.default and args[0].dtype == torch.float32:
            self.rounded += 1
            args = [((a.contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32) for a in args]
        return func(*args, **(kwargs or {}))


def far(made: Tensor, exact: Tensor) -> float:
    return ((made.double() - exact).norm() / exact.norm()).item()


def errors(dtype: torch.dtype, trains: bool) -> tuple[float, float, int]:
    """How far `W'` and the gradients are from those in float64, and how many products tensor cores made."""
    parts = case(2, "rotation and scale", dtype)
    rotation = [parts[name].requires_grad_(trains) for name in MAPS]
    precise = [tensor.detach().double().requires_grad_() for tensor in rotation]
    (exact,) = rotate_weights([parts["weight"].double()], [RotationBlocks(*precise)])
    gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact.backward(gradient.double())
    of_gradients = 0.0
    with TensorCores() as cores:
        (made,) = rotate_weights([parts["weight"]], [RotationBlocks(*rotation)])
        if trains:
            made.backward(gradient)
            of_gradients = max(far(t.grad, p.grad) for t, p in zip(rotation, precise, strict=True))
    return far(made.detach(), exact.detach()), of_gradients, cores.rounded


def test_tensor_cores_add_little_to_the_rounding_of_bfloat16_in_training():
    before = torch.backends.cuda.matmul.fp32_precision
    exact, _, no_products = errors(torch.bfloat16, trains=False)
    found, of_gradients, products = errors(torch.bfloat16, trains=True)
    assert no_products == 0
    assert products >= 4 + 4  # each of four factors in a forward and in a backward pass
    assert 0 < found < 1.2 * exact
    assert 1e-5 < of_gradients < 2**-10  # half of what rounding a gradient to bfloat16 can do
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_are_rotated_in_float32(dtype):
    assert errors(dtype, trains=True)[2] == 0


def test_whoever_wants_exact_products_keeps_them():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        assert errors(torch.bfloat16, trains=True)[2] == 0
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before


def test_the_last_thread_sets_the_precision_back():
    def precision() -> str:
        return torch.backends.cuda.matmul.fp32_precision

    before = precision()
    first, second = _tf32(True), _tf32(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # the other one's thread is still inside
    assert precision() == "tf32"
    second.__exit__(None, None, None)
    assert precision() == before
    with pytest.raises(InterruptedError), _tf32(True):
        raise InterruptedError
    assert precision() == before
