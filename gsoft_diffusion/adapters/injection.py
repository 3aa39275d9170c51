"""Which layers are adapted, and the adapter that owns everything trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

import gsoft
from gsoft.linear import RotatedLinear
from gsoft.linear_slice import AnyLinear, whole_of
from gsoft.rotation import parameter_shapes
from gsoft_diffusion.adapters.attention import attach, check_supported, detach
from gsoft_diffusion.adapters.size import with_usual_size
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.foundation.errors import UserError, user_errors
from gsoft_diffusion.models.attention_layers import (
    PROJECTIONS,
    attention_layers,
    clip_attention_layers,
    denoiser_attentions,
    is_fused,
)


def inject(config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> Adapter:
    """Freeze the base models and put a new adapter, which changes nothing yet, into them.

    config: how the rotations are made, and whether the text encoders get them too.
    denoiser: the UNet or transformer.
    text_encoders: the CLIP text encoders, in the pipeline's order.

    Every attention of a UNet gets a GSOFT attention processor. Of a transformer the projections of every attention are
    rotated, those of the text in joint attention included; those that share matrices with the feed-forward layer only
    with `config.fused_attention`. With `config.text_encoder` those of every CLIP attention are, too. Until something is
    trained, the models' outputs stay bit-equal.

    Raises UserError, before anything is changed, if a width does not fit the configuration (naming layer, width and
    valid values) or a model has attention that cannot be adapted.
    """
    adapter = Adapter(config, denoiser, text_encoders)
    adapter.attach()
    return adapter


class Adapter(gsoft.Adapter):
    """All trainable parameters of one adapted diffusion model, and the switches that act on all of it.

    Parameters are float32 and named independently of library versions: `unet.<attention path>.to_q.q_in`,
    `transformer.<attention path>.add_q_proj.q_out`, `text_encoder.layers.<i>.q_proj.output_scale`, `text_encoder_2.…`.
    """

    config: AdapterConfig

    def __init__(self, config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        """Looks at the models without changing them; `inject` is what puts an adapter to work.

        config: how the rotations are made, and whether the text encoders get them too.
        denoiser: the UNet or transformer.
        text_encoders: the CLIP text encoders, in the pipeline's order.

        Raises UserError as `inject`.
        """
        attentions, linears = _attentions_and_layers(config, denoiser, text_encoders)
        config = with_usual_size(config, linears)
        with user_errors():
            super().__init__(config, linears, (denoiser, *text_encoders))
        self._root = root_of(denoiser)
        # Attentions of which a processor computes with the layers; a dict keeps them out of the submodules.
        found = attentions.items() if self._root == "unet" else ()
        self._attentions = {path: attention for path, attention in found if isinstance(attention, Attention)}
        self._original_processors: dict[str, Any] = {}

    def self_rotating(self) -> list[str]:
        """Layers that the models call as modules; with the others an attention processor computes."""
        computed = {f"{path}.{name}" for path in self._attentions for name in PROJECTIONS}
        return [name for name, _, _ in self.layers() if name not in computed]

    def attach(self) -> None:
        """Freeze the models and rotate their layers."""
        super().attach()
        for path, attention in self._attentions.items():
            self._original_processors[path] = attention.processor
            attach(attention, {name: self.rotated(f"{path}.{name}") for name in PROJECTIONS})

    def detach(self) -> None:
        """Leave the models, attention processors included, with the weights that are in them."""
        super().detach()
        for path, processor in self._original_processors.items():
            detach(self._attentions[path], processor)

    def merge(self) -> None:
        """As `gsoft.Adapter.merge`. Raises UserError if models and adapter are on different devices."""
        with user_errors():
            super().merge()

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers are trained: in the `unet` or `transformer`, in the `text_encoder`s, in `total`.

        Checked against the closed form (see `rotation_count`).
        """
        own = f"{self._root}."
        denoiser = sum(parameter.numel() for name, parameter in self.named_parameters() if name.startswith(own))
        total = sum(parameter.numel() for parameter in self.parameters())
        expected = self.rotation_count()
        assert total == expected, f"{total} trainable parameters, {expected} by the closed form"
        return {self._root: denoiser, "text_encoder": total - denoiser, "total": total}


