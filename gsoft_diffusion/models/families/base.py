"""The interface of base models of all families, for training, drawing and exporting."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, get_type_hints

import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel

from gsoft_diffusion.foundation.errors import UserError, printable
from gsoft_diffusion.foundation.memory import free_memory, is_out_of_memory, waits_not
from gsoft_diffusion.models.frozen_storage import stored_weights
from gsoft_diffusion.models.noise import DIFFUSION_PREDICTIONS

logger = logging.getLogger(__name__)

TILE = 512  # pixels along a side of the VAE's tiles
ENCODING_BYTES = 2**29  # what a text encoder takes besides its weights while it computes, generously

# All that prompts say to the denoiser; the first dimension of each counts prompts. What decides shapes is on the CPU,
# so that nobody waits for the device to know it; all else is on the model's device.
Conditioning = dict[str, Tensor]


@dataclass(kw_only=True)
class BaseModel(ABC):
    """A text-to-image latent diffusion model of one family, taken apart.

    A family is a subclass. Its fields are the parts of the diffusers folder, under their names there, and their types
    are the classes that the parts must have. Text encoders and denoiser have the dtype they were loaded with. The VAE
    is always float32: half precision overflows in some, and it runs once for each picture.

    index_values: the plain values in the folder's index, which are arguments of the diffusers pipeline.
    """

    name: str
    index_values: dict[str, Any] = field(default_factory=dict)
    scheduler: SchedulerMixin
    vae: AutoencoderKL

    title: ClassVar[str]  # the family's name for people
    pipeline: ClassVar[str]  # diffusers' class for it
    original_code: ClassVar[str]  # whose names single files and kohya's LoRAs have, as the ModelSpec standard calls it
    index: ClassVar[dict[str, Any]] = {}  # what the index of a merged folder says beside parts and index_values

    @classmethod
    def parts(cls) -> dict[str, type]:
        """Every part's class, by the name of its folder."""
        hints = get_type_hints(cls)
        return {part.name: hints[part.name] for part in fields(cls) if part.name not in ("name", "index_values")}

    # What the family is

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that predicts noise: the part that every adapter is in."""

    @property
    @abstractmethod
    def text_encoders(self) -> list[PreTrainedModel]:
        """The text encoders that an adapter may be in."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side in pixels of the square pictures that the model was made for."""

    @property
    @abstractmethod
    def size_step(self) -> int:
        """Sides of pictures must be multiples of so many pixels."""

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, in the pipeline's order."""
        return [getattr(self, part) for part in self.parts() if part.startswith("tokenizer")]

    @abstractmethod
    def check(self) -> None:
        """Raise UserError if the parts do not belong together, or are a variant that is not plain text-to-image."""

    @abstractmethod
    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The first half of encoding prompts: what does not depend on the adapter and is cached.

        Returns tensors as `Conditioning` has them; what they are is the family's own matter.
        """

    @abstractmethod
    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        """The second half: what the denoiser is told, from the text encoders that may have an adapter.

        prepared: what `prepare` returned, or any of its prompts by the first dimension.
        """

    @abstractmethod
    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The denoiser's prediction (N, C, h, w) in float32.

        noisy_latents: (N, C, h, w), of any dtype; they are cast to the denoiser's.
        timesteps: (N,), or () for one that all share.
        conditioning: what `encode` returned for N prompts.
        views: (N, 6), how each picture came from its photo (see `whole_view`), for families that are told.
        guidance_scale: for models that were taught to guide themselves (`guides_itself`); 1 is unguided.
        """

    # What a family may add

    @property
    def guides_itself(self) -> bool:
        """Whether pictures are drawn without classifier-free guidance: the model was distilled to do without."""
        return False

    @property
    def takes_guidance(self) -> bool:
        """Whether a guidance scale has an effect: in classifier-free guidance, or as an input of the model."""
        return not self.guides_itself

    @property
    def usual_guidance(self) -> float | None:
        """The guidance scale that the model is drawn with if none is given; None for that of most models."""
        return None

    @property
    def largest_side(self) -> int | None:
        """The longest side in pixels that the denoiser has positions for; None if there is no end to them."""
        return None

    @property
    def has_known_noise(self) -> bool:
        """Whether the scheduler adds noise, and has it predicted, in the family's way.

        Fine-tunes exist that learned another one, such as flow matching in the networks of Stable Diffusion XL.
        """
        prediction = getattr(self.scheduler.config, "prediction_type", None)
        return hasattr(self.scheduler, "alphas_cumprod") and prediction in DIFFUSION_PREDICTIONS

    def noise_scheduler(self) -> Any:
        """How noise is added in training: an object with `add_noise`, and `config` for `prediction_target`."""
        return DDPMScheduler.from_config(self.scheduler.config)

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps (B,) to train on.

        uniform: whole numbers (B,), drawn evenly below the noise scheduler's `num_train_timesteps`.
        """
        return uniform

    def make_scheduler(self, kind: Any, num_inference_steps: int, latent_shape: tuple[int, int, int]) -> Any:
        """A diffusers scheduler with all it takes of the model's settings, its steps set and its timesteps on the CPU.

        kind: the scheduler's class.
        num_inference_steps: how many steps it takes from noise to picture.
        latent_shape: (channels, height, width) of the latents to draw, which the steps of some families depend on.

        Raises ValueError, as diffusers does, if the scheduler cannot have so many or so few steps.
        """
        scheduler = kind.from_config(self.scheduler.config, clip_sample=False)  # latents go beyond [-1, 1]
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def keeps_schedule(self, scheduler: Any) -> bool:
        """Whether a scheduler that `make_scheduler` made has the model's noise schedule."""
        wanted, found = self.noise_scheduler().alphas_cumprod, getattr(scheduler, "alphas_cumprod", None)
        return found is not None and found.shape == wanted.shape and torch.allclose(found.to(wanted), wanted, atol=1e-6)

    def original_layout(self) -> dict[str, Tensor]:
        """All weights by their names in the family's original checkpoints, whole models in one file.

        For families that have such a layout: see `check_format`. Raises UserError if a weight has no place in it.
        """
        raise NotImplementedError

    @property
    @abstractmethod
    def architecture(self) -> str:
        """What the family is called in metadata of files, by the ModelSpec standard and as kohya's tools write it."""

    def kohya_metadata(self) -> dict[str, str]:
        """What web UIs read to tell which base model a LoRA in kohya's format is for.

        For families that have that format: see `check_format`.
        """
        raise NotImplementedError

    def kohya_place(self, module: str) -> tuple[str, int]:
        """What kohya's LoRAs call a module of the diffusers pipeline, such as `unet.mid_block.….to_q`.

        Modules that share a matrix there, one below the other, have its name; with it comes how many of its rows are
        below all that an adapter may be on.
        """
        raise NotImplementedError

    @classmethod
    def check_format(cls, name: str) -> None:
        """Raise UserError if what is trained on the family cannot be exported in a format, one of `ExportConfig`'s."""
        if name == "checkpoint" and cls.original_layout is BaseModel.original_layout:
            raise UserError(f"--format {name}: no single-file layout is known for {cls.title}; use --format diffusers")
        if name == "kohya_lora" and cls.kohya_metadata is BaseModel.kohya_metadata:
            raise UserError(f"--format {name}: not known for {cls.title}; use --format diffusers_lora or diff")

    def encode_negative(self, prompt: str) -> Conditioning:
        """The conditioning of one negative prompt: that of any prompt, unless the family overrides this."""
        return self.encode_prompts([prompt])

    # What follows from that

    @property
    def device(self) -> torch.device:
        """Where the denoiser is, and with it all that it is given."""
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of number that the denoiser computes in."""
        return self.denoiser.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along each side of one latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, width: int, height: int | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of a picture's latents.

        width, height: sides of the picture in pixels; it is square if no height is given.
        """
        factor = self.vae_scale_factor
        return self.vae.config.latent_channels, (height or width) // factor, width // factor

    def check_sides(self, **sides: int) -> None:
        """Raise UserError if a side, named as its option, does not survive the VAE's and the denoiser's halvings, or is
        longer than `largest_side`.
        """
        for name, side in sides.items():
            if side % self.size_step:
                raise UserError(f"--{name} {side}: must be a multiple of {self.size_step} for {self.name}")
        for name, side in sides.items():
            if self.largest_side is not None and side > self.largest_side:
                raise UserError(f"--{name} {side}: must be {self.largest_side} or less for {self.name}")

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, slower."""
        self.denoiser.enable_gradient_checkpointing()
        for text_encoder in self.text_encoders:
            text_encoder.activation_checkpointing_enable()

    @contextmanager
    def on_device(self, *parts: nn.Module, written: bool = False) -> Iterator[None]:
        """Move these parts to the denoiser's device, and back after the block.

        A text encoder that no adapter may be in stays where it is if the device has no room for it: it computes there.

        parts: networks with weights, each on one device.
        written: whether weights are written to in the block. If not, they are not copied back: they are still there.
        """
        parts = tuple(part for part in parts if self._has_room_for(part))
        homes = [next(part.parameters()).device for part in parts]
        kept = [
            (module, name, weight, weight.data)
            for module in ([] if written else nn.ModuleList(parts).modules())
            for name, weight in module.named_parameters(recurse=False)
        ]
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            for module, name, weight, numbers in kept:
                weight.data = numbers
                setattr(module, name, weight)  # on some devices `to` puts another in its place
            for part, home in zip(parts, homes, strict=True):
                part.to(home)

    def _has_room_for(self, part: nn.Module) -> bool:
        """Whether a part is on the denoiser's device, fits beside what is there, or has to be there (see `prepare`)."""
        may_stay = any(part is encoder for encoder in self.all_text_encoders()) and part not in self.text_encoders
        if not may_stay or next(part.parameters()).device == self.device:
            return True
        needed = sum(weight.nbytes for weight in (*part.parameters(), *stored_weights(part))) + ENCODING_BYTES
        if needed <= free_memory(self.device):
            return True
        _said_once(f"{type(part).__name__} does not fit beside the denoiser on {self.device}: it computes where it is")
        return False

    def all_text_encoders(self) -> list[nn.Module]:
        """All text encoders, those that no adapter may be in as well."""
        return [getattr(self, name) for name in self.parts() if name.startswith("text_encoder")]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts as the denoiser wants them: both halves at once, without a cache."""
        with self.on_device(*self.all_text_encoders()):
            return self.encode(self.prepare(prompts))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of pictures' latents, stacked on dim 1: (N, 2·C, h, w), float32.

        pixels: pictures (N, 3, H, W) in [-1, 1].
        """
        with self.on_device(self.vae):
            encoded = in_tiles_if_needed(self.vae, self.vae.encode, pixels.to(self.device, torch.float32))
            return encoded.latent_dist.parameters

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents as the denoiser sees them, (N, C, h, w) as `latent_shape` says; float32.

        moments: what `encode_images` returned.
        noise: standard normal, in the shape of the result; it decides which latents are drawn.
        """
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean + distribution.std * noise
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), about in [-1, 1], of latents as the denoiser sees them."""
        latents = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        with self.on_device(self.vae):
            return in_tiles_if_needed(self.vae, self.vae.decode, latents).sample


