"""The training loop: what `train_dreambooth_gsoft.py` does."""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, product, takewhile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
)
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.distributed import DistError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gsoft_diffusion import checkpoints
from gsoft_diffusion.adapter_file import read_adapter, save_adapter
from gsoft_diffusion.baselines import BaselineAdapter, BaselineConfig, inject_baseline
from gsoft_diffusion.class_images import ensure_class_images
from gsoft_diffusion.config import FULL_SIZE, MINIATURE, MINIATURE_BELOW, Concept, TrainingConfig, has_words
from gsoft_diffusion.crops import bucket_sizes
from gsoft_diffusion.dataset import DROPOUT, BatchPositions, DreamBoothDataset, Showing, derived_seed
from gsoft_diffusion.errors import UserError, first_line, printable
from gsoft_diffusion.files import whole_file
from gsoft_diffusion.generation import generate, sheet_rows
from gsoft_diffusion.hub import HubRepository
from gsoft_diffusion.injection import Adapter, inject
from gsoft_diffusion.launcher import check_launched, process_count
from gsoft_diffusion.losses import add_offset, prediction_target, training_loss
from gsoft_diffusion.memory import keep_freed_memory, running_out_explained
from gsoft_diffusion.model_card import CARD, latest_sheet, may_write, model_card, sheet_of
from gsoft_diffusion.model_names import public_name
from gsoft_diffusion.models import DTYPES, Models, load_models
from gsoft_diffusion.options import script
from gsoft_diffusion.photos import KOHYA, Folder, Photo, copies, read_folder
from gsoft_diffusion.pictures import contact_sheets
from gsoft_diffusion.preflight import check_step
from gsoft_diffusion.schedulers import with_model_sampler
from gsoft_diffusion.signals import Stderr, StopRequest, leave_signals_to_the_run, quiet_writers
from gsoft_diffusion.text_files import composed

logger = logging.getLogger(__name__)

SMOOTHING = 50  # steps over which the progress bar averages the loss
HYPERPARAMETERS = ("initial_lr", "betas", "eps", "weight_decay", "warmup_steps")  # the optimizer's that are settings
# Not in adapters, which are shared: what says more of the user's disk than of the result.
PRIVATE = (
    "instance_data_dir",
    "class_data_dir",
    "concepts_list",
    "output_dir",
    "resume_from_checkpoint",
    "accept_changes",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
)


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run: the adapter's file, the steps done, whether a signal ended it early, seconds of training."""

    adapter: Path
    steps: int
    interrupted: bool
    seconds: float


class Denoiser(nn.Module):
    """All that runs in a training step: the denoiser, the text encoders if they train, and the adapter in all of them.

    Prompts are known beforehand: what the adapter does not change is computed of them once, the rest in each batch.
    """

    def __init__(self, models: Models, adapter: Adapter | BaselineAdapter, prompts: Sequence[str]) -> None:
        super().__init__()
        self.models = models  # no module: it says how those below work together
        self.network = models.denoiser
        self.text_encoders = nn.ModuleList(models.text_encoders if adapter.config.text_encoder else [])
        self.adapter = adapter
        with torch.no_grad(), models.brought(*models.readers()):
            prompt_inputs = models.prepare(prompts) if self.text_encoders else models.encode_prompts(prompts)
        self.prompt_inputs = prompt_inputs  # each (prompts, …), on the device

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, prompt_indices: Tensor, views: Tensor) -> Tensor:
        """The prediction (B, C, h, w) in float32, for the prompt and the view of each sample."""
        different, numbers = prompt_indices.unique(return_inverse=True)
        prompts = {name: tensor[different] for name, tensor in self.prompt_inputs.items()}
        if self.text_encoders:
            prompts = self.models.encode(prompts)
        conditioning = {name: tensor[numbers] for name, tensor in prompts.items()}
        return self.models.predict(noisy_latents, timesteps, conditioning, views)


