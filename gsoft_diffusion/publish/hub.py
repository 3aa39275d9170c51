"""Publishing a run's result on the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.hub_access import why_unreachable
from gsoft_diffusion.foundation.run_folder import CARD, latest_sheet

PACKAGE = "hub"  # folder for exactly what is published, in the run's


class HubRepository:
    """A model's repository on the hub, which exists once this is made."""

    def __init__(self, model_id: str, token: str | None = None) -> None:
        """Creates the repository if there is none, so that a mistake is found before the training.

        model_id: name, with or without an owner.
        token: by default the one `hf auth login` has kept, or HF_TOKEN.

        Raises UserError if the hub does not answer, or refuses.
        """
        if silent := why_unreachable():  # its client would wait for an answer without end
            raise UserError(
                f"--hub_model_id {model_id}: cannot be created or written on the hub ({silent}); check the network, or "
                "leave --push_to_hub out"
            )
        self._api = HfApi(token=token)
        try:
            self.id = self._api.create_repo(model_id, exist_ok=True).repo_id
        except Exception as error:  # of the network, of the hub, of their libraries
            raise UserError(
                f"--hub_model_id {model_id}: cannot be created or written on the hub ({first_line(error)}); "
                "log in with `hf auth login`, or give --hub_token"
            ) from error

    def publish(self, run: Path, adapter: str) -> str:
        """Upload a run's adapter with its card and last sheet; returns the address.

        run: the run's folder. adapter: name of the adapter's file in it.

        Raises UserError that says how to try again if it fails: nothing on disk depends on it.
        """
        package, files = make_package(run, adapter)
        try:
            commit = self._api.upload_folder(
                repo_id=self.id, folder_path=package, allow_patterns=files, commit_message="Upload an adapter"
            )
        except Exception as error:
            raise UserError(
                f"the result is in {run}, but could not be uploaded ({first_line(error)}); "
                f"to try again: hf upload {self.id} {package}"
            ) from error
        return str(commit.repo_url)


def make_package(run: Path, adapter: str) -> tuple[Path, list[str]]:
    """Collect the files to publish in `<run>/hub`; returns that folder and the files' names in it.

    run: the run's folder. adapter: name of the adapter's file in it.

    The sheets of earlier packages are deleted; whatever else someone has put there stays, and stays here. Raises
    UserError if it cannot be written.
    """
    package = run / PACKAGE
    sheet = latest_sheet(run, read_adapter(run / adapter).step)
    files = [run / CARD, run / adapter, *([sheet] if sheet else [])]
    names = [file.relative_to(run).as_posix() for file in files]
    try:
        while (old := latest_sheet(package)) is not None:
            old.unlink()
        for file, name in zip(files, names, strict=True):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, package / name)
    except OSError as error:
        raise UserError(f"cannot write {package}: {first_line(error)}") from error
    return package, names
