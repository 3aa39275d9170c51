"""A training run: preparation, the loop, and the closing messages."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import Adapter, inject
from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.config.command_line import command
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.memory import waits_not
from gsoft_diffusion.foundation.run_folder import ADAPTER, SETTINGS
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.training import checkpoints
from gsoft_diffusion.training.circumstances import BASE_WEIGHTS, circumstances
from gsoft_diffusion.training.dataset import FIRST_VALUES, PROMPT_NUMBERS, BatchPositions, collate, derived_seed
from gsoft_diffusion.training.optimizer import make_lr_scheduler, make_optimizer
from gsoft_diffusion.training.outputs import RunOutputs
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.preflight import check_step
from gsoft_diffusion.training.preparation import check_snr_gamma, make_dataset, set_up_networks
from gsoft_diffusion.training.progress import Progress
from gsoft_diffusion.training.signals import DrawRequest, StopRequest, leave_signals_to_the_run
from gsoft_diffusion.training.state import TrainingState
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.subjects import class_photos, held_out_photos
from gsoft_diffusion.training.tracking import Tracking
from gsoft_diffusion.training.trainable import MakeAdapter
from gsoft_diffusion.training.validation import Validation, validation_scores
from gsoft_diffusion.training.validation_loss import ValidationLoss

SMOOTHING = 50  # steps over which the progress bar averages the loss


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run: the adapter's file, the steps done, whether a signal ended it early, seconds of training."""

    adapter: Path
    steps: int
    interrupted: bool
    seconds: float