@running_out_explained("use a smaller --train_batch_size or --resolution, or --gradient_checkpointing")
def train(config: TrainingConfig, baseline: BaselineConfig | None = None) -> TrainingResult:
    """Train an adapter on the photos and write it to the output folder, with its settings and validation pictures.

    baseline: another method to train in everything else the same way, instead of `config.adapter`.

    SIGINT and SIGTERM end the run after the current step, with adapter and checkpoint saved. Raises UserError for
    anything that the user can put right, a loss that is not finite included.
    """
    config, token = replace(config.resolved(), hub_token=None), config.hub_token  # so that it cannot get anywhere
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with checkpoints.output_folder(config) if accelerator.is_main_process else nullcontext(), quiet_writers():
        checkpoint = checkpoints.checkpoint_to_resume(config, accelerator.print)
        instance = instance_photos(config, accelerator.print)
        repository = None
        if config.push_to_hub and accelerator.is_main_process:
            name = config.hub_model_id or Path(config.output_dir or "").resolve().name
            repository = HubRepository(name, token)
        models = load_models(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            base_config=config.base_config,
            dtype=DTYPES[config.mixed_precision],
            device=accelerator.device,
            cpu_offload=config.cpu_offload,
            quantize_base=config.quantize_base,
        )
        config = with_model_defaults(config, models)
        for note in config.notes():
            accelerator.print(f"note: {note}")
        state = checkpoints.read_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            before, now = TrainingConfig.from_dict(state["settings"]), checkpoints.recorded(config)
            checkpoints.check_unchanged(config, checkpoint, checkpoints.recorded(before).to_dict(), now.to_dict())
            checkpoints.check_goes_further(config, state["step"])
        try:
            run = Run(config, accelerator, models, instance, baseline)
            if checkpoint and state:
                run.resume(checkpoint, state)
            result = run.execute()
            if repository and not result.interrupted:
                accelerator.print(f"published: {repository.publish(run.folder, checkpoints.ADAPTER)}")
            return result
        except RuntimeError as error:
            if accelerator.num_processes > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
                raise UserError(
                    f"another of this run's {accelerator.num_processes} processes has ended, see its message; "
                    f"checkpoints are intact, go on by --resume_from_checkpoint latest ({first_line(error)})"
                ) from error
            raise
        finally:
            with suppress(Exception):  # of a tracker's last lines
                accelerator.end_training()


def instance_photos(config: TrainingConfig, say: Callable[[str], None]) -> list[Photo]:
    """The photos of all subjects; says what was found. Raises UserError for what is wrong with them."""
    photos: list[Photo] = []
    owners: dict[Path, Concept] = {}
    for concept in config.concepts:
        folder = read_folder(concept.instance_data_dir, "--instance_data_dir", concept.instance_prompt or "")
        say(f"subject{'' if len(config.concepts) == 1 else ' ' + concept.name}: {folder}")
        if len(folder.photos) == 1:
            say(f"note: {concept.instance_data_dir} holds a single photo, which is easily copied; 3 to 5 are better")
        note_other_names(concept, folder, say)
        for photo in folder.photos:
            if (owner := owners.setdefault(photo.path.resolve(), concept)) is not concept:
                given = f"{owner.instance_data_dir} and {concept.instance_data_dir}"
                raise UserError(
                    f"{photo.path}: is in the folders of two subjects, {given}; give each photos of its own"
                )
        check_names(concept, folder.photos, config.concepts)
        say_unnamed(concept, folder.photos, say)
        photos += folder.photos
    note_copies(photos, say)
    masks = sum(photo.mask is not None for photo in photos)
    if masks and config.unmasked_weight == 1:
        say("note: masks are not used; to weigh the subject more than its surroundings, give --unmasked_weight 0.1")
    if config.unmasked_weight != 1 and not masks:
        raise UserError(
            f"--unmasked_weight {config.unmasked_weight:g}: no photo has a mask; give them transparent backgrounds, "
            "or mask files like dog1-masklabel.png for dog1.jpg, white where the subject is"
        )
    return photos


def note_other_names(concept: Concept, folder: Folder, say: Callable[[str], None]) -> None:
    """Say so if subfolders call the subject something else than its prompt does, which is what it is trained by."""
    prompt = composed(concept.instance_prompt or "").casefold()
    words = dict.fromkeys(composed(found[2]).strip() for name in folder.subfolders if (found := KOHYA.fullmatch(name)))
    if others := [word for word in words if word.casefold() not in prompt]:
        say(
            f'note: the subfolders of {concept.instance_data_dir} say "{printable(", ".join(others))}"; '
            f'photos there without a caption are trained as "{printable(concept.instance_prompt or "")}" all the same'
        )


