"""The state that a run changes while it learns; a checkpoint holds all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsoft_diffusion.adapters.injection import Adapter
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.training.best import Best, failed_validations
from gsoft_diffusion.training.trainable import TrainableAdapter

HYPERPARAMETERS = ("initial_lr", "betas", "eps", "weight_decay", "warmup_steps")  # the optimizer's that are settings


class TrainingState:
    """The adapter, and the state of the optimizer, its schedule and fp16's scaler.

    predictor: the prepared module that the adapter is in. optimizer: prepared by accelerate; lr_scheduler: not, as it
    counts optimizer steps, however many processes take them together. scaler: fp16's, or None.
    step: optimizer steps done. skipped: those that the scaler left out, since a gradient had overflowed.
    best: with `--keep best`, the best step so far; None if none is known. judged: the last step of which validation
    pictures were drawn when they were due. failed: how many such validations there were since the best step.
    """

    def __init__(
        self, adapter: TrainableAdapter, predictor: nn.Module, optimizer: Any, lr_scheduler: Any, scaler: Any
    ) -> None:
        """All are kept as attributes, see the class.

        adapter: what trains.
        predictor: the module that `adapter` is in, as accelerate prepared it.
        optimizer: over the adapter's parameters, as accelerate prepared it.
        lr_scheduler: as `make_lr_scheduler` gave it.
        scaler: accelerate's of fp16's losses, or None.
        """
        self.adapter, self.predictor = adapter, predictor
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.step = self.skipped = self.judged = self.failed = 0
        self.best: Best | None = None
        self.optimizer.train()  # schedule-free optimizers start in evaluation mode; to others it means nothing

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as `load` takes them."""
        return {
            "step": self.step,
            "adapter": self.adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "skipped": self.skipped,
            "best": self.best and self.best.to_dict(),
            "judged": self.judged,
            "failed": self.failed,
        }

    def load(self, checkpoint: Path, state: Mapping[str, Any], config: TrainingConfig) -> None:
        """Go on from what `to_dict` gave.

        checkpoint: its folder, for messages.
        state: what `to_dict` gave, with the settings it was made by in `state["settings"]`.
        config: the settings of the run that resumes; with `accept_changes` its learning rates and the like count, and
        not the checkpoint's.

        Raises UserError if the state does not fit the settings.
        """
        fresh = [dict(group) for group in self.optimizer.param_groups]
        try:
            if state["settings"]["optimizer"] != config.optimizer:
                raise ValueError(f"--optimizer was {state['settings']['optimizer']}")
            self.adapter.load_state_dict(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            if self.scaler is not None and state["scaler"] is not None:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{checkpoint} does not fit the settings: {first_line(error)}") from error
        if config.accept_changes:
            self._set_hyperparameters(fresh)
        self.step, self.skipped, self.judged = state["step"], state["skipped"], state.get("judged", 0)
        best = state.get("best") if config.keep == "best" else None
        self.best = best and Best.from_dict(best)
        self.failed = failed_validations(state, config)

    def _set_hyperparameters(self, fresh: Sequence[Mapping[str, Any]]) -> None:
        """Let the settings decide again, where the optimizer's loaded state had brought back the checkpoint's."""
        self.lr_scheduler.base_lrs = [new["initial_lr"] for new in fresh]
        for group, new, factor in zip(self.optimizer.param_groups, fresh, self.lr_scheduler.lr_lambdas, strict=True):
            group |= {name: new[name] for name in HYPERPARAMETERS if name in new}
            group["lr"] = new["initial_lr"] * factor(self.lr_scheduler.last_epoch)

    @property
    def learning_rate(self) -> float:
        """The denoiser's; Prodigy's own estimate is in it."""
        group = self.optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1)

    def keep_if_best(self, balance: float, judged_by: Mapping[str, Any]) -> None:
        """Keep the adapter of this step if none before was as good.

        balance: of its validation pictures; 0 is none worth keeping. judged_by: as in `Best`.
        """
        if balance <= (self.best.balance if self.best else 0):
            return
        with self.evaluated():
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.adapter.state_dict().items()}
        self.best, self.failed = Best(self.step, balance, judged_by, tensors), 0

    def was_judged(self) -> None:
        """Remember that this step's validation pictures were drawn, and whether they brought nothing better."""
        self.judged = self.step
        if not (self.best and self.best.step == self.step):
            self.failed += 1

    @contextmanager
    def evaluated(self, best: Best | None = None) -> Iterator[None]:
        """Inside the block the models are as in inference; schedule-free optimizers put their averaged weights in.

        best: have the adapter of this step in the models, instead of that of now.
        """
        self.predictor.eval()
        training_weights = [parameter.detach().clone() for parameter in self.adapter.parameters()]
        self.optimizer.eval()
        try:
            if best:
                self.adapter.load_state_dict(best.adapter)
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():  # bit for bit, which going there and back by averaging is not
                for parameter, weights in zip(self.adapter.parameters(), training_weights, strict=True):
                    parameter.copy_(weights)
            self.predictor.train()

    def nothing_learned(self) -> Iterator[str]:
        """A line for each part of the model whose rotations are still identities, up to rounding."""
        if not isinstance(self.adapter, Adapter):
            return
        largest: dict[str, list[Tensor]] = {}
        for name, parameter in self.adapter.named_parameters():
            if not name.endswith("output_scale"):
                largest.setdefault(name.partition(".")[0], []).append(parameter.detach().abs().max())
        for part, angles in largest.items():
            if torch.stack(angles).max().item() < torch.finfo(torch.float32).eps:
                rate = "text_encoder_lr" if part.startswith("text_encoder") else "learning_rate"
                why = f"raise --{rate} or --max_train_steps"
                if self.skipped == self.step:
                    why = "all steps were skipped; use --mixed_precision bf16 or no"
                yield f"note: nothing was learned in the {part.replace('_', ' ')}: its rotations are identities; {why}"
