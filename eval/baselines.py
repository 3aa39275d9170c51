"""What GSOFT is compared with: methods of PEFT's, and full fine-tuning, on exactly the same layers.

`inject_baseline` and `BaselineAdapter` are to them what `inject` and `Adapter` are to GSOFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import BOFTConfig, HRAConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.boft import layer as boft
from peft.tuners.hra import layer as hra
from peft.tuners.lokr import layer as lokr
from peft.tuners.lora import layer as lora
from peft.tuners.oft import layer as oft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from gsoft.blocks import free_numbers
from gsoft.group_and_shuffle import fit_blocks
from gsoft.kept_weight import KeptWeight
from gsoft.submodules import add_submodule
from gsoft_diffusion.adapters.injection import find_attentions, find_clip_attentions, find_linears, root_of
from gsoft_diffusion.config.settings import Settings, require
from gsoft_diffusion.foundation.errors import UserError, first_line, user_errors
from gsoft_diffusion.training.trainable import MakeAdapter

PEFT_NAME = "default"  # what PEFT calls the one adapter that it holds
SHAPING = {  # the settings that decide a method's size: exactly these must be given, or one of two
    "lora": [{"rank"}],
    "dora": [{"rank"}],
    "hra": [{"rank"}],
    "lokr": [{"factor"}, {"factor", "rank"}],
    "boft": [{"nblocks", "nfactors"}, {"block_size", "nfactors"}],
    "oft": [{"nblocks"}, {"block_size"}],
    "full": [set[str]()],
}
ROTATIONS = ("boft", "oft", "hra")  # the methods that turn weights by an orthogonal matrix
WHOLE = 2**20  # a rank from which on PEFT's LoKr trains its second matrix as a whole, of any width


@dataclass(frozen=True)
class BaselineConfig(Settings):
    """One method to compare with, and its size.

    method: lora (Hu et al., arXiv 2106.09685), dora (Liu et al., arXiv 2402.09353), boft (Liu et al., arXiv
      2311.06243), oft (version 2, Qiu et al., arXiv 2506.19847), hra (Yuan et al., arXiv 2405.17484, without its
      regularisation), lokr (Yeh et al., arXiv 2309.14859) or full, which trains the weights themselves.
    rank: of LoRA's and DoRA's product, whose scaling is 1, and of LoKr's second matrix, which is trained as a whole
      without a rank or where the rank is half its side or more; how many reflections HRA has, which must be even, so
      that they undo each other at the start.
    factor: sides of LoKr's first matrix, where they divide the width.
    nblocks: diagonal blocks of OFT's matrix and of each of BOFT's factors; give this or `block_size`.
    block_size: side of every block.
    nfactors: BOFT's butterfly factors.
    text_encoder: adapt the text encoder's attention as well as the denoiser's.
    """

    method: Literal["lora", "dora", "boft", "oft", "hra", "lokr", "full"]
    rank: int | None = None
    factor: int | None = None
    nblocks: int | None = None
    block_size: int | None = None
    nfactors: int | None = None
    text_encoder: bool = True

    def __post_init__(self) -> None:
        names = ("rank", "factor", "nblocks", "block_size", "nfactors")
        require(self, lambda value: value >= 1, "1 or more", *names)
        given = {name for name in names if getattr(self, name) is not None}
        if given not in SHAPING[self.method]:
            wanted = " or ".join(" and ".join(sorted(choice)) or "nothing" for choice in SHAPING[self.method])
            raise UserError(f"{self.method} takes {wanted} as its size, not {', '.join(sorted(given)) or 'nothing'}")
        if self.method == "hra" and self.rank and self.rank % 2:
            raise UserError(
                f"rank {self.rank}: must be even for hra, whose reflections undo each other in pairs at first"
            )


def inject_baseline(
    config: BaselineConfig, unet: nn.Module, text_encoders: Sequence[nn.Module] = ()
) -> BaselineAdapter:
    """Freeze the base models and put a new adapter, which changes nothing yet, into them.

    config: the method and its size. unet: the denoiser. text_encoders: those that belong to it, adapted only if
    `config` says so.

    Raises UserError, before anything is changed, if a width does not fit, and AssertionError if PEFT did not make what
    `config` says: it changes sizes silently.
    """
    return BaselineAdapter(config, unet, text_encoders)


def baseline_maker(config: BaselineConfig) -> MakeAdapter:
    """What `train` takes to train this method in everything else as it trains GSOFT, whose settings it leaves aside."""
    return lambda _, denoiser, text_encoders: inject_baseline(config, denoiser, text_encoders)


class BaselineAdapter(nn.Module):
    """All trainable parameters of one baseline, and the switches that act on all of it.

    Parameters are float32 and named like an `Adapter`'s: `unet.<attention path>.to_q.lora_a`, `….lora_b` for LoRA, with
    `….magnitude` for DoRA; `….rotation` for OFT; `….rotation` and `….output_scale` for BOFT; `….reflections` for HRA;
    `….small` and `….large`, or `….large_a` and `….large_b`, for LoKr's two matrices; `….weight` for full fine-tuning.
    """

    def __init__(self, config: BaselineConfig, unet: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self._models = (unet, *text_encoders)  # tuples and dicts keep the base models out of the submodules
        self._linears = adapted_layers(unet, text_encoders, config.text_encoder)
        for name, linear in self._linears.items():
            expected_parameters(config, linear.in_features, linear.out_features, name)
        self._required_grad = [p for model in self._models for p in model.parameters() if p.requires_grad]
        self._places = {name: _place(self._models, linear) for name, linear in self._linears.items()}
        for model in self._models:
            model.requires_grad_(False)
        self._wrap()
        self._layers: dict[str, Any] = {name: getattr(*place) for name, place in self._places.items()}
        self._kept_weights = {name: KeptWeight() for name in self._linears}
        for name, layer in self._layers.items():
            holder = nn.Module()
            for parameter_name, parameter in _parameters(layer).items():
                parameter.data = parameter.data.float()
                holder.register_parameter(parameter_name, parameter)
            add_submodule(self, name, holder)
        self._check_effective()

    def _wrap(self) -> None:
        """Put a tuned layer in the place of every linear layer."""
        if self.config.method == "full":
            for name, linear in self._linears.items():
                setattr(*self._places[name], TunedLinear(linear))
            return
        linears = set(self._linears.values())
        for model in self._models:
            names = [name for name, module in model.named_modules() if module in linears]
            if names:
                inject_peft(self.config, model, names)

    def _check_effective(self) -> None:
        """The method that was asked for is the one that runs, on the layers that were asked for and no others."""
        wanted = {
            "lora": lora.Linear,
            "dora": lora.Linear,
            "boft": ButterflyLinear,
            "oft": oft.Linear,
            "hra": hra.HRALinear,
            "lokr": lokr.Linear,
            "full": TunedLinear,
        }[self.config.method]
        wrapped = [module for model in self._models for module in model.modules() if isinstance(module, wanted)]
        assert set(wrapped) == set(self._layers.values()), "PEFT adapted other layers than it was told to"
        for name, layer in self._layers.items():
            linear = self._linears[name]
            assert layer.base_layer is linear, f"{name}: PEFT wrapped another layer"
            found = {key: tuple(parameter.shape) for key, parameter in _parameters(layer).items()}
            expected = expected_parameters(self.config, linear.in_features, linear.out_features, name)
            assert found == expected, f"{name}: PEFT made {found} where {self.config.method} has {expected}"
            if self.config.method in ("lora", "dora", "lokr"):
                assert layer.scaling[PEFT_NAME] == 1, f"{name}: scaled by {layer.scaling[PEFT_NAME]}"

    def remove(self) -> None:
        """Restore the models exactly: weights, layers and `requires_grad`."""
        self.unmerge()
        for name, place in self._places.items():
            setattr(*place, self._linears[name])
        for model in self._models:
            if hasattr(model, "peft_config"):  # PEFT's mark
                del model.peft_config
        for parameter in self._required_grad:
            parameter.requires_grad_(True)

    @property
    def merged(self) -> bool:
        """Whether the tuned weights are in the models: after `merge`, until `unmerge`."""
        return any(kept.replaced for kept in self._kept_weights.values())

    @torch.no_grad()
    def merge(self) -> None:
        """Write the tuned weights into the models; `unmerge` before training or loading again."""
        if not self.merged:
            for name, layer in self._layers.items():
                self._kept_weights[name].keep(self._linears[name])
                layer.merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base models' weights back, bit for bit, which PEFT's own unmerging does not."""
        for name, kept in self._kept_weights.items():
            if kept.replaced:
                kept.restore(self._linears[name])
                self._layers[name].merged_adapters.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off: the models are the untouched base models, merged or not."""
        was_merged = self.merged
        self.unmerge()
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)
            if was_merged:
                self.merge()

    def parameter_counts(self) -> dict[str, int]:
        """How many free numbers are trained: in the UNet, in the text encoders, in total.

        PEFT's BOFT stores whole `b×b` blocks of which only the skew part acts: `b(b−1)/2` numbers are counted, as for
        GSOFT. Of HRA's vectors only the direction acts; all their numbers are counted, as in its paper.
        """
        counts = {root_of(self._models[0]): 0, "text_encoder": 0}
        for name, linear in self._linears.items():
            part = "text_encoder" if name.startswith("text_encoder") else root_of(self._models[0])
            counts[part] += baseline_count(self.config, linear.in_features, linear.out_features)
        return counts | {"total": sum(counts.values())}

    @torch.no_grad()
    def orthogonality_error(self) -> float | None:
        """Largest entry of `|QᵀQ − I|` over all rotations; None for methods that have none."""
        if self.config.method not in ROTATIONS:
            return None
        rotations = (layer.get_delta_weight(PEFT_NAME) for layer in self._layers.values())
        matrices = (rotation[0] if isinstance(rotation, tuple) else rotation for rotation in rotations)
        return max((q.T @ q - torch.eye(len(q), device=q.device)).abs().max().item() for q in matrices)


def inject_peft(config: BaselineConfig, model: nn.Module, names: list[str]) -> None:
    """Freeze a model and put PEFT's layers around some of its own; BOFT's with all factors, also without a GPU.

    config: a method of PEFT's, and its size. model: any. names: paths of linear layers in it.
    """
    with _claimed_extension():
        inject_adapter_in_model(_peft_config(config, names), model, PEFT_NAME)
    for module in list(model.modules()):
        if type(module) is boft.Linear:
            module.__class__ = ButterflyLinear
            del module.boft_P  # n×n matrices that only shuffle


class ButterflyLinear(boft.Linear):
    """PEFT's BOFT layer with its product of factors in plain PyTorch.

    PEFT computes it by a CUDA extension and, without it, sets the number of factors to 1. Here each factor turns the
    weight's rows in place, as GSOFT does, and no `n×n` matrix is made:

        y = s·(W Rᵀ x) + bias,   R = F_m ⋯ F_1

    Factor `i` of block size `b` turns pairs of half blocks that lie `2^(i−1)` half blocks apart (BOFT, §4).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: `(…, in_features)`; returns `(…, out_features)` in the dtype the plain layer would give."""
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        base: Any = self.base_layer
        rotated = self.boft_s[PEFT_NAME] * rotate_rows(base.weight.float(), self.blocks())
        return F.linear(x, rotated.to(base.weight.dtype), base.bias)

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`R (n, n)` and the scale `(out_features, 1)`."""
        identity = torch.eye(self.in_features, device=self.boft_R[adapter].device)
        return rotate_rows(identity, self.blocks()).T, self.boft_s[adapter]

    def blocks(self) -> Tensor:
        """The orthogonal blocks `(m, n/b, b, b)`, by PEFT's Cayley map."""
        stored = self.boft_R[PEFT_NAME]
        return self.cayley_batch(stored.flatten(0, 1)).unflatten(0, stored.shape[:2])