class Run:
    """One training run: everything is made ready in the constructor, `execute` trains.

    Its parts are its attributes: `state` is what changes, `training_step` what happens in a step, `validation` and
    `validation_loss` (None if it is not asked for) what is drawn and measured, `outputs` what is written, `tracking`
    what trackers are told, `progress` what others may watch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: BaseModel,
        instance: Mapping[Concept, Sequence[Photo]],
        make_adapter: MakeAdapter = inject,
    ) -> None:
        """config: the settings, with nothing left open; see `with_model_defaults`.
        accelerator: as `make_accelerator` gave it.
        model: the base model, without an adapter; the run puts one in.
        instance: each subject's photos.
        make_adapter: puts what is trained into the model.

        Raises UserError for what does not fit: the step into memory, the settings to the model, held-out photos, what
        pictures are scored by, class images.
        """
        self.config, self.accelerator, self.model = config, accelerator, model
        assert config.max_train_steps is not None, "with_model_defaults sets it"
        self.max_train_steps = config.max_train_steps
        identity = identity_of(model)
        self.outputs = RunOutputs(config, accelerator, model, identity)
        check_snr_gamma(config, model)
        # First what may turn out not to fit, then what takes long.
        torch.manual_seed(derived_seed(config.seed, FIRST_VALUES))  # some other methods draw theirs
        adapter = make_adapter(config.adapter, model.denoiser, model.text_encoders)
        check_step(config, model, adapter, accelerator.device)
        set_up_networks(config, model)
        optimizer = make_optimizer(config, adapter)
        photos = list(chain(*instance.values()))
        held_out = held_out_photos(config, instance, accelerator.print) if config.validation_loss else []
        scores = validation_scores(config, accelerator, model, instance)
        prior = class_photos(config, accelerator, model, adapter, identity, instance)
        self.dataset = make_dataset(config, model, photos, prior, accelerator.print)
        self.circumstances = circumstances(config, self.dataset, identity, accelerator.num_processes)
        prompts = dict.fromkeys([*self.dataset.prompts, *(photo.prompt for photo in held_out)])
        predictor = Predictor(model, adapter, list(prompts)).train()
        # Before accelerate remembers the optimizer's `step`, which PyTorch's schedules put a counter around.
        lr_scheduler = make_lr_scheduler(config, optimizer)
        prepared, prepared_optimizer = accelerator.prepare(predictor, optimizer)
        self.state = TrainingState(adapter, prepared, prepared_optimizer, lr_scheduler, accelerator.scaler)
        self.tracking = Tracking(config, accelerator)
        self.training_step = TrainingStep(config, accelerator, model, self.state)
        self.progress = Progress(self.outputs.folder, accelerator.print)
        self.validation_loss = (
            ValidationLoss(config, model, self.state, predictor, self.dataset, held_out)
            if held_out and accelerator.is_main_process
            else None
        )
        self.validation = Validation(config, accelerator, model, self.state, self.tracking, scores)
        counts = adapter.parameter_counts()
        accelerator.print(
            f"training {counts.pop('total'):,} parameters: "
            + ", ".join(f"{count:,} in the {part.replace('_', ' ')}" for part, count in counts.items())
        )

    def resume(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Load a checkpoint's state: parameters, optimizer, schedule, scaler and step. `execute` is next.

        checkpoint: its folder, for messages. state: as `read_state` gave it.

        Raises UserError if what decides the training has changed, or the state does not fit the settings.
        """
        before, say = state["circumstances"], self.accelerator.print
        checkpoints.check_unchanged(self.config, checkpoint, before, self.circumstances, say)
        base = before.get(BASE_WEIGHTS, self.circumstances[BASE_WEIGHTS])
        self.outputs.resumed_from(checkpoint / ADAPTER, base)
        self.state.load(checkpoint, state, self.config)
        self.validation.resumed_from(checkpoint)
        self.accelerator.print(f"going on from step {self.state.step}")

    def execute(self) -> TrainingResult:
        """Train from the current step to the last; save; draw a last sheet.

        It ends earlier if a signal asks to stop, or if the subject improves no longer and the best step is kept.

        Raises UserError if a loss or gradient is not finite, or if something cannot be written.
        """
        accelerator, state = self.accelerator, self.state
        if accelerator.is_main_process:
            if state.step == 0 and self.config.resume_from_checkpoint:
                checkpoints.clear_beginning(self.outputs.folder)
            self.outputs.write_settings()
        self.tracking.start()
        first = state.step
        if self.config.cache_latents:
            with self.model.on_device(self.model.vae):  # once for all photos
                self.dataset.cache(self.model.encode_images, chain.from_iterable(self.positions()))
        with StopRequest(launched=accelerator.num_processes > 1) as stop, DrawRequest() as draw:
            self.validation.draw_base(stop)
            started = time.perf_counter()
            stopped = self._train(stop, draw)
            seconds = time.perf_counter() - started
            interrupted = stopped and state.step < self.max_train_steps
            if accelerator.is_main_process:
                self.outputs.save_result(state)
            unseen = state.judged != state.step and (state.step > first or self.config.keep == "best")
            if not interrupted and (unseen or not self.validation.is_drawn()):
                self.validation.draw(stop)
                if accelerator.is_main_process and state.best and state.best.step == state.step:
                    self.outputs.save_result(state)  # by that last sheet it is the best
        if interrupted:
            accelerator.print(self._how_to_go_on())
        if accelerator.is_main_process and isinstance(state.adapter, Adapter):
            self.outputs.write_card()
        for line in self._closing_lines():
            accelerator.print(line)
        return TrainingResult(self.outputs.adapter, state.step, interrupted, seconds)

    def _train(self, stop: StopRequest, draw: DrawRequest) -> bool:
        """Take the remaining steps; returns whether a signal asked to stop before they were all done."""
        config, accelerator, state, step = self.config, self.accelerator, self.state, self.training_step
        recent: deque[float] = deque(maxlen=SMOOTHING)
        losses: list[Tensor] = []  # of the batches since the last optimizer step
        if self.validation.is_owed() and not self.validation.draw(stop):
            return True
        if self.validation.is_over():
            return False
        with self._progress_bar() as progress:
            for batch in self.batches():
                with accelerator.accumulate(state.predictor):
                    losses.append(step.backward(batch, len(losses)))
                    if not accelerator.sync_gradients:
                        continue
                    loss, norm, stopping = step.agree(losses, step.clip(), stop.requested)
                    losses.clear()
                    step.update(loss, norm)
                state.step += 1
                recent.append(loss)
                self._report(recent, progress)
                if stopping or _due(state.step, config.checkpointing_steps):
                    self.outputs.write_checkpoint(state, self.circumstances)
                if stopping:
                    return True
                if state.step == self.max_train_steps:
                    continue  # the last sheet comes after the result is saved
                wanted = draw.taken()
                if self._validates(state.step):
                    drawn = self._drawn(self.validation.draw, stop)
                    if not drawn or self.validation.is_over():
                        if not _due(state.step, config.checkpointing_steps):
                            self.outputs.write_checkpoint(state, self.circumstances)
                        return not drawn
                elif wanted and accelerator.is_main_process:
                    self._drawn(self.validation.draw_here, stop)
        return False

    def _drawn(self, draw: Callable[[StopRequest], bool], stop: StopRequest) -> bool:
        """Draw this step's pictures. If that fails, as where a picture takes more memory than a step, no step is lost.

        That holds for a run of one process: of several, the others wait for the pictures.
        """
        try:
            return draw(stop)
        except Exception:
            if self.accelerator.num_processes == 1 and not _due(self.state.step, self.config.checkpointing_steps):
                with suppress(UserError):  # the first error is the one to be told
                    self.outputs.write_checkpoint(self.state, self.circumstances)
                    self.accelerator.print(self._how_to_go_on())
            raise

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The run's remaining batches, as `collate` makes them, with the model's timesteps.

        They are on the device, but for the prompts' numbers, which are looked up on both.
        """
        config, device = self.config, self.accelerator.device
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.positions(),
            collate_fn=collate,
            pin_memory=device.type == "cuda",  # so that copies to the GPU need not wait for what it is doing
            num_workers=0 if config.cache_latents else config.dataloader_num_workers,
            worker_init_fn=leave_signals_to_the_run,
        )
        for batch in loader:
            batch["timestep"] = self.model.draw_timesteps(batch["timestep"])
            yield {
                name: tensor if name in PROMPT_NUMBERS else tensor.to(device, non_blocking=waits_not(device))
                for name, tensor in batch.items()
            }

    def positions(self) -> BatchPositions:
        """What this process's remaining batches consist of."""
        config, accelerator = self.config, self.accelerator
        return BatchPositions(
            self.state.step * config.gradient_accumulation_steps,
            self.max_train_steps * config.gradient_accumulation_steps,
            config.train_batch_size * len(self.dataset.streams),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def _validates(self, step: int) -> bool:
        return _due(step, self.config.validation_steps)

    def _progress_bar(self) -> tqdm[NoReturn]:
        hidden = not self.accelerator.is_main_process
        shown: dict[str, Any] = {"desc": "training", "unit": "step", "dynamic_ncols": True}
        return tqdm(total=self.max_train_steps, initial=self.state.step, disable=hidden, **shown)

    def _report(self, recent: Sequence[float], progress: tqdm[NoReturn]) -> None:
        state = self.state
        progress.update()
        also = {"skipped": state.skipped} if state.skipped else {}
        also |= {"best": state.best.step} if state.best else {}
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", lr=f"{state.learning_rate:.2g}", **also)
        measured = {}
        if self.validation_loss and (state.step == self.max_train_steps or self._validates(state.step)):
            measured["validation_loss"] = self.validation_loss()
        self.tracking.log({"loss": recent[-1], "lr": state.learning_rate, **measured}, state.step)
        if self.accelerator.is_main_process:
            self.progress.write(state.step, recent[-1], state.learning_rate, **measured)

    def _how_to_go_on(self) -> str:
        settings = shlex.quote(str(self.outputs.folder / SETTINGS))
        count = self.accelerator.num_processes
        launched = f"by the same launcher, with {count} processes, " if count > 1 else ""
        return (
            f"stopped at step {self.state.step}; to go on: "
            f"{launched}{command('gsoft-train')} --config {settings} --resume_from_checkpoint latest"
        )

    def _closing_lines(self) -> Iterator[str]:
        state, result = self.state, self.outputs.adapter
        yield from state.nothing_learned()
        if best := state.best:
            end = "" if state.step == self.max_train_steps else f"; no step up to {state.step} was better"
            yield f"kept: step {best.step}, by its balance of likeness and prompt, {best.balance:.3f}{end}"
        elif self.config.keep == "best":
            yield "note: no step had a balance of likeness and prompt above 0, so the last one is kept"
        if state.skipped:
            yield f"{state.skipped} of {state.step} steps were skipped: their gradients overflowed in fp16"
        prompt = shlex.quote((self.config.validation_prompts or ("",))[-1])
        error = state.adapter.orthogonality_error()
        yield f"adapter: {result}{f' (largest deviation from orthogonality {error:.1e})' if error is not None else ''}"
        yield f"try it: {command('gsoft-draw')} --adapter {shlex.quote(str(result))} --prompt {prompt}"


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
