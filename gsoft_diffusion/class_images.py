"""Pictures of the subject's class for prior preservation, drawn by the base model once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from gsoft_diffusion.adapter_file import BaseModelIdentity
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.dataset import IMAGE_SUFFIXES
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.generation import generate
from gsoft_diffusion.models import Models
from gsoft_diffusion.pictures import slug

ATTEMPTS = 3  # pictures drawn for each that is wanted, before broken ones become an error


def class_images_folder(config: TrainingConfig, identity: BaseModelIdentity) -> Path:
    """`--class_data_dir`, or a folder beside the output folder named by all that decides the pictures."""
    if config.class_data_dir:
        return Path(config.class_data_dir)
    key = [asdict(identity), config.class_prompt, config.sampler.to_dict(), config.resolution]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    runs = Path(config.output_dir or ".").resolve().parent
    return runs / "class_images" / f"{slug(config.class_prompt or '')}-{digest}"


def ensure_class_images(config: TrainingConfig, models: Models, identity: BaseModelIdentity) -> Path:
    """The folder with at least `num_class_images` class images; draws those that are missing, with the base model.

    An adapter that is in the model already must be disabled. Pictures that come out in one colour are drawn again
    with another seed. Raises UserError if that keeps happening, or if the folder is the one with the subject's photos.
    """
    folder = class_images_folder(config, identity)
    if folder.resolve() == Path(config.instance_data_dir).resolve():
        raise UserError(f"--class_data_dir {folder}: is the folder of the subject's photos; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--class_data_dir {folder}: cannot be made ({error.strerror})") from error
    existing = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    missing = config.num_class_images - len(existing)
    if missing <= 0:
        return folder
    first = 1 + max((int(path.stem[4:]) for path in existing if _is_ours(path)), default=-1)
    jobs = [(config.class_prompt or "", seed) for seed in range(first, first + ATTEMPTS * missing)]
    samples = generate(models, jobs, config.sampler, resolution=config.resolution, batch_size=config.sample_batch_size)
    with tqdm(total=missing, desc=f"class images in {folder}", unit="picture") as progress:
        for sample in samples:
            if is_broken(sample.image):
                continue
            _write(sample.image, folder / f"seed{sample.seed:06d}.png")
            missing -= 1
            progress.update()
            if missing == 0:
                return folder
    raise UserError(f"{missing} class images came out in one colour, {ATTEMPTS} tries each: try --mixed_precision no")


def is_broken(image: Image.Image) -> bool:
    """Whether the picture is black or of any other single colour, as numbers that are not finite leave it."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[0, 0]).all())


def _is_ours(path: Path) -> bool:
    return path.stem.startswith("seed") and path.stem[4:].isdigit()


def _write(image: Image.Image, path: Path) -> None:
    """Whole or not at all, so that a stopped run leaves no half picture in the cache."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(unfinished, "PNG")
    unfinished.replace(path)