def note_copies(photos: Sequence[Photo], say: Callable[[str], None]) -> None:
    """Say which photos are the same picture."""
    for first, copy in copies(photos):
        say(f"note: {copy.path} is the same picture as {first.path}, which counts twice by that")


def check_class_images(prior: Sequence[Photo], instance: Sequence[Photo]) -> None:
    """Raise UserError if a class image is a photo of a subject: it would teach that any member of the class is it."""
    subjects = set(map(id, instance))
    for first, copy in copies((*instance, *prior)):
        if id(first) in subjects and id(copy) not in subjects:
            raise UserError(
                f"{copy.path}: is the same picture as the photo {first.path}; take it out of the class images"
            )


def check_names(concept: Concept, photos: Sequence[Photo], concepts: Sequence[Concept]) -> None:
    """Raise UserError if a caption names another subject than the one whose folder the photo is in."""
    for other in concepts:
        if not (concept.unique_token and other.unique_token and other is not concept):
            continue
        for photo in photos:
            if has_words(photo.prompt, other.unique_token) and not has_words(photo.prompt, concept.unique_token):
                raise UserError(
                    f'{photo.path}: its caption names "{other.unique_token}", the subject in '
                    f'{other.instance_data_dir}, and not "{concept.unique_token}"; correct it, or move the photo'
                )


def say_unnamed(concept: Concept, photos: Sequence[Photo], say: Callable[[str], None]) -> None:
    """Say which prompts do not name the subject: what their photos show is learned as something else."""
    word, prompt = concept.class_word, concept.instance_prompt or ""
    if word and not has_words(prompt, word) and any(photo.prompt == prompt for photo in photos):
        say(f'note: the class word "{word}" is not in the instance prompt; {{1}} in prompts stands for it all the same')
    for what, words in (("unique token", concept.unique_token), ("class word", concept.class_word)):
        captions = [photo for photo in photos if photo.prompt != concept.instance_prompt]
        if words and (without := [photo.path.name for photo in captions if not has_words(photo.prompt, words)]):
            named = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            say(f'note: the {what} "{words}" is not in the captions of {named}; the subject is not named there')


def with_model_defaults(config: TrainingConfig, models: Models) -> TrainingConfig:
    """The settings with what only the model decides filled in: resolution, sampler, steps and learning rates."""
    resolution = config.resolution or models.resolution
    models.check_sides(resolution=resolution)
    usual = MINIATURE if models.resolution < MINIATURE_BELOW else FULL_SIZE
    left_open: dict[str, Any] = {name: value for name, value in usual.items() if getattr(config, name) is None}
    if config.adapter.text_encoder and not models.text_encoders:
        logger.warning("the text encoder of %s cannot be trained: it stays as it is", models.title)
        config = replace(config, adapter=replace(config.adapter, text_encoder=False))
    if not config.adapter.text_encoder:
        left_open.pop("text_encoder_lr", None)
    elif config.optimizer == "prodigy":
        left_open["text_encoder_lr"] = config.learning_rate
    return replace(config, resolution=resolution, sampler=with_model_sampler(models, config.sampler), **left_open)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's driver of devices, precision, accumulation and trackers."""
    check_launched(config.to_dict())
    process_count()  # refuses one that accelerate would wait for peers with
    folder = Path(config.output_dir or ".")
    trackers = wanted_trackers(config)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
            kwargs_handlers=[
                # The base is in half precision as it is and the adapter in float32; sampling runs without it too.
                AutocastKwargs(enabled=False),
                # While one process draws class images or validates, the others wait.
                InitProcessGroupKwargs(timeout=timedelta(days=1)),
                # The last layers of some families' text encoders have no say, so their parameters get no gradient.
                DistributedDataParallelKwargs(find_unused_parameters=True),
            ],
        )
    except (ValueError, RuntimeError) as error:  # a precision the device does not have, a device that there is not
        raise UserError(
            f"--mixed_precision {config.mixed_precision}, or a variable ACCELERATE_…: {first_line(error)}"
        ) from error
    found = {str(tracker) for tracker in accelerator.log_with}
    for name in trackers:
        if name not in ("all", *found):
            accelerator.print(f"note: {name} is not installed (pip install {name}), so nothing is reported to it")
    if "all" in trackers and not found:
        accelerator.print("note: no tracker is installed, so nothing is reported; tensorboard is one")
    if config.cpu_offload and accelerator.device.type == "cpu":
        accelerator.print("note: --cpu_offload has no effect: all of the model is in main memory anyway")
    return accelerator