@user_errors()
def expected_shapes(
    config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters that `inject` would make, without making them; the same UserErrors.

    config: the settings that an adapter would have.
    denoiser: the UNet or transformer.
    text_encoders: the CLIP text encoders, in the pipeline's order.
    """
    _, linears = _attentions_and_layers(config, denoiser, text_encoders)
    config = with_usual_size(config, linears)
    return {
        f"{layer}.{name}": shape
        for layer, linear in linears.items()
        for name, shape in parameter_shapes(config, linear.in_features, linear.out_features, layer).items()
    }


def completed(config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> AdapterConfig:
    """The settings with what they leave open filled in (see `with_usual_size`), and what these models do not have off.

    config: the settings. denoiser: the UNet or transformer. text_encoders: the CLIP text encoders, in the pipeline's
    order. Raises UserError as `inject`.
    """
    attentions, linears = _attentions_and_layers(config, denoiser, text_encoders)
    return replace(with_usual_size(config, linears), fused_attention=any(map(is_fused, attentions.values())))


def _attentions_and_layers(
    config: AdapterConfig, denoiser: nn.Module, text_encoders: Sequence[nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, AnyLinear]]:
    """The denoiser's attentions and all layers to adapt."""
    attentions = find_attentions(denoiser, config.fused_attention)
    return attentions, find_linears(attentions, find_clip_attentions(config.text_encoder, text_encoders))


def root_of(denoiser: nn.Module) -> str:
    """What names of layers start with: the denoiser's name in a diffusers pipeline."""
    return "unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"


def find_attentions(denoiser: nn.Module, fused: bool = True) -> dict[str, nn.Module]:
    """The denoiser's attentions as `unet.<path>` or `transformer.<path>`. Raises UserError if one cannot be adapted.

    denoiser: the UNet or transformer. fused: whether attentions that share matrices with the feed-forward layer
    (FLUX.2's single-stream blocks) are among them.
    """
    root = root_of(denoiser)
    attentions = {f"{root}.{path}": module for path, module in denoiser_attentions(denoiser, fused).items()}
    if root == "unet":
        for path, attention in attentions.items():
            check_supported(attention, path)
    if not attentions:
        raise UserError(f"found no attention to adapt in {type(denoiser).__name__}")
    return attentions


def find_clip_attentions(wanted: bool, text_encoders: Sequence[nn.Module]) -> dict[str, CLIPAttention]:
    """The text encoders' attentions as `text_encoder.layers.<i>`, found by type: paths differ between versions.

    wanted: whether the adapter includes text encoders; if not, nothing is found.
    text_encoders: in the pipeline's order; those after the first are `text_encoder_2` and so on.

    Raises UserError if none is given, or one has no CLIP attention.
    """
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
) -> dict[str, AnyLinear]:
    """The linear layers to adapt, or slices of them, under their names in the adapter, `<attention>.<projection>`.

    attentions: the denoiser's, as `find_attentions` names them.
    clip_attentions: the text encoders', as `find_clip_attentions` names them.

    Raises UserError if a layer is not a plain one: rotated already, or quantised.
    """
    linears: dict[str, AnyLinear] = {}
    for path, attention in attentions.items():
        linears |= {f"{path}.{name}": layer for name, layer in attention_layers(attention).items()}
    for path, clip_attention in clip_attentions.items():
        linears |= {f"{path}.{name}": layer for name, layer in clip_attention_layers(clip_attention).items()}
    for layer, linear in linears.items():
        module = whole_of(linear)
        if not isinstance(module, nn.Linear) or isinstance(module, RotatedLinear):
            raise UserError(f"{layer} is a {type(module).__name__}: remove the adapter that is on it first")
        if not module.weight.is_floating_point():
            raise UserError(f"{layer} is quantised: load the base model in float32, float16 or bfloat16")
    return linears
