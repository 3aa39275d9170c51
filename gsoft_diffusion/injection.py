"""Which layers are adapted, and the adapter that owns everything trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from gsoft_diffusion.attention import (
    PROJECTIONS,
    GuardedAttention,
    attach,
    attention_layers,
    check_supported,
    detach,
    layer_place,
)
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.projection import GSOFTLinear, GSOFTProjection, parameter_count, parameter_shapes
from gsoft_diffusion.rotation_group import RotationGroup

ATTENTIONS = (Attention, AttentionModuleMixin)  # diffusers' classes: the general one, and those of one model each
CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def inject(config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> Adapter:
    """Freeze the base models and put a new, still neutral adapter into them.

    Every attention of a UNet gets a GSOFT attention processor. Of a transformer the projections of every attention are
    wrapped, those of the text in joint attention included, and with `config.text_encoder` those of every CLIP
    attention. Until something is trained, the models' outputs stay bit-equal.

    Raises UserError, before anything is changed, if a width does not fit the configuration (naming layer, width and
    valid values) or a model has attention that cannot be adapted.
    """
    adapter = Adapter(config, denoiser, text_encoders)
    adapter._attach()
    return adapter


class Adapter(nn.Module):
    """All trainable parameters of one adapted model, and the switches that act on all of it.

    Parameters are float32 and named independently of library versions: `unet.<attention path>.to_q.q_in`,
    `transformer.<attention path>.add_q_proj.q_out`, `text_encoder.layers.<i>.q_proj.output_scale`, `text_encoder_2.…`.

    The adapter stands beside the models, not inside them: `unet.save_pretrained`, `unet.state_dict` and
    `unet.to(dtype)` see only the base model. So it is moved to another device by itself, `adapter.to(device)` (or
    merged first), and whatever module runs the training step must hold it as a submodule.
    """

    def __init__(self, config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        """Looks at the models without changing them; `inject` is what puts an adapter to work."""
        super().__init__()
        self.config = config
        self._root = root_of(denoiser)
        self._models = (denoiser, *text_encoders)  # tuples and dicts keep the base models out of the submodules
        self._attentions = find_attentions(denoiser)
        self._clip_attentions = find_clip_attentions(config.text_encoder, text_encoders)
        self._linears = find_linears(self._attentions, self._clip_attentions)
        for name, linear in self._linears.items():
            device = linear.weight.device
            projection = GSOFTProjection(config, linear.in_features, linear.out_features, layer=name, device=device)
            add_submodule(self, name, projection)
        self._original_processors: dict[str, Any] = {}
        self._wrapped: dict[str, tuple[nn.Module, str]] = {}  # layers that a GSOFTLinear stands in for: where it is
        self._required_grad: list[nn.Parameter] = []

    def _attach(self) -> None:
        self._required_grad = [p for model in self._models for p in model.parameters() if p.requires_grad]
        for model in self._models:
            model.requires_grad_(False)
        for path, attention in self._attentions.items():
            if isinstance(attention, Attention) and self._root == "unet":
                self._original_processors[path] = attention.processor
                attach(attention, {name: self._projection(f"{path}.{name}") for name in PROJECTIONS})
            else:
                self._wrap(path, {name: layer_place(attention, name) for name in attention_layers(attention)})
        for path, clip_attention in self._clip_attentions.items():
            self._wrap(path, {name: (clip_attention, name) for name in CLIP_PROJECTIONS})
        self._share_rotations()

    def _wrap(self, path: str, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Put a GSOFTLinear in the place of every layer of an attention."""
        for name, place in places.items():
            layer = f"{path}.{name}"
            self._linears[layer] = GSOFTLinear(self._linears[layer], self._projection(layer))
            self._wrapped[layer] = place
            setattr(*place, self._linears[layer])

    def _share_rotations(self) -> None:
        """Have equal-shaped projections of a model make their rotations together."""
        groups: dict[object, list[str]] = defaultdict(list)
        for name, linear in self._linears.items():
            groups[name.partition(".")[0], linear.weight.shape].append(name)
        for names in groups.values():
            projections = [self._projection(name) for name in names]
            group = RotationGroup(projections, [self._linears[name] for name in names])
            for index, projection in enumerate(projections):
                projection.join(group, index)

    def remove(self) -> None:
        """Give the models back exactly as they were: weights, layers, processors and what required gradients."""
        self.unmerge()
        for path, processor in self._original_processors.items():
            attention = self._attentions[path]
            assert isinstance(attention, GuardedAttention)
            detach(attention, processor)
        for layer, place in self._wrapped.items():
            self._linears[layer] = getattr(*place).unwrapped()
            setattr(*place, self._linears[layer])
        for parameter in self._required_grad:
            parameter.requires_grad_(True)

    @property
    def merged(self) -> bool:
        return any(projection.merged for projection in self._projections())

    def merge(self) -> None:
        """Write the rotated weights into the models, which then cost exactly what the base models cost.

        `unmerge` afterwards if the adapter is to be trained or loaded again: merged weights do not follow it.
        """
        for name, linear in self._linears.items():
            self._projection(name).merge(linear)

    def unmerge(self) -> None:
        """Put the base models' weights back, bit for bit."""
        for name, linear in self._linears.items():
            self._projection(name).unmerge(linear)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the models are the untouched base models, merged or not."""
        was_merged, was_enabled = self.merged, [projection.enabled for projection in self._projections()]
        self.unmerge()
        self._enable([False] * len(was_enabled))
        try:
            yield
        finally:
            self._enable(was_enabled)
            if was_merged:
                self.merge()

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers are trained: in the `unet` or `transformer`, in the `text_encoder`s, in `total`.

        Checked against the closed form: `m·n·(b−1)/2` for each rotation of a width `n`, `out_features` for each scale.
        """
        own = f"{self._root}."
        denoiser = sum(parameter.numel() for name, parameter in self.named_parameters() if name.startswith(own))
        total = sum(parameter.numel() for parameter in self.parameters())
        expected = sum(
            parameter_count(self.config, linear.in_features, linear.out_features) for linear in self._linears.values()
        )
        assert total == expected, f"{total} trainable parameters, {expected} by the closed form"
        return {self._root: denoiser, "text_encoder": total - denoiser, "total": total}

    def orthogonality_error(self) -> float:
        """Largest entry of `|QᵀQ − I|` over all rotations."""
        return max(projection.orthogonality_error() for projection in self._projections())

    def layers(self) -> Iterator[tuple[str, nn.Linear, GSOFTProjection]]:
        """Every adapted layer: its name, the model's layer, what is learned for it."""
        for name, linear in self._linears.items():
            yield name, linear, self._projection(name)

    def _projection(self, name: str) -> GSOFTProjection:
        projection = self.get_submodule(name)
        assert isinstance(projection, GSOFTProjection)
        return projection

    def _projections(self) -> list[GSOFTProjection]:
        return [self._projection(name) for name in self._linears]

    def _enable(self, states: Sequence[bool]) -> None:
        for projection, state in zip(self._projections(), states, strict=True):
            projection.enabled = state


