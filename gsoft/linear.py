"""One rotated linear layer, `y = s·(Q_out W Q_in x) + bias` around a frozen `nn.Linear`: forward and merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsoft.autocast import autocast_is_on, without_autocast
from gsoft.cache import RotationCache
from gsoft.errors import GSOFTError
from gsoft.group_and_shuffle import rotate, rotate_back
from gsoft.kept_weight import KeptWeight
from gsoft.linear_slice import AnyLinear
from gsoft.products import RotationBlocks, rotate_activations, rotate_weights
from gsoft.rotation import Rotation


class RotatedLayer:
    """What computes with one frozen linear layer and the `Rotation` that is learned for it.

    The linear layer, or a slice of one, belongs to the base model and is passed to every call. At the start the output
    is bit-equal to the plain layer's: identity rotations reproduce `W` exactly (a float32 `W` on a GPU as long as TF32
    is left off).

    rotation: the learned numbers, which belong to an `Adapter`. enabled: False leaves the layer as it is.
    cache, index: where what is made of the learned numbers is kept, shared with other layers after `share`.
    prepared: what a graph of `torch.compile` computes with in this call of the model: see `prepare`.
    """

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.enabled = True
        self.cache, self.index = RotationCache([rotation]), 0
        self.prepared: Tensor | RotationBlocks | None = None
        self._keeps_weight = True
        self._kept_weight = KeptWeight()

    def __getstate__(self) -> dict[str, Any]:
        """Copies have nothing prepared: PyTorch does not copy tensors that are part of a graph."""
        return vars(self) | {"prepared": None}

    def share(self, cache: RotationCache, index: int, keeps_weight: bool = True) -> None:
        """Have blocks and weights made together with those of a cache's other layers.

        cache: holds this layer's rotation among others. index: its place there. keeps_weight: False if there is no room
        for another weight of this layer's size (see `gsoft.costs.KEPT_WEIGHT_BYTES`): it then rotates its activations.
        """
        self.cache, self.index, self._keeps_weight = cache, index, keeps_weight

    def prepare(self, linear: AnyLinear) -> None:
        """Make `W'` before the model computes, or the blocks where there is no room for it or x is to be rotated.

        linear: the frozen layer. In a graph of `torch.compile` the layer is then an ordinary product with the tensor
        `prepared`. What learned numbers have become is not looked up there: whoever calls a compiled part of a model by
        itself prepares its layers before. Raises GSOFTError as `check` does.
        """
        self.prepared = None
        if not self.active:
            return
        self.check(linear)
        plainly = not torch.is_grad_enabled() or autocast_is_on(linear.weight.device)
        if self._keeps_weight and (plainly or self.cache.expects_weight_side(self.index)):
            self.prepared = self.cache.weight(self.index, linear.weight)
        else:
            self.prepared = self.cache.blocks(self.index, linear.weight.dtype)

    def refresh(self) -> None:
        """Drop what was made of the learned numbers, which were written to behind PyTorch's back."""
        self.prepared = None
        self.cache.clear()

    def __call__(self, linear: AnyLinear, x: Tensor) -> Tensor:
        """What the rotated layer makes of x (paper, §6.1 and §6.2).

        linear: the frozen layer. x: `(…, in_features)`. Returns `(…, out_features)` in the dtype the plain layer would
        give.

        Without gradients the rotated weight is used, which is kept: sampling costs what the base model costs. In
        training the weight or the activations are rotated, whichever is cheaper for these shapes. Where there is no
        room for another weight (see `share`), the activations always are, so a large model is merged for sampling.

        Raises GSOFTError as `check` does.
        """
        if not self.active:
            return linear(x)
        if torch.compiler.is_compiling():
            if isinstance(self.prepared, Tensor):
                return F.linear(x, self.prepared, linear.bias)
            if self.prepared is not None and not autocast_is_on(x.device):
                return rotate_activations(x, [(linear.weight, linear.bias)], [self.prepared], identity=False)[0]
        return self._compute(linear, x)

    @torch.compiler.disable
    def _compute(self, linear: AnyLinear, x: Tensor) -> Tensor:
        self.check(linear)
        if self.rotates_activations(linear, x):
            return _with_rotated_activations([self], [linear], x)[0]
        return F.linear(x, self.cache.weight(self.index, linear.weight), linear.bias)

    @property
    def active(self) -> bool:
        """False where the plain layer is right as it is: switched off, or merged into its weight."""
        return self.enabled and not self.merged

    def check(self, linear: AnyLinear) -> None:
        """Raise GSOFTError unless this can compute with the layer: a whole one on the rotation's device."""
        if hasattr(linear.weight, "device_mesh"):  # a DTensor
            raise GSOFTError(
                f"{self.rotation.layer}: its weight is spread over devices (FSDP2) by a fully_shard of this layer or "
                "its block; shard the whole module alone, or use DDP"
            )
        if linear.weight.device != self.rotation.q_in.device:
            raise GSOFTError(
                f"{self.rotation.layer}: the adapter is on {self.rotation.q_in.device}, "
                f"the model on {linear.weight.device}; move both, for example "
                f'adapter.to("{linear.weight.device}")'
            )

    def rotates_activations(self, linear: AnyLinear, x: Tensor) -> bool:
        """Whether `__call__` rotates x instead of the weight.

        linear: the frozen layer. x: `(…, in_features)`. autocast decides by itself what is computed in which precision;
        it is left to do so in one plain product, where there is room for another weight.
        """
        if not self._keeps_weight:
            return True
        rotation = self.rotation
        if not (torch.is_grad_enabled() and rotation.q_in.requires_grad) or autocast_is_on(x.device):
            return False
        return not self.cache.weight_side(self.index, x.numel() // rotation.in_features, linear.weight)

    def rotated_weight(self, weight: Tensor) -> Tensor:
        """`W' = s·Q_out W Q_in` (paper, §6.2; §6.1 without `Q_out`), in the dtype of W `(out, in)`.

        Computed as `rotate_weights` says.
        """
        return rotate_weights([weight.detach()], [self.blocks()])[0]

    def blocks(self) -> RotationBlocks:
        """The orthogonal blocks `(m, r, b, b)` of `Q_in` and `Q_out`, and the scale, float32."""
        return self.cache.blocks(self.index)

    @property
    def merged(self) -> bool:
        """Whether `W'` is in the layer in place of `W`: after `merge`, until `unmerge`."""
        return self._kept_weight.replaced

    @torch.no_grad()
    def merge(self, linear: AnyLinear) -> None:
        """Write `W'` into the layer and keep the exact `W`; from then on the layer alone does everything.

        Without effect if it is merged already. Raises GSOFTError as `check` does.
        """
        if not self.merged:
            self.check(linear)
            merged = self.cache.weight(self.index, linear.weight)
            self.cache.drop_weight(self.index)
            self._kept_weight.replace(linear, merged)

    def unmerge(self, linear: AnyLinear) -> None:
        """Put `W` back, bit for bit."""
        self._kept_weight.restore(linear)

    def forget(self) -> None:
        """Forget `W`, so that a merged `W'` stays for good."""
        self._kept_weight.forget()

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """Largest entry of `|QᵀQ − I|` over this layer's rotations."""
        errors = []
        for blocks in self.blocks()[:2]:
            if blocks is not None:
                identity = torch.eye(blocks.shape[1] * blocks.shape[2], device=blocks.device)
                errors.append((rotate_back(blocks, rotate(blocks, identity)) - identity).abs().max().item())
        return max(errors)


def rotate_together(layers: Sequence[RotatedLayer], linears: Sequence[AnyLinear], x: Tensor) -> list[Tensor]:
    """What each of several layers makes of the same x; equal-shaped ones that rotate it do so together.

    layers: one or more. linears: their frozen layers, in the same order. x: `(…, in_features)`. Returns one tensor
    `(…, out_features)` for each. Raises GSOFTError as `RotatedLayer.check` does.
    """
    if torch.compiler.is_compiling():
        return [layer(linear, x) for layer, linear in zip(layers, linears, strict=True)]
    first = layers[0]
    alike = all(layer.cache is first.cache and layer.active for layer in layers)
    if alike:
        for layer, linear in zip(layers, linears, strict=True):
            layer.check(linear)
        # Every layer is asked, for it is remembered what it takes.
        sides = [layer.rotates_activations(linear, x) for layer, linear in zip(layers, linears, strict=True)]
        alike = all(sides)
    if not alike:
        return [layer(linear, x) for layer, linear in zip(layers, linears, strict=True)]
    return _with_rotated_activations(layers, linears, x)


def _with_rotated_activations(layers: Sequence[RotatedLayer], linears: Sequence[AnyLinear], x: Tensor) -> list[Tensor]:
    """By rotating x and the results, in autocast in its precision."""
    plain = [(linear.weight, linear.bias) for linear in linears]
    if not autocast_is_on(x.device):
        return _around_products(layers, plain, x)
    if x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        plain = [(weight.to(dtype), None if bias is None else bias.to(dtype)) for weight, bias in plain]
    with without_autocast(x.device):
        return _around_products(layers, plain, x)


def _around_products(
    layers: Sequence[RotatedLayer], plain: Sequence[tuple[Tensor, Tensor | None]], x: Tensor
) -> list[Tensor]:
    """As `_with_rotated_activations`, with weight and bias of each layer in the precision of x."""
    cache = layers[0].cache
    blocks = [cache.blocks(layer.index, x.dtype) for layer in layers]
    return list(rotate_activations(x, plain, blocks, cache.all_identity))


class Computing(Protocol):
    """What computes in the place of a linear layer: a `RotatedLayer`, or `gsoft.fused.RotatedSlices`."""

    @property
    def active(self) -> bool: ...

    def __call__(self, linear: nn.Linear, x: Tensor) -> Tensor: ...


class RotatedLinear(nn.Linear):
    """The class that an `nn.Linear` of a model gets while it is rotated; see `put_on` and `take_off`.

    A subclass of `nn.Linear` gets a class that inherits from its own as well, so that its other methods stay.

    The layer stays the object that it was, with its weight, its bias and its hooks, wherever the model refers to it.
    What is learned is not a submodule: to everything else, state dicts and saving included, the model looks as before.
    A class, not a patched instance, so that copies of the model are rotated as well.
    """

    rotated: Computing
    base_class: type[nn.Linear]

    def forward(self, input: Tensor) -> Tensor:
        return self.rotated(self, input) if self.rotated.active else super().forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the class that the layer had, since the present one may have no name."""
        return _new_rotated, (self.base_class,), vars(self)


_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: RotatedLinear}


def _rotated_class(base_class: type[nn.Linear]) -> type[nn.Linear]:
    if base_class not in _CLASSES:
        _CLASSES[base_class] = type("RotatedLinear", (RotatedLinear, base_class), {})
    return _CLASSES[base_class]


def can_be_put_on(base_class: type[nn.Linear]) -> bool:
    """Whether `put_on` takes layers of a class: some do not allow subclasses, or have attributes of the same names."""
    try:
        _rotated_class(base_class)
    except TypeError:
        return False
    return not any(hasattr(base_class, name) for name in ("rotated", "base_class"))


def _new_rotated(base_class: type[nn.Linear]) -> nn.Linear:
    rotated_class = _rotated_class(base_class)
    return rotated_class.__new__(rotated_class)


def put_on(linear: nn.Linear, rotated: Computing) -> RotatedLinear:
    """Have a plain layer compute what `rotated` makes of it, until `take_off`. Returns the same object.

    linear: becomes a `RotatedLinear` in its place in the model. rotated: what computes with it.
    """
    base_class = type(linear)
    linear.__class__ = _rotated_class(base_class)
    assert isinstance(linear, RotatedLinear)
    object.__setattr__(linear, "base_class", base_class)  # not nn.Module's, which is for parameters and modules
    object.__setattr__(linear, "rotated", rotated)
    return linear


def take_off(linear: RotatedLinear) -> None:
    """Undo `put_on`."""
    base_class = linear.base_class
    object.__delattr__(linear, "rotated")
    object.__delattr__(linear, "base_class")
    linear.__class__ = base_class  # type: ignore[assignment]
