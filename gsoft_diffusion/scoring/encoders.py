"""The encoders that scores are made with, each with everything that decides its numbers written down.

CLIP by open_clip's name (`ViT-B-32-quickgelu/openai`), DINO by transformers' (`facebook/dino-vits16`), and both from
folders.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPTokenizer

from gsoft_diffusion.foundation.bundled import places
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.hub_access import why_unreachable
from gsoft_diffusion.scoring.open_clip_layout import CONFIG, is_original_clip, read_open_clip

FIELD_CLIP, FIELD_DINO = "ViT-B-32-quickgelu/openai", "facebook/dino-vits16"
MINI_CLIP, MINI_DINO = "data/mini_clip", "data/mini_dino"
# DINO's own evaluation takes the middle 224 pixels of a picture whose shorter side is 256, and so does the field's
# (https://github.com/google/dreambooth/issues/3). The configurations in transformers' layout say something else.
FIRST_DINOS = ("dino-vits16", "dino-vits8", "dino-vitb16", "dino-vitb8")
DINO_MODELS = ("vit", "dinov2", "dinov3_vit")
BATCH = 64


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to what the encoder sees: bicubic to `resize` along the shorter side, the middle, normalised."""

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The pictures, of any sizes, as one tensor (N, 3, size, size), float32."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return torch.stack([(self._pixels(image) - mean) / std for image in images])

    def _pixels(self, image: Image.Image) -> Tensor:
        width, height = image.size
        shape = [self.resize * side // min(width, height) for side in (width, height)]
        if image.size != tuple(shape):
            image = image.resize((shape[0], shape[1]), Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in shape)
        image = image.convert("RGB").crop((left, top, left + self.size, top + self.size))
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(self.size, self.size, 3).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Identity:
    """Which encoder, exactly: two rows of a table compare only if these agree.

    weights: first 16 digits of the SHA-256 of all weights in float32.
    """

    kind: str
    name: str
    library: str
    weights: str
    preprocessing: Preprocessing

    @property
    def miniature(self) -> bool:
        """Whether the encoder is a miniature, whose scores do not compare with the field's encoders."""
        return self.preprocessing.size < 128

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, and whether the encoder is a miniature."""
        return asdict(self) | {"miniature": self.miniature}

    def __str__(self) -> str:
        small = "miniature " if self.miniature else ""
        return f"{small}{self.kind} {self.name} ({self.library}, {self.preprocessing.size} px, weights {self.weights})"


class ImageEncoder:
    """Pictures to unit embeddings."""

    def __init__(self, identity: Identity, embed: Callable[[Tensor], Tensor], device: torch.device | str) -> None:
        """identity: which encoder this is, and how it wants its pictures.
        embed: the network, from pictures (N, 3, size, size) on the device to embeddings (N, D) of any norm.
        device: where the network is.
        """
        self.identity = identity
        self._embed = embed
        self.device = torch.device(device)

    @torch.no_grad()
    def embed_images(self, images: Iterable[Image.Image]) -> Tensor:
        """(N, D), float32, on the CPU; each row of length 1."""
        images = list(images)
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        pixels = (self.identity.preprocessing(batch).to(self.device) for batch in batches)
        return torch.cat([normalize(self._embed(batch).float(), dim=-1).cpu() for batch in pixels])


class ClipEncoder(ImageEncoder):
    """Pictures and texts to unit embeddings in one space."""

    def __init__(
        self,
        identity: Identity,
        embed: Callable[[Tensor], Tensor],
        embed_texts: Callable[[list[str]], Tensor],
        device: torch.device | str,
    ) -> None:
        """identity, embed, device: as in `ImageEncoder`.
        embed_texts: the network, from texts to embeddings (N, D) of any norm.
        """
        super().__init__(identity, embed, device)
        self._embed_texts = embed_texts

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D), float32, on the CPU; each row of length 1."""
        return normalize(self._embed_texts(list(texts)).float(), dim=-1).cpu()


@dataclass(frozen=True)
class Encoders:
    """The two that every score needs. names: what loads the same two again, as `clip` and `dino`."""

    clip: ClipEncoder
    dino: ImageEncoder
    names: dict[str, Any]

    @property
    def miniature(self) -> bool:
        """Whether one of the two is a miniature."""
        return self.clip.identity.miniature or self.dino.identity.miniature

    def to_dict(self) -> dict[str, Any]:
        """Both identities as JSON values, `clip` and `dino`."""
        return {"clip": self.clip.identity.to_dict(), "dino": self.dino.identity.to_dict()}

    def __str__(self) -> str:
        return f"{self.clip.identity} and {self.dino.identity}"


def load_encoders(clip: str = "auto", dino: str = "auto", device: torch.device | str = "cpu") -> Encoders:
    """Load both encoders, in float32 and for inference.

    clip: name or folder as in `load_clip`. dino: name or folder as in `load_dino`. Each may be `auto`: the field's
    encoder, or the bundled miniature where that does not load.
    device: where both will be.

    Raises UserError if one that was named cannot be had.
    """
    clip, clip_encoder = _load(load_clip, clip, FIELD_CLIP, MINI_CLIP, device)
    dino, dino_encoder = _load(load_dino, dino, FIELD_DINO, MINI_DINO, device)
    return Encoders(clip_encoder, dino_encoder, {"clip": clip, "dino": dino})


def _load(
    load: Callable[[str, torch.device | str], Any], name: str, field: str, mini: str, device: torch.device | str
) -> tuple[str, Any]:
    """An encoder, with the name that loads it again."""
    if name != "auto":
        return name, load(name, device)
    try:
        return field, load(field, device)
    except UserError as error:
        print(
            f"note: {error}; scoring with the bundled {mini} instead, whose numbers compare only with each other",
            file=sys.stderr,
        )
        return mini, load(mini, device)


def load_clip(name: str, device: torch.device | str = "cpu") -> ClipEncoder:
    """Load a CLIP, in float32 and for inference.

    name: a folder in transformers' or open_clip's layout, or open_clip's `<model>/<pretrained tag>`.
    device: where it will be.

    Raises UserError if it cannot be had, saying what is missing.
    """
    folder = _local(name)
    if folder and (folder / "config.json").is_file():
        return _transformers_clip(folder, device)
    if folder and is_original_clip(folder):
        clip, tokenizer, preprocess = read_open_clip(folder)
        vision: Any = clip.config.vision_config
        preprocessing = _preprocessing(vision.image_size, preprocess.get("mean"), preprocess.get("std"))
        return _clip_encoder(folder.name, clip, tokenizer, preprocessing, device)
    if folder and not (folder / CONFIG).is_file():
        raise UserError(f"CLIP folder {name}: holds neither config.json nor {CONFIG}")
    return _open_clip(name, folder, device)


def _transformers_clip(folder: Path, device: torch.device | str) -> ClipEncoder:
    try:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise whatever their parsers raise
        raise UserError(f"CLIP folder {folder}: cannot be loaded ({first_line(error)})") from error
    return _clip_encoder(folder.name, clip, tokenizer, _read_preprocessing(folder), device)


def _clip_encoder(
    name: str, clip: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: Preprocessing, device: torch.device | str
) -> ClipEncoder:
    clip = clip.eval().to(device)
    text: Any = clip.config.text_config

    def embed_texts(texts: list[str]) -> Tensor:
        options: dict[str, Any] = {
            "padding": "max_length",
            "truncation": True,
            "max_length": text.max_position_embeddings,
        }
        ids = tokenizer(texts, return_tensors="pt", **options).input_ids.to(device)
        return _pooled(clip.get_text_features(input_ids=ids))

    identity = Identity("CLIP", name, "transformers", weights_hash(clip), preprocessing)
    return ClipEncoder(
        identity, lambda pixels: _pooled(clip.get_image_features(pixel_values=pixels)), embed_texts, device
    )


def _open_clip(name: str, folder: Path | None, device: torch.device | str) -> ClipEncoder:
    architecture, _, tag = name.partition("/")
    if not folder and not tag:
        raise UserError(f"CLIP {name}: name a folder, or model and weights as open_clip does, such as {FIELD_CLIP}")
    model_name = f"local-dir:{folder}" if folder else architecture
    silent = None if folder else why_unreachable()
    try:
        import open_clip  # takes seconds, which the bundled encoders do without

        with warnings.catch_warnings(), _quiet():
            # The weights would run, and score, with another activation than they were trained with.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            clip = open_clip.create_model(model_name, pretrained=None if folder else tag, device=device)
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # a name it does not know, no network, damaged files
        raise UserError(f"CLIP {name}: open_clip cannot load it ({_because(error, silent)})") from error
    clip = clip.eval()
    size = clip.visual.image_size
    preprocessing = _preprocessing(
        size[0] if isinstance(size, tuple) else size, clip.visual.image_mean, clip.visual.image_std
    )
    identity = Identity("CLIP", folder.name if folder else name, "open_clip", weights_hash(clip), preprocessing)
    return ClipEncoder(identity, clip.encode_image, lambda texts: clip.encode_text(tokenizer(texts).to(device)), device)


def load_dino(name: str, device: torch.device | str = "cpu") -> ImageEncoder:
    """Load a vision transformer whose embedding is the class token after the last layer norm, in float32.

    name: a folder in transformers' layout, or a name on the hub; safetensors only. Pictures are resized and cropped as
    its configuration says, but for `FIRST_DINOS`, by the name of hub or folder.
    device: where it will be.

    Raises UserError if it cannot be had.
    """
    folder = _local(name)
    silent = None if folder else why_unreachable()
    try:
        family = AutoConfig.from_pretrained(folder or name).model_type
        if family not in DINO_MODELS:
            raise UserError(f"DINO {name}: is a {family}; known are {', '.join(DINO_MODELS)}")
        options: dict[str, Any] = {"add_pooling_layer": False} if family == "vit" else {}
        model = AutoModel.from_pretrained(folder or name, dtype=torch.float32, use_safetensors=True, **options)
        preprocessing = _read_preprocessing(folder) if folder else _fetch_preprocessing(name)
        if Path(name).name in FIRST_DINOS:
            preprocessing = replace(preprocessing, resize=256, size=224)
    except UserError:
        raise
    except Exception as error:  # no such name, no network, damaged files
        raise UserError(f"DINO {name}: transformers cannot load it ({_because(error, silent)})") from error
    model = model.eval().to(device)
    identity = Identity("DINO", folder.name if folder else name, "transformers", weights_hash(model), preprocessing)
    return ImageEncoder(identity, lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0], device)