def expected_shapes(
    config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters that `inject` would make, without making them; the same UserErrors."""
    linears = find_linears(find_attentions(denoiser), find_clip_attentions(config.text_encoder, text_encoders))
    return {
        f"{layer}.{name}": shape
        for layer, linear in linears.items()
        for name, shape in parameter_shapes(config, linear.in_features, linear.out_features, layer).items()
    }


def root_of(denoiser: nn.Module) -> str:
    """What names of layers start with: the denoiser's name in a diffusers pipeline."""
    return "unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"


def find_attentions(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The denoiser's attentions as `unet.<path>` or `transformer.<path>`. UserError if one cannot be adapted.

    Attentions whose projections share a matrix with the feed-forward layer (FLUX.2's single-stream blocks) are not
    among them.
    """
    root = root_of(denoiser)
    attentions = {
        f"{root}.{path}": module for path, module in denoiser.named_modules() if isinstance(module, ATTENTIONS)
    }
    if root == "unet":
        for path, attention in attentions.items():
            check_supported(attention, path)
    attentions = {path: attention for path, attention in attentions.items() if hasattr(attention, "to_q")}
    if not attentions:
        raise UserError(f"found no attention to adapt in {type(denoiser).__name__}")
    return attentions


def find_clip_attentions(wanted: bool, text_encoders: Sequence[nn.Module]) -> dict[str, CLIPAttention]:
    """The text encoders' attentions as `text_encoder.layers.<i>`, found by type: paths differ between versions."""
    if not wanted:
        return {}
    if not text_encoders:
        raise UserError("the adapter includes the text encoder (text_encoder is on), but no text encoder was given")
    found: dict[str, CLIPAttention] = {}
    for count, encoder in enumerate(text_encoders, start=1):
        root = "text_encoder" if count == 1 else f"text_encoder_{count}"
        attentions = [module for module in encoder.modules() if isinstance(module, CLIPAttention)]
        if not attentions:
            raise UserError(f"{root}: {type(encoder).__name__} has no CLIP attention to adapt; switch text_encoder off")
        found |= {f"{root}.layers.{index}": attention for index, attention in enumerate(attentions)}
    return found


def find_linears(
    attentions: Mapping[str, nn.Module], clip_attentions: Mapping[str, CLIPAttention]
) -> dict[str, nn.Linear]:
    """The linear layers to adapt under their names in the adapter. Raises UserError if one is not a plain layer."""
    linears: dict[str, nn.Linear] = {}
    for path, attention in attentions.items():
        linears |= {f"{path}.{name}": layer for name, layer in attention_layers(attention).items()}
    for path, clip_attention in clip_attentions.items():
        linears |= {f"{path}.{name}": layer for name, layer in clip_attention_layers(clip_attention).items()}
    for layer, linear in linears.items():
        if not isinstance(linear, nn.Linear) or isinstance(linear, GSOFTLinear):
            raise UserError(f"{layer} is a {type(linear).__name__}: remove the adapter that is on it first")
        if not linear.weight.is_floating_point():
            raise UserError(f"{layer} is quantised: load the base model in float32, float16 or bfloat16")
    return linears


def clip_attention_layers(attention: CLIPAttention) -> dict[str, nn.Linear]:
    """The layers that are rotated, under the names in `CLIP_PROJECTIONS`."""
    return {name: getattr(attention, name) for name in CLIP_PROJECTIONS}


def add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` under a dotted path, with empty modules on the way."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
