"""What a run writes besides its pictures: the adapter, its card, checkpoints, and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gsoft.fingerprint import BaseModelIdentity
from gsoft.whole_file import whole_file
from gsoft_diffusion.adapters.file import FORMAT, LAST_STEP, read_adapter, save_adapter
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import Mark, marked
from gsoft_diffusion.foundation.errors import UserError, user_errors
from gsoft_diffusion.foundation.model_names import public_name
from gsoft_diffusion.foundation.run_folder import ADAPTER, CARD, latest_sheet
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.publish.model_card import OTHER_BASE, may_write, model_card
from gsoft_diffusion.training import checkpoints
from gsoft_diffusion.training.best import Best
from gsoft_diffusion.training.state import TrainingState


class RunOutputs:
    """Writes a run's results. Make it at the start: at the end of a long run the folders that names are found by may
    be out of reach.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, model: BaseModel, identity: BaseModelIdentity
    ) -> None:
        """config: the run's settings, with nothing left open.
        accelerator: says which process writes; prints notes.
        model: the base model, for the card.
        identity: of the base model, as `identity_of` gave it before the adapter was put in.
        """
        self.config, self.accelerator, self.model = config, accelerator, model
        self.folder = Path(config.output_dir or ".")
        self.adapter = self.folder / ADAPTER
        self.recorded = checkpoints.recorded(config)
        self.public_base = replace(identity, name=public_name(identity.name))
        self.public_config = config.base_config and public_name(config.base_config)
        self.elsewhere = False  # whether the run began from a checkpoint in another folder
        self.other_base: str | None = None  # if the run went on with another base model, how far from the one before

    def resumed_from(self, adapter: Path, fingerprint: str) -> None:
        """Say, and keep for the card, if the run goes on with another base model than it had.

        adapter: the checkpoint's, which says if there was another before. fingerprint: of the checkpoint's base model.

        Raises UserError if the adapter cannot be read.
        """
        self.elsewhere = adapter.parent.resolve().parent != self.folder.resolve()
        with user_errors(), FORMAT.open(adapter) as file:
            self.other_base = file.sections["training"].get(OTHER_BASE)
        if fingerprint != self.public_base.fingerprint:
            self.other_base = checkpoints.other_base(fingerprint, self.public_base.fingerprint)
            self.accelerator.print(f"note: compared with the checkpoint's, the base model {self.other_base}")

    def write_settings(self) -> None:
        """Write the resolved settings, so that `--config` takes them again. Raises UserError if that fails."""
        written = replace(self.config, resume_from_checkpoint=None, accept_changes=False)
        checkpoints.write_settings(written, self.accelerator.num_processes, elsewhere=self.elsewhere)

    def save_result(self, state: TrainingState) -> None:
        """Write the adapter, unless the run was stopped before it got as far as the one that is there.

        With `--keep best` it is that of the best step so far.
        """
        before = checkpoints.step_of_result(self.folder)
        if before > state.step:
            self.accelerator.print(f"note: {self.adapter} stays as it is, trained {before} steps")
        else:
            self.save_adapter(self.adapter, state, state.best)

    def save_adapter(self, path: Path, state: TrainingState, best: Best | None = None) -> None:
        """Write the adapter, with settings and prompts inside; nothing private.

        path: of the file. state: the run's, whose adapter is written as it is used in inference. best: write that of
        this step, instead of that of now. Raises UserError as `save_adapter` in `adapters.file`.
        """
        config, private = self.config, marked(TrainingConfig, Mark.PRIVATE)
        training = {name: value for name, value in config.to_dict().items() if name not in (*private, "adapter")}
        training |= {"pretrained_model_name_or_path": self.public_base.name, "base_config": self.public_config}
        names = ("instance_prompt", "class_prompt", "unique_token", "class_word")
        subjects = [{name: getattr(concept, name) for name in names} for concept in config.concepts]
        prompts = subjects[0] if len(subjects) == 1 else {"subjects": subjects}
        chosen = {"step": best.step, LAST_STEP: state.step, "balance": best.balance} if best else {"step": state.step}
        with state.evaluated(best):
            training |= chosen | ({OTHER_BASE: self.other_base} if self.other_base else {})
            save_adapter(path, state.adapter, base_model=self.public_base, training=training, prompts=prompts)

    def write_checkpoint(self, state: TrainingState, circumstances: Mapping[str, Any]) -> None:
        """Write the state and the adapter, in the main process; the others wait.

        state: the run's. circumstances: as `circumstances` gave them. Raises UserError as
        `checkpoints.write_checkpoint`.
        """
        if self.accelerator.is_main_process:
            checkpoints.write_checkpoint(
                self.folder,
                state.step,
                state.to_dict() | {"settings": self.recorded.to_dict(), "circumstances": dict(circumstances)},
                lambda path: self.save_adapter(path, state),
                self.config.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def write_card(self) -> None:
        """Write the model card, unless there is one that the user has written. Raises UserError if it cannot be
        written.
        """
        path = self.folder / CARD
        if not may_write(path):
            self.accelerator.print(f"note: {path} stays as you wrote it")
            return
        try:
            with whole_file(path) as file:
                adapter = read_adapter(self.adapter)
                sheet = latest_sheet(self.folder, adapter.step)
                picture = sheet.relative_to(self.folder).as_posix() if sheet else None
                card = model_card("adapter", self.adapter.name, [adapter], model=self.model, picture=picture)
                file.write(card.encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; the adapter is in {self.adapter}") from error
