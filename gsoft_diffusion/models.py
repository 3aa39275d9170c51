"""The base model's five parts, loaded from one place: tokenizer, text encoder, VAE, UNet, noise schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from gsoft_diffusion.adapter_file import AdapterFile, BaseModelIdentity, fingerprint
from gsoft_diffusion.errors import UserError, first_line

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the name of --mixed_precision


@dataclass
class Models:
    """A text-to-image latent diffusion model of Stable Diffusion 1.x's or 2.x's make.

    Text encoder and UNet have the dtype they were loaded with. The VAE is always float32: half precision overflows in
    some, and it runs once for each picture.
    """

    name: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along each side of one latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """Side in pixels of the square pictures that the UNet was made for."""
        return self.unet.config.sample_size * self.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a square picture."""
        side = resolution // self.vae_scale_factor
        return self.unet.config.in_channels, side, side

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError if pictures of this size do not survive the VAE's and the UNet's halvings."""
        step = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % step:
            raise UserError(f"--resolution {resolution}: must be a multiple of {step} for {self.name}")

    def identity(self) -> BaseModelIdentity:
        """What an adapter remembers of its base. Ask before an adapter is injected."""
        return BaseModelIdentity(name=self.name, fingerprint=fingerprint(self.unet, [self.text_encoder]))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers (prompts, text length), padded; what does not fit is cut and said so."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for prompt in prompts:
            count = len(self.tokenizer(prompt, verbose=False).input_ids)
            if count > length:
                _say_cut(prompt, count, length)
        encoded = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return encoded.input_ids.to(self.device)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (prompts, text length, width) that condition the UNet."""
        return self.text_encoder(self.tokenize(prompts))[0]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance, stacked on dim 1, of the latents of pictures (N, 3, H, W) in [-1, 1]."""
        return self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist.parameters

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents as the UNet sees them, drawn by `noise` from what `encode_images` returned; float32."""
        distribution = DiagonalGaussianDistribution(moments)
        return (distribution.mean + distribution.std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), about in [-1, 1], of latents as the UNet sees them."""
        return self.vae.decode(latents.float() / self.vae.config.scaling_factor).sample


def load_models(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Models:
    """Load a base model from a diffusers folder or the hub; weights from safetensors only.

    Raises UserError naming the part that is missing, broken, or of an architecture that this project does not train.
    """
    transformers.utils.logging.disable_progress_bar()
    folder = _folder(name, revision, variant)
    weights: dict[str, Any] = {"variant": variant, "use_safetensors": True, "local_files_only": True}
    tokenizer = _load("tokenizer", folder, _load_tokenizer)
    text_encoder = _load(
        "text_encoder", folder, lambda path: CLIPTextModel.from_pretrained(path, dtype=dtype, **weights)
    )
    vae = _load("vae", folder, lambda path: AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, **weights))
    unet = _load("unet", folder, lambda path: UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype, **weights))
    scheduler = _load("scheduler", folder, _load_scheduler)
    models = Models(name, tokenizer, text_encoder, vae, unet, scheduler)
    _check_architecture(models)
    for part in (text_encoder, vae, unet):
        try:
            part.requires_grad_(False).to(device)
        except (RuntimeError, AssertionError) as error:  # no such device, or its memory is full
            raise UserError(f"cannot put {name} on {device}: {first_line(error)}") from error
    return models


def load_base(
    file: AdapterFile,
    moved_to: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Models:
    """Load the model that an adapter was trained on, or the one at `moved_to` instead; the rest as in `load_models`."""
    versions = {} if moved_to else {name: file.training.get(name) for name in ("revision", "variant")}
    return load_models(
        moved_to or file.base_model.name,
        **{name: value for name, value in versions.items() if isinstance(value, str)},
        dtype=dtype,
        device=device,
    )


def _folder(name: str, revision: str | None, variant: str | None) -> Path:
    """The local folder of a model: as named, inside this repository, or fetched from the hub into its cache."""
    for folder in (Path(name).expanduser(), REPOSITORY / name):
        if folder.is_dir():
            if missing := [part for part in PARTS if not (folder / part).is_dir()]:
                raise UserError(f"model folder {name} has no {', '.join(missing)}: it must be a whole diffusers model")
            return folder
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"there is no model folder {name}, and it is not the name of a model on the hub")
    end = f".{variant}.safetensors" if variant else ".safetensors"
    wanted = ["*/*.json", "tokenizer/*", *(f"*/*model{middle}{end}" for middle in ("", "-*-of-*"))]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"cannot get model {name} from the hub ({first_line(error)}); check the name and the network, "
            "or give the path of a local diffusers folder"
        ) from error
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise UserError(f"model {name} on the hub has no {', '.join(missing)}: it must be a whole diffusers model")
    return folder


def _load(part: str, folder: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(folder / part)
    except Exception as error:  # the libraries raise whatever their parsers raise
        raise UserError(f"cannot load the {part} in {folder / part}: {first_line(error)}") from error


def _load_tokenizer(path: Path) -> CLIPTokenizer:
    if not (path / "tokenizer.json").is_file() and not all((path / n).is_file() for n in ("vocab.json", "merges.txt")):
        raise FileNotFoundError("neither tokenizer.json nor vocab.json with merges.txt")  # it would load, empty
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def _load_scheduler(path: Path) -> SchedulerMixin:
    config = DDPMScheduler.load_config(path, local_files_only=True)  # a dict of plain values, whatever the class
    return scheduler_class(config["_class_name"]).from_config(config)


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The diffusers scheduler of that name, such as DDIMScheduler; UserError if there is none."""
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(f"diffusers has no scheduler {name}; try DDIMScheduler or DPMSolverMultistepScheduler")
    return found


def _check_architecture(models: Models) -> None:
    unet, text_width = models.unet.config, models.text_encoder.config.hidden_size
    if unet.cross_attention_dim != text_width:
        raise UserError(
            f"{models.name}: the text encoder's width is {text_width}, but the UNet takes {unet.cross_attention_dim}"
        )
    if unet.addition_embed_type or unet.class_embed_type or unet.in_channels != models.vae.config.latent_channels:
        raise UserError(f"{models.name}: not a text-to-image model like Stable Diffusion 1.x or 2.x")


@cache  # once for each prompt
def _say_cut(prompt: str, count: int, length: int) -> None:
    logger.warning("prompt cut after %d of its %d tokens: %.60s…", length, count, prompt)