def wanted_trackers(config: TrainingConfig) -> list[str]:
    """The names in `report_to`, none for "none". UserError for one that accelerate does not know."""
    names = [name.strip().lower() for name in config.report_to.split(",") if name.strip()]
    if "none" in names and len(names) > 1:
        raise UserError(f"--report_to {config.report_to}: none, and others; give one or the other")
    known = LoggerType.list()
    for name in names or [config.report_to]:
        if name not in (*known, "none"):
            raise UserError(f"--report_to {config.report_to}: {name} is no tracker; known: {', '.join(known)}, none")
    return [] if names == ["none"] else list(dict.fromkeys(names))


def make_optimizer(config: TrainingConfig, adapter: Adapter | BaselineAdapter) -> torch.optim.Optimizer:
    """The optimizer over the adapter's parameters.

    Weight decay leaves output scales, which are 1 at rest, alone. Text encoders have a learning rate of their own.

    Raises UserError with the name of the package if its library is missing.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in adapter.named_parameters():
        in_text_encoder, is_scale = name.startswith("text_encoder"), name.endswith("output_scale")
        rate = config.text_encoder_lr if in_text_encoder else config.learning_rate
        decay = 0.0 if is_scale else config.adam_weight_decay
        group = groups.setdefault((in_text_encoder, is_scale), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    module, name = {
        "adamw": ("torch.optim", "AdamW"),
        "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
        "prodigy": ("prodigyopt", "Prodigy"),
        "schedulefree": ("schedulefree", "AdamWScheduleFree"),
    }[config.optimizer]
    try:
        optimizer_class = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"--optimizer {config.optimizer} needs a library: pip install {package}") from error
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "schedulefree":
        options["warmup_steps"] = config.lr_warmup_steps
    if config.optimizer == "adamw":
        # Hundreds of small tensors in one call; on a GPU PyTorch knows best.
        options["fused"] = next(adapter.parameters()).is_cpu
    assert config.learning_rate is not None, "with_model_defaults sets it"
    return optimizer_class(list(groups.values()), lr=config.learning_rate, **options)


class Run:
    """One training run: everything is made ready in the constructor, `execute` trains."""

    adapter: Adapter | BaselineAdapter

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        models: Models,
        instance: Sequence[Photo],
        baseline: BaselineConfig | None = None,
    ) -> None:
        self.config, self.accelerator, self.models = config, accelerator, models
        self.folder = Path(config.output_dir or ".")
        assert config.max_train_steps is not None, "with_model_defaults sets it"
        self.max_train_steps = config.max_train_steps
        self.step = 0
        self.skipped = 0  # optimizer steps left out by the scaler of fp16, since a gradient had overflowed
        self.identity = models.identity()
        # Settled now: at the end of a long run the folders that they are found by may be out of reach.
        self.recorded = checkpoints.recorded(config)
        self.public_base = replace(self.identity, name=public_name(self.identity.name))
        self.public_config = config.base_config and public_name(config.base_config)
        self.noise_scheduler = models.noise_scheduler()
        if config.snr_gamma is not None and self.noise_scheduler.config.prediction_type == "flow_prediction":
            raise UserError(f"--snr_gamma: {models.name} learns by flow matching, which weighs by drawing timesteps")
        # First what may turn out not to fit, then what takes long.
        if baseline:
            self.adapter = inject_baseline(baseline, models.denoiser, models.text_encoders)
        else:
            self.adapter = inject(config.adapter, models.denoiser, models.text_encoders)
        check_step(config, models, self.adapter, accelerator.device)
        self._set_up_attention()
        optimizer = make_optimizer(config, self.adapter)
        self.dataset = self._make_dataset(instance, self._class_photos(instance))
        self.circumstances = self._circumstances()
        denoiser = Denoiser(models, self.adapter, self.dataset.prompts).train()
        self.denoiser, self.optimizer = accelerator.prepare(denoiser, optimizer)
        self.optimizer.train()  # schedule-free optimizers start in evaluation mode; to others it means nothing
        # Not prepared: it counts optimizer steps, however many processes take them together.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        counts = self.adapter.parameter_counts()
        accelerator.print(
            f"training {counts.pop('total'):,} parameters: "
            + ", ".join(f"{count:,} in the {part.replace('_', ' ')}" for part, count in counts.items())
        )

    def execute(self) -> TrainingResult:
        """Train from the current step to the last, or until a signal asks to stop; save; draw a last sheet."""
        config, accelerator = self.config, self.accelerator
        result = self.folder / checkpoints.ADAPTER
        if accelerator.is_main_process:
            written = replace(config, resume_from_checkpoint=None, accept_changes=False)
            checkpoints.write_settings(written, accelerator.num_processes)
        self._track(lambda: accelerator.init_trackers("training", config=_flat(config.to_dict())))
        first = self.step
        if config.cache_latents:
            self.dataset.cache(self.models.encode_images, chain.from_iterable(self._positions()))
        with StopRequest(launched=accelerator.num_processes > 1) as stop:
            started = time.perf_counter()
            self._train(stop)
            seconds = time.perf_counter() - started
            interrupted = self.step < self.max_train_steps
            if accelerator.is_main_process:
                self._save_result(result)
            if not interrupted and (self.step > first or not sheet_of(self.folder, self.step).exists()):
                self._validate(stop)
        if interrupted:
            settings = shlex.quote(str(self.folder / checkpoints.SETTINGS))
            count = accelerator.num_processes
            starter = "python" if count == 1 else f"by the same launcher, with {count} processes,"
            accelerator.print(
                f"stopped at step {self.step}; to go on: "
                f"{starter} {script('train_dreambooth_gsoft.py')} --config {settings} --resume_from_checkpoint latest"
            )
        if accelerator.is_main_process and isinstance(self.adapter, Adapter):
            self._write_card(result)
        for line in self._nothing_learned():
            accelerator.print(line)
        if self.skipped:
            accelerator.print(f"{self.skipped} of {self.step} steps were skipped: their gradients overflowed in fp16")
        prompt = shlex.quote((config.validation_prompts or ("",))[-1])
        error = self.adapter.orthogonality_error()
        accelerator.print(
            f"adapter: {result}{f' (largest deviation from orthogonality {error:.1e})' if error is not None else ''}\n"
            f"try it: python {script('inference.py')} --adapter {shlex.quote(str(result))} --prompt {prompt}"
        )
        return TrainingResult(result, self.step, interrupted, seconds)

    def _nothing_learned(self) -> Iterator[str]:
        """A line for each part of the model whose rotations are still identities, up to rounding."""
        if not isinstance(self.adapter, Adapter):
            return
        largest: dict[str, float] = {}
        for name, parameter in self.adapter.named_parameters():
            if not name.endswith("output_scale"):
                part = name.partition(".")[0]
                largest[part] = max(largest.get(part, 0.0), parameter.abs().max().item())
        for part, angle in largest.items():
            if angle < torch.finfo(torch.float32).eps:
                rate = "text_encoder_lr" if part.startswith("text_encoder") else "learning_rate"
                why = f"raise --{rate} or --max_train_steps"
                if self.skipped == self.step:
                    why = "all steps were skipped; use --mixed_precision bf16 or no"
                yield f"note: nothing was learned in the {part.replace('_', ' ')}: its rotations are identities; {why}"

    def _train(self, stop: StopRequest) -> None:
        config, accelerator = self.config, self.accelerator
        recent: deque[float] = deque(maxlen=SMOOTHING)
        losses: list[Tensor] = []  # of the batches since the last optimizer step
        with self._progress_bar() as progress:
            for batch in self._batches():
                with accelerator.accumulate(self.denoiser):
                    losses.append(self._backward(batch))
                    if not accelerator.sync_gradients:
                        continue
                    loss, stopping = self._agree(losses, stop.requested)
                    losses.clear()
                    self._update(loss)
                self.step += 1
                recent.append(loss)
                self._report(recent, progress)
                if stopping or _due(self.step, config.checkpointing_steps):
                    self._write_checkpoint()
                if stopping:
                    return
                if _due(self.step, config.validation_steps) and self.step < self.max_train_steps:
                    self._validate(stop)

    def resume(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state: parameters, optimizer, schedule, scaler and step. `execute` is next."""
        checkpoints.check_unchanged(self.config, checkpoint, state["circumstances"], self.circumstances)
        fresh = [dict(group) for group in self.optimizer.param_groups]
        try:
            if state["settings"]["optimizer"] != self.config.optimizer:
                raise ValueError(f"--optimizer was {state['settings']['optimizer']}")
            self.adapter.load_state_dict(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{checkpoint} does not fit the settings: {first_line(error)}") from error
        if self.config.accept_changes:
            self._set_hyperparameters(fresh)
        self.step, self.skipped = state["step"], state["skipped"]
        self.accelerator.print(f"going on from step {self.step}")

    def _set_hyperparameters(self, fresh: Sequence[Mapping[str, Any]]) -> None:
        """Let the settings decide again, where the optimizer's loaded state had brought back the checkpoint's."""
        self.lr_scheduler.base_lrs = [new["initial_lr"] for new in fresh]
        for group, new, factor in zip(self.optimizer.param_groups, fresh, self.lr_scheduler.lr_lambdas, strict=True):
            group |= {name: new[name] for name in HYPERPARAMETERS if name in new}
            group["lr"] = new["initial_lr"] * factor(self.lr_scheduler.last_epoch)

    def _circumstances(self) -> dict[str, Any]:
        """What decides how the run learns besides its settings, as it was when the run began."""
        sums: dict[str, Any] = {}
        for photo in chain(*self.dataset.streams):
            folder = Path(os.path.abspath(photo.path)).parent.name  # noqa: PTH100 - keeps links
            photo_sum = sums.setdefault(f"{folder}/{photo.path.name}", hashlib.sha256())
            photo_sum.update(photo.path.read_bytes())
            if photo.mask and self.config.unmasked_weight != 1:
                photo_sum.update(photo.mask.read_bytes())
            photo_sum.update(photo.prompt.encode())
        photo_sums = {name: photo_sum.hexdigest() for name, photo_sum in sums.items()}
        base = {"weights of the base model": self.identity.fingerprint}
        return {"number of processes": self.accelerator.num_processes, **base, **photo_sums}

    # Making ready

    def _class_photos(self, instance: Sequence[Photo]) -> list[Photo]:
        """The class images of all subjects, whose photos are given; subjects of one class share them."""
        config = self.config
        if not config.with_prior_preservation:
            return []
        wanted = self.max_train_steps * config.gradient_accumulation_steps * config.train_batch_size
        wanted *= self.accelerator.num_processes
        folders: dict[Path, str] = {}
        with self.accelerator.main_process_first(), self.adapter.disabled():
            for concept in config.concepts:
                folders[ensure_class_images(concept, config, self.models, self.identity)] = concept.class_prompt or ""
        photos: list[Photo] = []
        for path, prompt in folders.items():
            folder = read_folder(path, "--class_data_dir", prompt, limit=config.num_class_images, masks=False)
            self.accelerator.print(f"class{'' if len(folders) == 1 else ', ' + prompt}: {folder}")
            photos += folder.photos
        if wanted < len(photos):
            self.accelerator.print(f"note: this run is too short for {len(photos) - wanted} of its class images")
        check_class_images(photos, instance)
        return photos

    def _make_dataset(self, instance: Sequence[Photo], prior: Sequence[Photo]) -> DreamBoothDataset:
        config, models = self.config, self.models
        resolution = config.resolution or models.resolution
        sizes = bucket_sizes(resolution, models.size_step) if config.aspect_buckets else [(resolution, resolution)]
        showing = Showing(
            {size: models.latent_shape(*size) for size in sizes},
            config.center_crop,
            config.random_flip,
            config.unmasked_weight,
        )
        dataset = DreamBoothDataset(
            instance,
            prior,
            showing,
            batch_size=config.train_batch_size,
            num_timesteps=self.noise_scheduler.config.num_train_timesteps,
            seed=config.seed,
        )
        if config.aspect_buckets:
            counts = (f"{width}×{height} ({len(photos)})" for (width, height), photos in dataset.by_size.items())
            self.accelerator.print(f"sizes: {', '.join(counts)}")
        if config.center_crop and not dataset.crops:
            self.accelerator.print("note: --center_crop has no effect: no photo needs to be cropped")
        return dataset

    def _set_up_attention(self) -> None:
        denoiser = self.models.denoiser
        if self.config.attention_backend:
            try:
                denoiser.set_attention_backend(self.config.attention_backend)
            except (ValueError, RuntimeError, ImportError) as error:
                given = f"--attention_backend {self.config.attention_backend}"
                raise UserError(f"{given}: {first_line(error)}") from error
        if self.config.gradient_checkpointing:
            self.models.checkpoint_gradients()

    # One step

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The run's remaining batches, on the device."""
        config, accelerator = self.config, self.accelerator
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._positions(),
            num_workers=0 if config.cache_latents else config.dataloader_num_workers,
            worker_init_fn=leave_signals_to_the_run,
        )
        for batch in loader:
            yield {name: tensor.to(accelerator.device) for name, tensor in batch.items()}

    def _positions(self) -> BatchPositions:
        """What this process's remaining batches consist of."""
        config, accelerator = self.config, self.accelerator
        return BatchPositions(
            self.step * config.gradient_accumulation_steps,
            self.max_train_steps * config.gradient_accumulation_steps,
            config.train_batch_size * len(self.dataset.streams),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward for one batch of this process; its loss."""
        # All else has its own generators; this is for models with dropout.
        torch.manual_seed(derived_seed(self.config.seed, DROPOUT, self.step, self.accelerator.process_index))
        loss = self._loss(batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def _agree(self, losses: Sequence[Tensor], stop: bool) -> tuple[float, bool]:
        """The step's mean loss over all processes, and whether any of them was asked to stop.

        A signal may reach one process alone, but if only one acted on it, the others would wait for it for ever.
        """
        told = self.accelerator.gather(torch.stack([*losses, torch.full_like(losses[0], float(stop))]))
        told = told.view(self.accelerator.num_processes, -1)
        return told[:, :-1].mean().item(), bool(told[:, -1].any())

    def _update(self, loss: float) -> None:
        """The optimizer's step, unless loss or gradient went wrong, which all processes find out alike."""
        config, accelerator, scaler = self.config, self.accelerator, self.accelerator.scaler
        if not math.isfinite(loss):
            self._stop_at_bad_numbers("loss")
        norm = accelerator.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm or math.inf)
        if scaler is None and not norm.isfinite():
            self._stop_at_bad_numbers("gradient")
        self.optimizer.step()
        if accelerator.optimizer_step_was_skipped:
            self.skipped += 1
            if scaler.get_scale() < 1:  # it has tried everything
                self._stop_at_bad_numbers("gradient")
        else:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        config, models = self.config, self.models
        timesteps = models.draw_timesteps(batch["timestep"])
        moments = batch["moments"] if "moments" in batch else models.encode_images(batch["pixels"])
        latents = models.sample_latents(moments, batch["latent_noise"])
        noise = add_offset(batch["noise"], batch["offset"], config.offset_noise)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.denoiser(noisy_latents, timesteps, batch["prompt"], batch["view"])
        return training_loss(
            model_pred,
            prediction_target(self.noise_scheduler, latents, noise, timesteps),
            timesteps,
            batch["is_prior"],
            self.noise_scheduler,
            snr_gamma=config.snr_gamma,
            prior_loss_weight=config.prior_loss_weight,
            weights=batch.get("weights"),
        )

    def _stop_at_bad_numbers(self, what: str) -> NoReturn:
        kept = [path.name for path in checkpoints.checkpoints(self.folder)]
        raise UserError(
            f"step {self.step + 1}: the {what} is not finite; {kept[-1] if kept else 'no checkpoint'} is kept from "
            "before. Lower --learning_rate, or use --mixed_precision bf16 or no"
        )

    # Between steps

    def _progress_bar(self) -> tqdm[NoReturn]:
        hidden = not self.accelerator.is_main_process
        shown: dict[str, Any] = {"desc": "training", "unit": "step", "file": Stderr(), "dynamic_ncols": True}
        return tqdm(total=self.max_train_steps, initial=self.step, disable=hidden, **shown)

    def _report(self, recent: Sequence[float], progress: tqdm[NoReturn]) -> None:
        group = self.optimizer.param_groups[0]
        lr = group["lr"] * group.get("d", 1)  # Prodigy's own estimate
        progress.update()
        skipped = {"skipped": self.skipped} if self.skipped else {}
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", lr=f"{lr:.2g}", **skipped)
        self._track(lambda: self.accelerator.log({"loss": recent[-1], "lr": lr}, step=self.step))

    def _track(self, send: Callable[[], None]) -> None:
        """Trackers are a convenience: where they cannot write, the run goes on without them."""
        try:
            send()
        except Exception as error:  # of a disk, of a service, of a login that was not made
            self.accelerator.trackers = []
            why = first_line(error)
            self.accelerator.print(f"note: {self.config.report_to} cannot write ({why}); no more is reported to it")

    def _validate(self, stop: StopRequest) -> None:
        """Draw the validation prompts and write them as one labelled picture, `validation/step-<step>.png`, or several.

        A request to stop does not wait for it: the sheet is left out then.
        """
        config, accelerator = self.config, self.accelerator
        if config.num_validation_images and config.validation_prompts and accelerator.is_main_process:
            seeds = range(config.seed, config.seed + config.num_validation_images)
            jobs = list(product(config.validation_prompts, seeds))
            with self._evaluated():
                samples = generate(
                    self.models,
                    jobs,
                    config.sampler,
                    resolution=config.resolution,
                    batch_size=config.sample_batch_size,
                )
                drawn = list(takewhile(lambda _: not stop.requested, samples))
            if len(drawn) == len(jobs):
                rows = sheet_rows({"adapter": drawn}, len(seeds))
                for number, sheet in enumerate(contact_sheets(rows, f"step {self.step}"), start=1):
                    self._write_sheet(sheet, number)
        accelerator.wait_for_everyone()

    def _write_sheet(self, sheet: Image.Image, number: int) -> None:
        path = sheet_of(self.folder, self.step, number)
        try:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as file:
                sheet.save(file, "PNG")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; checkpoints are intact") from error

        def log_images() -> None:
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    name = "validation" if number == 1 else f"validation_{number}"
                    tracker.log_images({name: np.asarray(sheet)[None]}, step=self.step, **options)

        self._track(log_images)

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Inside the block the models are as in inference; schedule-free optimizers put their averaged weights in."""
        self.denoiser.eval()
        training_weights = [parameter.detach().clone() for parameter in self.adapter.parameters()]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():  # bit for bit, which going there and back by averaging is not
                for parameter, weights in zip(self.adapter.parameters(), training_weights, strict=True):
                    parameter.copy_(weights)
            self.denoiser.train()

    # Writing

    def _save_result(self, path: Path) -> None:
        """Write the adapter, unless the run was stopped before it got as far as the one that is there."""
        before = checkpoints.step_of_result(self.folder)
        if before > self.step:
            self.accelerator.print(f"note: {path} stays as it is, trained {before} steps")
        else:
            self._save_adapter(path)

    def _save_adapter(self, path: Path) -> None:
        config = self.config
        training = {name: value for name, value in config.to_dict().items() if name not in (*PRIVATE, "adapter")}
        training |= {"pretrained_model_name_or_path": self.public_base.name, "base_config": self.public_config}
        names = ("instance_prompt", "class_prompt", "unique_token", "class_word")
        subjects = [{name: getattr(concept, name) for name in names} for concept in config.concepts]
        prompts = subjects[0] if len(subjects) == 1 else {"subjects": subjects}
        with self._evaluated():
            training["step"] = self.step
            save_adapter(path, self.adapter, base_model=self.public_base, training=training, prompts=prompts)

    def _write_card(self, adapter: Path) -> None:
        path, sheet = self.folder / CARD, latest_sheet(self.folder)
        picture = sheet.relative_to(self.folder).as_posix() if sheet else None
        if not may_write(path):
            self.accelerator.print(f"note: {path} stays as you wrote it")
            return
        try:
            with whole_file(path) as file:
                card = model_card("adapter", adapter.name, [read_adapter(adapter)], models=self.models, picture=picture)
                file.write(card.encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; the adapter is in {adapter}") from error

    def _write_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "adapter": self.adapter.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "skipped": self.skipped,
                "settings": self.recorded.to_dict(),
                "circumstances": self.circumstances,
            }
            limit = self.config.checkpoints_total_limit
            checkpoints.write_checkpoint(self.folder, self.step, state, self._save_adapter, limit)
        self.accelerator.wait_for_everyone()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Settings as trackers take them: one level, plain values."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
