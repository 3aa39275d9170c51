"""The training loop: what `train_dreambooth_gsoft.py` does."""

from __future__ import annotations

import importlib
import math
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, ProjectConfiguration
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gsoft_diffusion import checkpoints
from gsoft_diffusion.adapter_file import save_adapter
from gsoft_diffusion.baselines import BaselineAdapter, BaselineConfig, inject_baseline
from gsoft_diffusion.class_images import ensure_class_images
from gsoft_diffusion.config import FULL_SIZE, MINIATURE, MINIATURE_BELOW, TrainingConfig
from gsoft_diffusion.dataset import DROPOUT, BatchPositions, DreamBoothDataset, Photos, derived_seed
from gsoft_diffusion.errors import UserError, first_line
from gsoft_diffusion.generation import generate, make_scheduler, sheet_rows
from gsoft_diffusion.inject import Adapter, inject
from gsoft_diffusion.losses import add_offset, prediction_target, training_loss
from gsoft_diffusion.models import DTYPES, Models, load_models
from gsoft_diffusion.pictures import contact_sheet

SMOOTHING = 50  # steps over which the progress bar averages the loss
PRIVATE = ("instance_data_dir", "class_data_dir", "output_dir", "resume_from_checkpoint")  # not in shared adapters


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run: the adapter's file, the steps done, whether a signal ended it early, seconds of training."""

    adapter: Path
    steps: int
    interrupted: bool
    seconds: float


class Denoiser(nn.Module):
    """All that runs in a training step: the UNet, the text encoder if it trains, and the adapter in both.

    Prompts are known beforehand: each is tokenized once, and encoded once if the text encoder does not train.
    """

    def __init__(self, models: Models, adapter: Adapter | BaselineAdapter, prompts: Sequence[str]) -> None:
        super().__init__()
        self.unet = models.unet
        self.adapter = adapter
        self.text_encoder = models.text_encoder if adapter.config.text_encoder else None
        with torch.no_grad():
            inputs = models.encode_prompts(prompts) if self.text_encoder is None else models.tokenize(prompts)
        self.register_buffer("prompt_inputs", inputs, persistent=False)  # (prompts, length, width) or token numbers

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, prompt_indices: Tensor) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32, for the prompt of each sample."""
        assert isinstance(self.prompt_inputs, Tensor)
        prompts = self.prompt_inputs if self.text_encoder is None else self.text_encoder(self.prompt_inputs)[0]
        noisy_latents = noisy_latents.to(self.unet.dtype)
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=prompts[prompt_indices]).sample.float()


def train(config: TrainingConfig, baseline: BaselineConfig | None = None) -> TrainingResult:
    """Train an adapter on the photos and write it to the output folder, with its settings and validation pictures.

    baseline: another method to train in everything else the same way, instead of `config.adapter`.

    SIGINT and SIGTERM end the run after the current step, with adapter and checkpoint saved. Raises UserError for
    anything that the user can put right, a loss that is not finite included.
    """
    config = config.resolved()
    checkpoint = checkpoints.checkpoint_to_resume(config)
    instance = Photos(config.instance_data_dir, "--instance_data_dir", config.center_crop, config.random_flip)
    accelerator = make_accelerator(config)
    models = load_models(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        dtype=DTYPES[config.mixed_precision],
        device=accelerator.device,
    )
    config = with_model_defaults(config, models)
    if checkpoint:
        checkpoints.check_settings(config, checkpoint)
    run = Run(config, accelerator, models, instance, baseline)
    if checkpoint:
        run.resume(checkpoint)
    try:
        return run.execute()
    finally:
        accelerator.end_training()


def with_model_defaults(config: TrainingConfig, models: Models) -> TrainingConfig:
    """The settings with what only the model decides filled in: resolution, scheduler, steps and learning rate."""
    resolution = config.resolution or models.resolution
    models.check_resolution(resolution)
    scheduler = type(make_scheduler(models, config.sampler)).__name__
    usual = MINIATURE if models.resolution < MINIATURE_BELOW else FULL_SIZE
    left_open: dict[str, Any] = {name: value for name, value in usual.items() if getattr(config, name) is None}
    return replace(config, resolution=resolution, sampler=replace(config.sampler, scheduler=scheduler), **left_open)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's driver of devices, precision, accumulation and trackers."""
    folder = Path(config.output_dir or ".")
    wanted = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=wanted,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
            # The base is in half precision as it is and the adapter in float32; sampling runs without autocast too.
            kwargs_handlers=[AutocastKwargs(enabled=False)],
        )
    except ValueError as error:  # a precision the device does not have, a tracker that does not exist
        given = f"--mixed_precision {config.mixed_precision}, --report_to {config.report_to}"
        raise UserError(f"{given}: {error}") from error
    if wanted and not accelerator.log_with:
        accelerator.print(f"note: {wanted} is not installed (pip install {wanted}), so nothing is reported to it")
    return accelerator