def rotate_rows(rows: Tensor, blocks: Tensor) -> Tensor:
    """`R w` for every row `w`, with `R = F_m ⋯ F_1` (BOFT, §4).

    rows: `(…, n)`. blocks: `(m, n/b, b, b)`, those of each factor, of the same dtype. Returns `(…, n)`.
    """
    half = blocks.shape[-1] // 2
    for level, factor in enumerate(blocks):
        stride = 2**level
        halves = rows.unflatten(-1, (-1, 2, stride, half)).transpose(-3, -2)  # (…, groups, stride, 2, b/2)
        turned = torch.einsum("...nb,ncb->...nc", halves.flatten(-2).flatten(-3, -2), factor)
        rows = turned.unflatten(-1, (2, half)).unflatten(-3, (-1, stride)).transpose(-3, -2).flatten(-4)
    return rows


class TunedLinear(nn.Module):
    """Full fine-tuning of one layer, with PEFT's switches: a trained float32 weight beside the frozen one."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weight = nn.Parameter(base_layer.weight.detach().clone().float())
        self.merged_adapters: list[str] = []
        self._enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x with the trained weight, or with the frozen one while switched off or merged.

        x: `(…, in_features)`. Returns `(…, out_features)` in the dtype of the frozen weight.
        """
        if self.merged_adapters or not self._enabled:
            return self.base_layer(x)
        return F.linear(x, self.weight.to(self.base_layer.weight.dtype), self.base_layer.bias)

    def merge(self) -> None:
        """Write the trained weight over the frozen one, rounded to its dtype; whoever calls this keeps a copy."""
        self.base_layer.weight.copy_(self.weight)
        self.merged_adapters.append(PEFT_NAME)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the trained weight on or off, as PEFT's layers do."""
        self._enabled = enabled