def _because(error: Exception, silent: str | None) -> str:
    """What to say of an error: that the hub is `silent`, if it comes from that."""
    cause: BaseException | None = error
    while silent and cause:
        if isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError):
            return f"{silent}, and it is not in the cache"
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch logging off: errors are raised as well, so they appear once."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def weights_hash(model: nn.Module) -> str:
    """A hash of the weights that does not depend on their precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _local(name: str) -> Path | None:
    """The folder that is meant, here or in this repository; None if there is none and it may be a name."""
    for folder in places(name):
        if folder.is_dir():
            return folder
    if name.startswith((".", "/", "~", "data/")):
        raise UserError(f"there is no encoder folder {name}")
    return None


def _preprocessing(size: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Preprocessing:
    if mean is None or std is None:
        raise UserError("the encoder's folder does not say how colours are normalised (mean and std)")
    return Preprocessing(int(size), int(size), tuple(map(float, mean)), tuple(map(float, std)))


def _read_preprocessing(folder: Path) -> Preprocessing:
    """From transformers' `preprocessor_config.json`."""
    try:
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        resize = _side(values["size"])
        cropped = values.get("do_center_crop") and "crop_size" in values
        found = _preprocessing(resize, values["image_mean"], values["image_std"])
        size = _side(values["crop_size"]) if cropped else resize
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: preprocessor_config.json cannot be read ({first_line(error)})") from error
    return Preprocessing(size, resize, found.mean, found.std)


def _fetch_preprocessing(name: str) -> Preprocessing:
    return _read_preprocessing(Path(hf_hub_download(name, "preprocessor_config.json")).parent)


def _side(value: Any) -> int:
    """One side in pixels, however transformers' configurations say it."""
    if isinstance(value, dict):
        return int(value.get("shortest_edge") or value["height"])
    return int(value)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