def make_optimizer(config: TrainingConfig, adapter: Adapter | BaselineAdapter) -> torch.optim.Optimizer:
    """The optimizer over the adapter's parameters; weight decay leaves output scales, which are 1 at rest, alone.

    Raises UserError with the name of the package if its library is missing.
    """
    scales = [parameter for name, parameter in adapter.named_parameters() if name.endswith("output_scale")]
    rotations = [parameter for name, parameter in adapter.named_parameters() if not name.endswith("output_scale")]
    groups = [{"params": rotations, "weight_decay": config.adam_weight_decay}]
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0})
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
    assert config.learning_rate is not None, "with_model_defaults sets it"
    return optimizer_class(groups, lr=config.learning_rate, **options)


class Run:
    """One training run: everything is made ready in the constructor, `execute` trains."""

    adapter: Adapter | BaselineAdapter

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        models: Models,
        instance: Photos,
        baseline: BaselineConfig | None = None,
    ) -> None:
        self.config, self.accelerator, self.models = config, accelerator, models
        self.folder = Path(config.output_dir or ".")
        assert config.max_train_steps is not None, "with_model_defaults sets it"
        self.max_train_steps = config.max_train_steps
        self.step = 0
        self.identity = models.identity()
        self.noise_scheduler = DDPMScheduler.from_config(models.scheduler.config)
        # First what may turn out not to fit, then what takes long.
        if baseline:
            self.adapter = inject_baseline(baseline, models.unet, [models.text_encoder])
        else:
            self.adapter = inject(config.adapter, models.unet, [models.text_encoder])
        self._set_up_attention()
        optimizer = make_optimizer(config, self.adapter)
        prior = self._class_photos()
        self.dataset = self._make_dataset(instance, prior)
        prompts = [config.instance_prompt or "", *([config.class_prompt or ""] if prior else [])]
        self.denoiser, self.optimizer = accelerator.prepare(Denoiser(models, self.adapter, prompts).train(), optimizer)
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
            f"training {counts['total']:,} parameters: {counts['unet']:,} in the UNet, "
            f"{counts['text_encoder']:,} in the text encoder"
        )

    def execute(self) -> TrainingResult:
        """Train from the current step to the last, or until a signal asks to stop; save; draw a last sheet."""
        config, accelerator = self.config, self.accelerator
        result = self.folder / checkpoints.ADAPTER
        if accelerator.is_main_process:
            checkpoints.write_settings(replace(config, resume_from_checkpoint=None))
        accelerator.init_trackers("training", config=_flat(config.to_dict()))
        first = self.step
        with StopRequest() as stop:
            started = time.perf_counter()
            self._train(stop)
            seconds = time.perf_counter() - started
            if accelerator.is_main_process:
                self._save_adapter(result)
        interrupted = stop.requested and self.step < self.max_train_steps
        if interrupted:
            settings = shlex.quote(str(self.folder / checkpoints.SETTINGS))
            accelerator.print(
                f"stopped at step {self.step}; to go on: "
                f"python train_dreambooth_gsoft.py --config {settings} --resume_from_checkpoint latest"
            )
        elif self.step > first:
            self._validate()
        prompt = shlex.quote((config.validation_prompts or ("",))[-1])
        error = self.adapter.orthogonality_error()
        accelerator.print(
            f"adapter: {result}{f' (largest deviation from orthogonality {error:.1e})' if error is not None else ''}\n"
            f"try it: python inference.py --adapter {shlex.quote(str(result))} --prompt {prompt}"
        )
        return TrainingResult(result, self.step, interrupted, seconds)

    def _train(self, stop: StopRequest) -> None:
        config, accelerator = self.config, self.accelerator
        recent: deque[float] = deque(maxlen=SMOOTHING)
        losses: list[Tensor] = []  # of the batches since the last optimizer step
        with self._progress_bar() as progress:
            for batch in self._batches():
                with accelerator.accumulate(self.denoiser):
                    losses.append(self._train_on(batch))
                if not accelerator.sync_gradients:
                    continue
                self.step += 1
                recent.append(accelerator.gather(torch.stack(losses)).mean().item())
                losses.clear()
                self._report(recent, progress)
                if stop.requested or _due(self.step, config.checkpointing_steps):
                    self._write_checkpoint()
                if stop.requested:
                    return
                if _due(self.step, config.validation_steps) and self.step < self.max_train_steps:
                    self._validate()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: parameters, optimizer, schedule, scaler and step."""
        state = checkpoints.read_state(checkpoint)
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.accelerator.print(f"going on from step {self.step}")

    # Making ready

    def _class_photos(self) -> Photos | None:
        config = self.config
        if not config.with_prior_preservation:
            return None
        with self.accelerator.main_process_first(), self.adapter.disabled():
            folder = ensure_class_images(config, self.models, self.identity)
        return Photos(folder, "--class_data_dir", config.center_crop, config.random_flip, limit=config.num_class_images)

    def _make_dataset(self, instance: Photos, prior: Photos | None) -> DreamBoothDataset:
        config, models = self.config, self.models
        resolution = config.resolution or models.resolution
        for name, photos in (("subject", instance), ("class", prior)):
            if photos is None:
                continue
            self.accelerator.print(
                f"{name}: {len(photos)} pictures, {photos.turned} turned upright by their EXIF data; "
                f"{photos.skipped} other files skipped"
            )
            if config.cache_latents:
                photos.cache(models.encode_images, resolution)
        return DreamBoothDataset(
            instance,
            prior,
            resolution=resolution,
            latent_shape=models.latent_shape(resolution),
            num_timesteps=self.noise_scheduler.config.num_train_timesteps,
            seed=config.seed,
        )

    def _set_up_attention(self) -> None:
        unet, text_encoder = self.models.unet, self.models.text_encoder
        if self.config.attention_backend:
            try:
                unet.set_attention_backend(self.config.attention_backend)
            except (ValueError, RuntimeError, ImportError) as error:
                given = f"--attention_backend {self.config.attention_backend}"
                raise UserError(f"{given}: {first_line(error)}") from error
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            text_encoder.activation_checkpointing_enable()

    # One step

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The run's remaining batches, on the device."""
        config, accelerator = self.config, self.accelerator
        positions = BatchPositions(
            self.step * config.gradient_accumulation_steps,
            self.max_train_steps * config.gradient_accumulation_steps,
            config.train_batch_size * len(self.dataset.sources),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        loader = DataLoader(self.dataset, batch_sampler=positions, num_workers=config.dataloader_num_workers)
        for batch in loader:
            yield {name: tensor.to(accelerator.device) for name, tensor in batch.items()}

    def _train_on(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward for one batch, and the optimizer's step if enough have come together; its loss."""
        config, accelerator = self.config, self.accelerator
        # All else has its own generators; this is for models with dropout.
        torch.manual_seed(derived_seed(config.seed, DROPOUT, self.step, accelerator.process_index))
        loss = self._loss(batch)
        if not loss.isfinite():
            self._stop_at_bad_numbers("loss")
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm or math.inf)
            if accelerator.scaler is None and not norm.isfinite():  # with a scaler the step is skipped instead
                self._stop_at_bad_numbers("gradient")
        self.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        config, models, timesteps = self.config, self.models, batch["timestep"]
        moments = batch["moments"] if "moments" in batch else models.encode_images(batch["pixels"])
        latents = models.sample_latents(moments, batch["latent_noise"])
        noise = add_offset(batch["noise"], batch["offset"], config.offset_noise)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.denoiser(noisy_latents, timesteps, batch["is_prior"].long())
        return training_loss(
            model_pred,
            prediction_target(self.noise_scheduler, latents, noise, timesteps),
            timesteps,
            batch["is_prior"],
            self.noise_scheduler,
            snr_gamma=config.snr_gamma,
            prior_loss_weight=config.prior_loss_weight,
        )

    def _stop_at_bad_numbers(self, what: str) -> NoReturn:
        raise UserError(
            f"step {self.step + 1}: the {what} is not finite; checkpoints before it are intact. "
            "Lower --learning_rate, or use --mixed_precision bf16 or no"
        )

    # Between steps

    def _progress_bar(self) -> tqdm[NoReturn]:
        hidden = not self.accelerator.is_main_process
        return tqdm(total=self.max_train_steps, initial=self.step, desc="training", unit="step", disable=hidden)

    def _report(self, recent: Sequence[float], progress: tqdm[NoReturn]) -> None:
        group = self.optimizer.param_groups[0]
        lr = group["lr"] * group.get("d", 1)  # Prodigy's own estimate
        progress.update()
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", lr=f"{lr:.2g}")
        self.accelerator.log({"loss": recent[-1], "lr": lr}, step=self.step)

    def _validate(self) -> None:
        """Draw the validation prompts and write them as one labelled picture, `validation/step-<step>.png`."""
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
                rows = sheet_rows({"adapter": list(samples)}, config.num_validation_images)
            sheet = contact_sheet(rows, f"step {self.step}")
            path = self.folder / "validation" / f"step-{self.step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            sheet.save(path)
            for tracker in accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"validation": np.asarray(sheet)[None]}, step=self.step, **options)
        accelerator.wait_for_everyone()

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

    def _save_adapter(self, path: Path) -> None:
        config = self.config
        training = {name: value for name, value in config.to_dict().items() if name not in (*PRIVATE, "adapter")}
        names = ("instance_prompt", "class_prompt", "unique_token", "class_word")
        prompts = {name: getattr(config, name) for name in names}
        with self._evaluated():
            save_adapter(
                path, self.adapter, base_model=self.identity, training=training | {"step": self.step}, prompts=prompts
            )

    def _write_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "adapter": self.adapter.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            limit = self.config.checkpoints_total_limit
            checkpoints.write_checkpoint(self.folder, self.step, state, self._save_adapter, limit)
        self.accelerator.wait_for_everyone()


class StopRequest(AbstractContextManager["StopRequest"]):
    """Inside the block SIGINT and SIGTERM only set `requested`; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        print("\nstopping after this step, then saving; once more to stop at once", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


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