@cache
def _said_once(text: str) -> None:
    logger.warning(text)


def in_tiles_if_needed(vae: Any, compute: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    """What a VAE makes of pictures or latents: whole, or piece by piece from the first time on that memory runs out.

    vae: one of diffusers'. compute: its `encode` or `decode`. inputs: what is passed to it. Raises PyTorch's error if
    pieces are too large as well; pictures up to the size of a piece (`TILE`) are one.

    Pieces overlap, and differ a little from a whole picture's, since the VAE sees less around them.
    """
    try:
        return compute(inputs)
    except RuntimeError as error:
        if vae.use_tiling or not is_out_of_memory(error):
            raise
        logger.warning("the GPU's memory is too small for a whole picture in the VAE: it computes in tiles from now on")
    factor = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.tile_sample_min_size = min(TILE, vae.tile_sample_min_size)
    vae.tile_latent_min_size = vae.tile_sample_min_size // factor
    vae.enable_tiling()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return compute(inputs)


def chosen(conditioning: Conditioning, numbers: Tensor) -> Conditioning:
    """What prompts say to the denoiser, for some of them.

    numbers: whole numbers (K,), the prompts' places, in any order and as often as wanted. On the CPU they cost no wait.
    """
    # A copy to main memory has to be waited for: before it arrives, the CPU would read whatever is there.
    return {
        name: tensor[numbers.to(tensor.device, non_blocking=waits_not(tensor.device))]
        for name, tensor in conditioning.items()
    }


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """What the prompts of one or more parts say to the denoiser, in their order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def whole_view(width: int, height: int) -> Tensor:
    """(1, 6): the view of a photo that is shown as it is.

    A view is the photo's height and width; top and left edge of the crop, in pixels after scaling; and the picture's
    height and width. Source: Podell et al., *SDXL*, §2.2.
    """
    return torch.tensor([[height, width, 0, 0, height, width]])


def tokenized(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    prompts: Sequence[str] | None = None,
    padding_side: str | None = None,
) -> BatchEncoding:
    """`input_ids` and `attention_mask` of texts, (texts, length), int64, padded.

    A text that does not fit is cut, with a warning.

    tokenizer: one of transformers'.
    texts: any number.
    length: tokens of each, those that the tokenizer adds included.
    prompts: what people know the texts by, if they are more than prompts.
    padding_side: left or right; by default the tokenizer's own.
    """
    for text, prompt in zip(texts, prompts or texts, strict=True):
        count = len(tokenizer(text, verbose=False).input_ids)
        if count > length:
            _say_cut(prompt, count, length)
    shape: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
    return tokenizer(list(texts), **shape, padding_side=padding_side, return_tensors="pt")


@cache  # once for each prompt
def _say_cut(prompt: str, count: int, length: int) -> None:
    logger.warning("prompt cut after %d of its %d tokens: %.60s…", length, count, printable(prompt))
