"""One cell of a comparison, from photos to scores, in its own folder that appears complete or not at all.

work/cells/<id>/result.json   settings, versions, times, the score of every picture
work/cells/<id>/*.png         the pictures
work/cells/<id>/step60/*.png  in a grid, those of each step that was scored before the end
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.baselines import BaselineAdapter, BaselineConfig, adapted_layers, baseline_maker, load_baseline
from eval.cell_pictures import caption_of, draw, save, score, untouched_pictures
from eval.cells import Cell
from eval.experiment import Experiment
from eval.methods import AnyConfig, adapts_text_encoder, count_parameters, describe, matched
from eval.prompts import Prompt, prompts_for
from eval.results import CELL_RESULT, as_columns, cell_folder, is_done, step_folder, work_folder
from eval.subjects import Subject
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import Adapter, inject
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config.adapter import AdapterConfig
from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.foundation.errors import DivergedError
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.foundation.run_folder import step_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import DTYPES, best_device, load_model
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.pictures import slug
from gsoft_diffusion.sampling.schedulers import with_model_sampler
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import Encoders, load_encoders
from gsoft_diffusion.scoring.pictures import embed, reference_scores
from gsoft_diffusion.training.checkpoints import checkpoints
from gsoft_diffusion.training.class_images import ensure_class_images
from gsoft_diffusion.training.preparation import with_model_defaults
from gsoft_diffusion.training.train import train

NOISE = "by subject, prompt and number"  # of pictures and training, see `number_of`
UNSHARED = ("adapter", "instance_data_dir", "output_dir", "class_data_dir", "pretrained_model_name_or_path")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def run_cell(experiment: Experiment, cell: Cell, out: Path) -> None:
    """Train, draw, score and write the cell's folder; nothing if it is done already.

    experiment: the settings that all cells share. cell: what to train, on what. out: the comparison's folder.

    A training that diverges is a result too, without scores. Raises UserError for what concerns all cells, and
    KeyboardInterrupt if a signal ended the training: nothing is written then.
    """
    if is_done(cell, out):
        return
    scratch = work_folder(out) / "scratch" / f"{cell.id}.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "cell").mkdir(parents=True)
    try:
        started = time.perf_counter()
        result = (_base if cell.method == "base" else _tuned)(experiment, cell, out, scratch)
        result["seconds"] = time.perf_counter() - started
        with whole_file(scratch / "cell" / CELL_RESULT) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        target = cell_folder(cell, out)
        target.parent.mkdir(exist_ok=True)
        try:
            (scratch / "cell").rename(target)
        except OSError:
            if not is_done(cell, out):  # else another machine was given it as well, and was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _base(experiment: Experiment, cell: Cell, out: Path, scratch: Path) -> dict[str, Any]:
    """The base model asked for any member of the class, and the real photos. Draws the class images for all cells."""
    subject, prompts, models, encoders = _prepare(experiment, cell)
    if experiment.with_prior_preservation:
        config = _training(experiment, cell, subject, models, out, scratch)
        ensure_class_images(config.concepts[0], config, models, identity_of(models))
    plain = [Prompt(prompt.kind, prompt.plain, prompt.plain) for prompt in prompts]
    started = time.perf_counter()
    pictures = draw(experiment, models, plain, cell)
    seconds = time.perf_counter() - started
    save(pictures, scratch / "cell")
    photos = embed(encoders, (open_image(path) for path in subject.photos()))
    captions = list(dict.fromkeys(caption_of(experiment, prompt) for prompt in prompts if prompt.kind == "context"))
    texts = encoders.clip.embed_texts(captions)
    by_caption = metrics.cosines(photos.clip, texts).mean(dim=0).tolist()
    return _facts(experiment, cell, subject, models, encoders) | {
        "photos": reference_scores(photos, texts) | {"clip_t_by_caption": dict(zip(captions, by_caption, strict=True))},
        **score(experiment, pictures, photos, encoders, None, prompts),
        "pictures_seconds": seconds,
    }


def _tuned(experiment: Experiment, cell: Cell, out: Path, scratch: Path) -> dict[str, Any]:
    subject, prompts, models, encoders = _prepare(experiment, cell)
    text_encoder = adapts_text_encoder(cell.method, experiment.text_encoder)
    all_layers = adapted_layers(models.denoiser, models.text_encoders, experiment.text_encoder)
    method = matched(cell.method, cell.budget or "medium", all_layers, text_encoder, experiment.output_scale)
    layers = adapted_layers(models.denoiser, models.text_encoders, text_encoder)
    config = _training(experiment, cell, subject, models, out, scratch)
    if isinstance(method, AdapterConfig):
        method = replace(method, parametrization=experiment.parametrization)
        config = replace(config, adapter=method)
    facts = _facts(experiment, cell, subject, models, encoders) | {
        "method": method.to_dict(),
        "size": describe(method),
        "parameters": count_parameters(method, layers),
        "full_parameters": count_parameters(BaselineConfig("full"), layers),
        "training": {name: value for name, value in config.to_dict().items() if name not in UNSHARED},
    }
    device = models.device
    move(models, "cpu")  # training loads the base model itself, and a GPU may not hold it twice
    started = time.perf_counter()
    try:
        trained = train(config, baseline_maker(method) if isinstance(method, BaselineConfig) else inject)
    except DivergedError as error:
        return facts | {"diverged": str(error)}
    if trained.interrupted:
        raise KeyboardInterrupt
    facts |= {
        "train_seconds": trained.seconds,
        "prepare_seconds": time.perf_counter() - started - trained.seconds,
        "adapter_bytes": trained.adapter.stat().st_size,
        "peak_memory_bytes": peak_memory(),
    }
    move(models, device)
    photos = embed(encoders, (open_image(path) for path in subject.photos()))
    untouched = embed(encoders, untouched_pictures(experiment, cell, out, prompts, models))
    curve = []
    for checkpoint in checkpoints(trained.adapter.parent):
        step = step_of(checkpoint)
        if step % (experiment.curve_every or 1) or step >= trained.steps:
            continue
        adapter = load_tuned(method, checkpoint / trained.adapter.name, models)
        adapter.merge()
        pictures = draw(experiment, models, prompts, cell)
        curve.append(_point(step, score(experiment, pictures, photos, encoders, untouched, prompts)))
        if experiment.grid:  # any step may be shown, or scored again by other encoders
            save(pictures, step_folder(scratch / "cell", step))
        adapter.remove()
    adapter = load_tuned(method, trained.adapter, models)
    facts["orthogonality_error"] = adapter.orthogonality_error()
    assert adapter.parameter_counts()["total"] == facts["parameters"]
    adapter.merge()
    started = time.perf_counter()
    pictures = draw(experiment, models, prompts, cell)
    facts["pictures_seconds"] = time.perf_counter() - started
    scored = score(experiment, pictures, photos, encoders, untouched, prompts)
    if experiment.recorded_every(cell.seed):
        facts["curve"] = [*curve, {"step": trained.steps} | scored["scores"]]
    save(pictures, scratch / "cell")
    return facts | scored


def _point(step: int, scored: Mapping[str, Any]) -> dict[str, Any]:
    """A point of a curve before its end; the pictures' scores as columns, in the order of the cell's own pictures."""
    return {"step": step} | scored["scores"] | {"pictures": as_columns(scored["pictures"])}


def _training(
    experiment: Experiment, cell: Cell, subject: Subject, models: BaseModel, out: Path, scratch: Path
) -> TrainingConfig:
    """The trainer's settings, complete but for the method's own. All subjects of a class share its class images."""
    digest = hashlib.sha256(subject.class_word.encode()).hexdigest()[:12]  # other words may have the same slug
    class_images = work_folder(out) / "class_images" / f"{slug(subject.class_word)}-{digest}"
    config = experiment.training(
        subject,
        cell.seed,
        cell.learning_rate or 1,
        adapts_text_encoder(cell.method, experiment.text_encoder),
        scratch / "run",
        class_images,
    )
    return with_model_defaults(config.resolved(), models)


def _prepare(experiment: Experiment, cell: Cell) -> tuple[Subject, list[Prompt], BaseModel, Encoders]:
    subject = next(subject for subject in experiment.chosen_subjects() if subject.name == cell.subject)
    prompts = prompts_for(subject, experiment.unique_token, experiment.prompts, experiment.max_prompts)
    device = best_device()
    models = load_model(
        experiment.pretrained_model_name_or_path, dtype=DTYPES[experiment.mixed_precision], device=device
    )
    return subject, prompts, models, load_encoders(experiment.clip, experiment.dino, device)


def move(models: BaseModel, device: torch.device | str) -> None:
    """Put all networks of a base model on a device."""
    for network in (models.denoiser, models.vae, *models.all_text_encoders()):
        network.to(device)


def load_tuned(method: AnyConfig, path: Path, models: BaseModel) -> Adapter | BaselineAdapter:
    """Put what training wrote into the models, and return it.

    method: the settings that it was trained with. path: the adapter file. models: the base. Raises UserError if the
    file does not fit.
    """
    if isinstance(method, BaselineConfig):
        return load_baseline(path, models.denoiser, models.text_encoders)
    return load_adapter(path, models.denoiser, models.text_encoders)[0]


def _facts(
    experiment: Experiment, cell: Cell, subject: Subject, models: BaseModel, encoders: Encoders
) -> dict[str, Any]:
    """The origin of a result: devices, versions, base model, encoders and photos."""
    return {
        "cell": asdict(cell),
        "base_model": asdict(identity_of(models)) | {"name": _public(models.name)},
        "photos_hash": photos_hash(subject),
        "encoders": encoders.to_dict(),
        "captions": "with the unique token" if experiment.token_in_caption else "without the unique token",
        "noise": NOISE,
        "sampler": with_model_sampler(models, experiment.sampler).to_dict(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def photos_hash(subject: Subject) -> str:
    """The same for the same photos."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in subject.photos())).hexdigest()[:16]


def _public(name: str) -> str:
    """A model's name without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def peak_memory() -> int:
    """Largest memory so far in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
