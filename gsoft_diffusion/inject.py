"""Which layers are adapted, and the adapter that owns everything trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from gsoft_diffusion.attention import PROJECTIONS, attach, attention_layers, check_supported, detach
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.projection import GSOFTLinear, GSOFTProjection, parameter_count, parameter_shapes

CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def inject(config: AdapterConfig, unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> Adapter:
    """Freeze the base models and put a new, still neutral adapter into them.

    Every attention of the UNet gets a GSOFT attention processor; with `config.text_encoder` the four projections of
    every CLIP attention are wrapped as well. Until something is trained, the models' outputs stay bit-equal.

    Raises UserError, before anything is changed, if a width does not fit the configuration (naming layer, width and
    valid values) or a model has attention that cannot be adapted.
    """
    adapter = Adapter(config, unet, text_encoders)
    adapter._attach()
    return adapter


class Adapter(nn.Module):
    """All trainable parameters of one adapted model, and the switches that act on all of it.

    Parameters are float32 and named independently of library versions: `unet.<attention path>.to_q.q_in`,
    `text_encoder.layers.<i>.q_proj.output_scale`, `text_encoder_2.…`.

    The adapter stands beside the models, not inside them: `unet.save_pretrained`, `unet.state_dict` and
    `unet.to(dtype)` see only the base model. So it is moved to another device by itself, `adapter.to(device)` (or
    merged first), and whatever module runs the training step must hold it as a submodule.
    """

    def __init__(self, config: AdapterConfig, unet: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        """Looks at the models without changing them; `inject` is what puts an adapter to work."""
        super().__init__()
        self.config = config
        self._models = (unet, *text_encoders)  # tuples and dicts keep the base models out of the submodules
        self._attentions = find_attentions(unet)
        self._clip_attentions = find_clip_attentions(config.text_encoder, text_encoders)
        self._linears = find_linears(self._attentions, self._clip_attentions)
        for name, linear in self._linears.items():
            device = linear.weight.device
            projection = GSOFTProjection(config, linear.in_features, linear.out_features, layer=name, device=device)
            add_submodule(self, name, projection)
        self._original_processors: dict[str, Any] = {}
        self._required_grad: list[nn.Parameter] = []

    def _attach(self) -> None:
        self._required_grad = [p for model in self._models for p in model.parameters() if p.requires_grad]
        for model in self._models:
            model.requires_grad_(False)
        for path, attention in self._attentions.items():
            self._original_processors[path] = attention.processor
            attach(attention, {name: self._projection(f"{path}.{name}") for name in PROJECTIONS})
        for path, clip_attention in self._clip_attentions.items():
            for name in CLIP_PROJECTIONS:
                layer = f"{path}.{name}"
                self._linears[layer] = GSOFTLinear(self._linears[layer], self._projection(layer))
                setattr(clip_attention, name, self._linears[layer])

    def remove(self) -> None:
        """Give the models back exactly as they were: weights, layers, processors and what required gradients."""
        self.unmerge()
        for path, attention in self._attentions.items():
            detach(attention, self._original_processors[path])
        for path, clip_attention in self._clip_attentions.items():
            for name in CLIP_PROJECTIONS:
                layer = f"{path}.{name}"
                self._linears[layer] = getattr(clip_attention, name).unwrapped()
                setattr(clip_attention, name, self._linears[layer])
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
        """How many numbers are trained: in the UNet, in the text encoders, in total.

        Checked against the closed form: `m·n·(b−1)/2` for each rotation of a width `n`, `out_features` for each scale.
        """
        unet = sum(parameter.numel() for name, parameter in self.named_parameters() if name.startswith("unet."))
        total = sum(parameter.numel() for parameter in self.parameters())
        expected = sum(
            parameter_count(self.config, linear.in_features, linear.out_features) for linear in self._linears.values()
        )
        assert total == expected, f"{total} trainable parameters, {expected} by the closed form"
        return {"unet": unet, "text_encoder": total - unet, "total": total}

    def orthogonality_error(self) -> float:
        """Largest entry of `|QᵀQ − I|` over all rotations."""
        return max(projection.orthogonality_error() for projection in self._projections())

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
    config: AdapterConfig, unet: nn.Module, text_encoders: Sequence[nn.Module] = ()
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters that `inject` would make, without making them; the same UserErrors."""
    linears = find_linears(find_attentions(unet), find_clip_attentions(config.text_encoder, text_encoders))
    return {
        f"{layer}.{name}": shape
        for layer, linear in linears.items()
        for name, shape in parameter_shapes(config, linear.in_features, linear.out_features, layer).items()
    }


def find_attentions(unet: nn.Module) -> dict[str, Attention]:
    """The UNet's attentions as `unet.<path>`. Raises UserError if there is one that cannot be adapted."""
    attentions = {f"unet.{path}": module for path, module in unet.named_modules() if isinstance(module, Attention)}
    for path, attention in attentions.items():
        check_supported(attention, path)
    if not attentions:
        raise UserError(f"found no attention to adapt in {type(unet).__name__}")
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
    attentions: Mapping[str, Attention], clip_attentions: Mapping[str, CLIPAttention]
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
