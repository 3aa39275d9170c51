"""What was learned by GSOFT in one file, and out of it a plain model of transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gsoft
from examples.language.tasks import TASKS
from examples.language.training import Run, Trained, load_model
from gsoft_diffusion.foundation.errors import UserError, user_errors
from gsoft_diffusion.foundation.files import new_places


@user_errors()
def save(trained: Trained, run: Run, path: Path) -> None:
    """Write rotations, head and the task's name into one file.

    trained: by a method of GSOFT's. run: its settings. path: the file; one of that name is replaced. Raises UserError
    if it cannot be written.
    """
    adapter = trained.adapted.adapter
    assert adapter is not None, f"{run.method} has no adapter of this kind"
    gsoft.save(adapter, path, {"task": run.task})


@user_errors()
def load(path: Path, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, gsoft.ModelAdapter]:
    """The base model with the adapter of a file on it, its tokenizer, and the adapter.

    path: what `save` wrote. base: folder or name of the base model; by default the name in the file. Raises UserError
    if the file is not of this kind, or of another base model.
    """
    file = gsoft.read(path)
    name = file.notes.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"{path}: has no task; give an adapter that python -m examples.language.train has made")
    model, tokenizer = load_model(base or file.base_model.name, TASKS[name])
    return model, tokenizer, gsoft.load(path, model)


def merge(path: Path, folder: Path, base: str | None = None) -> None:
    """Write the base model with an adapter merged into it as a plain folder of transformers, with its tokenizer.

    path, base: as for `load`. folder: must not exist. Raises UserError as `load` does, or if it cannot be written.
    """
    with new_places("--output_dir", folder) as (unfinished,):
        model, tokenizer, adapter = load(path, base)
        adapter.merge()
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