def adapted_layers(unet: nn.Module, text_encoders: Sequence[nn.Module], text_encoder: bool) -> dict[str, nn.Linear]:
    """All linear layers that every method adapts, under their names.

    unet: the denoiser, of which all attention is adapted, but where it shares matrices with other layers: the other
    methods know whole matrices only. text_encoders: those that belong to it. text_encoder: whether their attention is
    adapted as well.
    """
    attentions = find_attentions(unet, fused=False)
    found = find_linears(attentions, find_clip_attentions(text_encoder, text_encoders))
    return {name: linear for name, linear in found.items() if isinstance(linear, nn.Linear)}


@user_errors()
def expected_parameters(
    config: BaselineConfig, in_features: int, out_features: int, layer: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is trained for one linear layer.

    config: the method and its size. in_features, out_features: of the layer. layer: its name, for the message. Raises
    UserError if its width does not fit.
    """
    if config.method == "full":
        return {"weight": (out_features, in_features)}
    rank = config.rank or 0
    if config.method in ("lora", "dora"):
        product = {"lora_a": (rank, in_features), "lora_b": (out_features, rank)}
        return product | ({"magnitude": (out_features,)} if config.method == "dora" else {})
    if config.method == "hra":
        return {"reflections": (in_features, rank)}
    if config.method == "lokr":
        (small_out, large_out), (small_in, large_in) = (
            lokr.factorization(width, config.factor or 1) for width in (out_features, in_features)
        )
        small: dict[str, tuple[int, ...]] = {"small": (small_out, small_in)}
        if config.rank is None or config.rank >= max(large_out, large_in) / 2:
            return small | {"large": (large_out, large_in)}
        return small | {"large_a": (large_out, rank), "large_b": (rank, large_in)}
    nblocks, size = fit_blocks(in_features, config.nblocks, config.block_size, layer)
    if config.method == "oft":
        return {"rotation": (nblocks, free_numbers(size))}
    nfactors = config.nfactors or 1
    if nfactors > 1 and (size % 2 or nblocks % 2 ** (nfactors - 1)):
        raise UserError(
            f"{layer}: BOFT with {nfactors} factors needs blocks of even side, {2 ** (nfactors - 1)} of them or a "
            f"multiple; width {in_features} has {nblocks} of side {size}"
        )
    return {"rotation": (nfactors, nblocks, size, size), "output_scale": (out_features, 1)}


def baseline_count(config: BaselineConfig, in_features: int, out_features: int) -> int:
    """How many free numbers are trained for one linear layer, in closed form.

    config: the method and its size. in_features, out_features: of the layer. Of a skew-symmetric block `b(b−1)/2`
    numbers count, however PEFT stores it. Raises GSOFTError if the width does not fit.
    """
    if config.method not in ("boft", "oft"):  # all that is stored acts
        shapes = expected_parameters(config, in_features, out_features, "layer")
        return sum(math.prod(shape) for shape in shapes.values())
    _, size = fit_blocks(in_features, config.nblocks, config.block_size, "layer")
    rotation = in_features * (size - 1) // 2
    return rotation if config.method == "oft" else (config.nfactors or 1) * rotation + out_features


def load_baseline(path: str | Path, unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> BaselineAdapter:
    """Put a baseline that `save_adapter` wrote into its base model.

    path: the file. unet: the denoiser. text_encoders: those that belong to it. Returns the adapter. Raises UserError if
    the file is not one of a baseline, or does not fit; the models are unchanged then.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = BaselineConfig.from_dict(json.loads((file.metadata() or {})["config"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not the file of a baseline ({first_line(error)})") from error
    adapter = inject_baseline(config, unet, text_encoders)
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        adapter.remove()
        raise UserError(f"{path}: does not fit its base model ({first_line(error)})") from error
    return adapter


def _peft_config(config: BaselineConfig, names: list[str]) -> Any:
    size = {"nblocks": config.nblocks or 0, "block_size": config.block_size or 0}
    rank = config.rank or 0
    if config.method in ("lora", "dora"):
        return LoraConfig(r=rank, lora_alpha=rank, use_dora=config.method == "dora", target_modules=names)
    if config.method == "hra":
        return HRAConfig(r=rank, target_modules=names)
    if config.method == "lokr":
        rank = config.rank or WHOLE
        # LyCORIS' start, which is that of LoKr's paper. At PEFT's own only the small matrix learns at first.
        return LoKrConfig(
            r=rank, alpha=rank, decompose_factor=config.factor or 1, init_weights="lycoris", target_modules=names
        )
    if config.method == "oft":
        return OFTConfig(r=size["nblocks"], oft_block_size=size["block_size"], target_modules=names)
    return BOFTConfig(
        boft_block_num=size["nblocks"],
        boft_block_size=size["block_size"],
        boft_n_butterfly_factor=config.nfactors or 1,
        target_modules=names,
    )


@contextmanager
def _claimed_extension() -> Iterator[None]:
    """Inside the block PEFT takes BOFT's CUDA extension for loaded, and so makes all factors."""
    before: Any = boft._FBD_CUDA
    boft._FBD_CUDA = True  # type: ignore[assignment]
    try:
        yield
    finally:
        boft._FBD_CUDA = before


def _parameters(layer: Any) -> dict[str, nn.Parameter]:
    """A tuned layer's trainable parameters under our names."""
    kind = type(layer)
    if kind is TunedLinear:
        return {"weight": layer.weight}
    if kind is lora.Linear:
        product = {"lora_a": layer.lora_A[PEFT_NAME].weight, "lora_b": layer.lora_B[PEFT_NAME].weight}
        magnitudes = layer.lora_magnitude_vector  # empty without DoRA
        return product | ({"magnitude": magnitudes[PEFT_NAME].weight} if PEFT_NAME in magnitudes else {})
    if kind is hra.HRALinear:
        return {"reflections": layer.hra_u[PEFT_NAME]}
    if kind is lokr.Linear:
        found = {"small": layer.lokr_w1, "large": layer.lokr_w2, "large_a": layer.lokr_w2_a, "large_b": layer.lokr_w2_b}
        return {name: each[PEFT_NAME] for name, each in found.items() if PEFT_NAME in each}
    if kind is oft.Linear:
        return {"rotation": layer.oft_R[PEFT_NAME].weight}
    return {"rotation": layer.boft_R[PEFT_NAME], "output_scale": layer.boft_s[PEFT_NAME]}


def _place(models: Sequence[nn.Module], layer: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds `layer`, and under which name."""
    for model in models:
        for module in model.modules():
            for name, child in module.named_children():
                if child is layer:
                    return module, name
    raise LookupError("the layer is in none of the models")
