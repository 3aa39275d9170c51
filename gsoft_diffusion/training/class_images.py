"""Pictures of the subject's class for prior preservation, drawn by the base model once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import locked, whole_file
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.foundation.text_files import on_disk
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import is_blank, scan
from gsoft_diffusion.photos.image_files import opened
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.sampling.pictures import slug

ATTEMPTS = 3  # pictures drawn for each that is wanted, before broken ones become an error


def class_images_folder(concept: Concept, config: TrainingConfig, identity: BaseModelIdentity) -> Path:
    """The folder of a subject's class images: `--class_data_dir`, or one beside the output folder.

    The latter is named by all that decides the pictures: the class prompt of `concept`, the sampler and resolution in
    `config`, and the `identity` of the base model. So runs that would draw the same pictures share them. It need not
    exist.
    """
    if concept.class_data_dir:
        return on_disk(Path(concept.class_data_dir))
    key = [asdict(identity), concept.class_prompt, config.sampler.to_dict(), config.resolution]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    runs = Path(config.output_dir or ".").resolve().parent
    return runs / "class_images" / f"{slug(concept.class_prompt or '')}-{digest}"


def ensure_class_images(
    concept: Concept, config: TrainingConfig, model: BaseModel, identity: BaseModelIdentity
) -> Path:
    """The folder with at least `num_class_images` class images; draws those that are missing, with the base model.

    concept: the subject whose class is drawn.
    config: the run's settings; of its other subjects it is checked that the folder is not one of theirs.
    model: the base model. An adapter that is in it already must be disabled.
    identity: the base model's, which is written into the pictures.

    Pictures that come out in one colour are drawn again with another seed. Raises UserError if that keeps happening, if
    the folder is one with a subject's photos, cannot be read or written, or holds pictures that were drawn for another
    prompt or by another base model.
    """
    folder = class_images_folder(concept, config, identity)
    for photos in (Path(other.instance_data_dir).resolve() for other in config.concepts):
        if concept.class_data_dir and folder.resolve().is_relative_to(photos):
            what = "is" if folder.resolve() == photos else "is in"
            raise UserError(f"--class_data_dir {folder}: {what} the folder of a subject's photos; name another")
    try:
        _check_origins(folder, concept, identity)
        if _missing(folder, config):
            with _to_ourselves(folder):
                _check_origins(folder, concept, identity)  # again: another run may have drawn some meanwhile
                _draw_missing(folder, concept, config, model, identity)
    except OSError as error:
        raise UserError(f"--class_data_dir {folder}: cannot be read or written ({error.strerror})") from error
    return folder


def _pictures(folder: Path) -> list[Path]:
    return list(scan(folder).images) if folder.exists() else []


def _check_origins(folder: Path, concept: Concept, identity: BaseModelIdentity) -> None:
    """Raise UserError if a picture was drawn for another prompt or base model. The user's own are not checked."""
    for path in _pictures(folder):
        with opened(path) as image:
            told = image.info.get(METADATA_KEY, "{}")
        try:
            facts = json.loads(told)
            prompt, fingerprint = facts["prompt"], facts["base_model"]["fingerprint"]
        except (ValueError, RecursionError, KeyError, TypeError):
            continue
        if prompt != concept.class_prompt:
            why = f'was drawn for "{prompt}" and not for "{concept.class_prompt}"'
        elif fingerprint != identity.fingerprint:
            why = "was drawn by another base model"
        else:
            continue
        raise UserError(f"{path}: {why}; name another --class_data_dir, or remove what was drawn there")


def _missing(folder: Path, config: TrainingConfig) -> int:
    return max(0, config.num_class_images - len(_pictures(folder)))


@contextmanager
def _to_ourselves(folder: Path) -> Iterator[None]:
    """Hold a lock: no other run draws class images into the folder."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError as error:
            print(f"waiting for class images that another run ({error}) draws into {folder}")
            stack.enter_context(locked(folder, wait=True))
        for unfinished in folder.glob(".seed*.tmp"):  # left by a run that was killed
            unfinished.unlink()
        yield


def _draw_missing(
    folder: Path, concept: Concept, config: TrainingConfig, model: BaseModel, identity: BaseModelIdentity
) -> None:
    missing = _missing(folder, config)
    if not missing:
        return
    if others := sum(not _is_ours(path) for path in _pictures(folder)):
        print(f"note: {folder} has {others} pictures of yours; {missing} are drawn beside them (--num_class_images)")
    facts = {"model": "base", "base_model": asdict(identity), "sampler": config.sampler.to_dict()}
    first = 1 + max((int(path.stem[4:]) for path in _pictures(folder) if _is_ours(path)), default=-1)
    jobs = [(concept.class_prompt or "", seed) for seed in range(first, first + ATTEMPTS * missing)]
    samples = generate(model, jobs, config.sampler, resolution=config.resolution, batch_size=config.sample_batch_size)
    with tqdm(total=missing, desc=f"class images in {folder}", unit="picture") as progress:
        for sample in samples:
            if is_blank(sample.image):
                continue
            info = PngInfo()
            info.add_text(METADATA_KEY, json.dumps({"prompt": sample.prompt, "seed": sample.seed, **facts}))
            with whole_file(folder / f"seed{sample.seed:06d}.png") as file:
                sample.image.save(file, "PNG", pnginfo=info)
            missing -= 1
            progress.update()
            if missing == 0:
                return
    raise UserError(f"{missing} class images came out in one colour, {ATTEMPTS} tries each: try --mixed_precision no")


def _is_ours(path: Path) -> bool:
    return path.stem.startswith("seed") and path.stem[4:].isdigit()
