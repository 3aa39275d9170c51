"""Publishing a run's result on the Hugging Face hub."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import HfApi

from gsoft_diffusion.adapter_file import AdapterFile, read_adapter, save_adapter
from gsoft_diffusion.errors import UserError, first_line
from gsoft_diffusion.hub_access import why_unreachable
from gsoft_diffusion.model_card import CARD, latest_sheet, public_base

PACKAGE = "hub"  # folder for exactly what is published, in the run's


class HubRepository:
    """A model's repository on the hub, which exists once this is made."""

    def __init__(self, model_id: str, token: str | None = None) -> None:
        """Makes the repository if there is none, so that what may fail fails before the training.

        model_id: name, with or without an owner. token: by default the one `hf auth login` has kept, or HF_TOKEN.
        """
        if silent := why_unreachable():  # its client would wait for an answer without end
            raise UserError(
                f"--hub_model_id {model_id}: cannot be made or written to on the hub ({silent}); check the network, or "
                "leave --push_to_hub out"
            )
        self._api = HfApi(token=token)
        try:
            self.id = self._api.create_repo(model_id, exist_ok=True).repo_id
        except Exception as error:  # of the network, of the hub, of their libraries
            raise UserError(
                f"--hub_model_id {model_id}: cannot be made or written to on the hub ({first_line(error)}); "
                "log in with `hf auth login`, or give --hub_token"
            ) from error

    def publish(self, run: Path, adapter: str) -> str:
        """Upload a run's adapter with its card and last sheet; returns the address.

        Raises UserError that says how to try again if it fails: nothing on disk depends on it.
        """
        package = make_package(run, adapter)
        try:
            commit = self._api.upload_folder(repo_id=self.id, folder_path=package, commit_message="Upload an adapter")
        except Exception as error:
            raise UserError(
                f"the result is in {run}, but could not be uploaded ({first_line(error)}); "
                f"to try again: hf upload {self.id} {package}"
            ) from error
        return str(commit.repo_url)


def make_package(run: Path, adapter: str) -> Path:
    """Gather in `<run>/hub` what is published, with nothing in it that names folders of this machine."""
    package = run / PACKAGE
    try:
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir()
        shutil.copy(run / CARD, package / CARD)
        if sheet := latest_sheet(run):
            (package / sheet.parent.name).mkdir()
            shutil.copy(sheet, package / sheet.parent.name)
    except OSError as error:
        raise UserError(f"cannot write {package}: {first_line(error)}") from error
    save_public(read_adapter(run / adapter), package / adapter)
    return package


def save_public(file: AdapterFile, path: Path) -> None:
    """Write an adapter again, its base model called by its name on the hub or, if it has none, without its folders."""
    names = ("pretrained_model_name_or_path", "base_config")
    training = {
        key: _without_folders(value) if key in names and value else value for key, value in file.training.items()
    }
    save_adapter(
        path,
        SimpleNamespace(config=file.config, state_dict=lambda: file.tensors),
        base_model=replace(file.base_model, name=_without_folders(file.base_model.name)),
        training=training,
        prompts=file.prompts,
    )


def _without_folders(model: str) -> str:
    return model if public_base(model)[0] else Path(model).name
