"""A base model from one `.safetensors` file, as model sites offer them, read by diffusers' own converters.

Such a file holds weights only. What it lacks (tokenizers, noise schedule, how the model predicts) comes from the
configuration of a model of the same make: a diffusers folder, or the few small files of one on the hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.models.families import BaseModel

DENOISER = "model.diffusion_model."  # before its weights, in files of whole models
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
EDM = "edm_"  # begins what tools put into models that learned EDM's noise, such as CosXL and Playground 2.5
SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")  # ends of what ComfyUI's quantisation adds


def is_single_file(name: str) -> bool:
    """Whether this names a checkpoint file rather than a folder or a model on the hub.

    Raises UserError if the file does not exist, or for kinds that can run code when opened.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in PICKLED:
        raise UserError(f"{name}: pickled checkpoints can run code, so only .safetensors files are read")
    if path.suffix == ".safetensors" and not path.is_file():
        raise UserError(f"there is no model file {name}")
    return path.suffix == ".safetensors"


def usual_config(name: str) -> str:
    """The name on the hub of the model whose configuration diffusers takes for such a file, by the weights in it.

    Raises UserError if the file cannot be read or does not hold a whole model.
    """
    try:
        tensors = load_file(Path(name).expanduser())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: not a readable safetensors file ({first_line(error)})") from error
    if not any(key.startswith(DENOISER) for key in tensors):
        raise UserError(f"{name}: holds no whole model; name a checkpoint, and no adapter, LoRA or part of a model")
    return fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]


def load_parts(name: str, family: type[BaseModel], config: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The family's parts, by name: weights from the file, all else from a diffusers folder.

    name: the `.safetensors` file.
    family: the one that `config` is of.
    config: the diffusers folder; weights in it are not read.
    dtype: of all weights but the VAE's, which are float32.

    Raises UserError if the file does not hold all of the model's weights, in the shapes that the configuration says, or
    holds them in a way that the converters would misread.
    """
    path = str(Path(name).expanduser())
    keys = _keys(name)
    if any(key.startswith(EDM) for key in keys):
        raise UserError(f"{name}: a model with EDM's noise, such as CosXL; such a model cannot be used here")
    if any(key.endswith(SCALED) for key in keys):
        raise UserError(f"{name}: its weights are quantised, with scales; give the same model in float16 or bfloat16")
    options: dict[str, Any] = {"config": str(config), "local_files_only": True}
    try:
        with _quietly():
            # By itself, because a VAE that has been in half precision would have lost digits.
            kind: Any = family.parts()["vae"]
            vae = kind.from_single_file(path, subfolder="vae", torch_dtype=torch.float32, **options)
            pipeline = getattr(diffusers, family.pipeline).from_single_file(path, torch_dtype=dtype, vae=vae, **options)
    except Exception as error:  # the libraries raise whatever their parsers raise
        raise UserError(f"cannot load {name} as {family.title} ({first_line(error)})") from error
    parts = {part: getattr(pipeline, part) for part in family.parts()}
    parts["scheduler"] = _as_marked(keys, parts["scheduler"])
    for part, model in parts.items():
        if isinstance(model, nn.Module):
            missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
            if missing:
                raise UserError(f"{name} has no weights for {part}.{missing[0]}: it must be a whole model")
            model.eval()  # diffusers leaves T5 with dropout
    return parts


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside the block diffusers shows no progress bar, and warns of nothing: it does of casts that are its own."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _keys(name: str) -> set[str]:
    """The names of the tensors in a file. UserError if it cannot be read."""
    try:
        with safe_open(Path(name).expanduser(), framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: not a readable safetensors file ({first_line(error)})") from error


def _as_marked(keys: set[str], scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, of a velocity model if the file says so.

    keys: the names of the file's tensors. Tools mark such models of Stable Diffusion XL by an empty tensor `v_pred`,
    and by `ztsnr` those whose last timestep is all noise; the configuration of the usual model says otherwise.
    """
    if "v_pred" not in keys:
        return scheduler
    zero_snr = {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}  # else as the configuration says
    return type(scheduler).from_config(scheduler.config, prediction_type="v_prediction", **zero_snr)
