"""What a run's folder holds, and by which names.

adapter.safetensors  the result
settings.yaml        the run's resolved settings
checkpoint-<step>/   see `training/checkpoints.py`
progress.jsonl       loss and time of every step, see `training/progress.py`
validation/          contact sheets; with `score_validation` also `step-<step>/`, every picture and its scores, and the
                     curve of all steps, `curve.csv` and `curve.png`
logs/                what trackers write
images/              pictures that were drawn with the result; of a checkpoint in `checkpoint-<step>/`
hub/                 what `--push_to_hub` has published
README.md            the model card

Exports go beside the result unless they are given another place: `merged/`, `diff.safetensors` and the like, with a
card, a report and a picture of the same name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gsoft_diffusion.foundation.files import numbered

ADAPTER = "adapter.safetensors"  # also in the folder of a checkpoint
SETTINGS = "settings.yaml"
PROGRESS = "progress.jsonl"
CARD = "README.md"
CURVE, CURVE_TABLE = "validation/curve.png", "validation/curve.csv"
SCORES = "scores.json"  # in the folder of a step's validation pictures
METADATA_KEY = "gsoft_diffusion"  # text field of PNGs that this program draws; it holds their settings, as JSON


def run_folder(adapter: Path) -> Path:
    """The folder of the run that wrote the adapter: the one that it is in, or the one around its checkpoint.

    What belongs to the run and is not the checkpoint's goes there, where no rotation deletes it.
    """
    folder = Path(os.path.abspath(adapter)).parent  # noqa: PTH100 - keeps links
    inside = step_of(folder) >= 0 and (folder.parent / SETTINGS).is_file()
    return folder.parent if inside else adapter.parent


def checkpoint_name(adapter: Path) -> str:
    """`checkpoint-<step>` if the adapter is that of a run's checkpoint, else nothing."""
    return "" if run_folder(adapter) == adapter.parent else Path(os.path.abspath(adapter)).parent.name  # noqa: PTH100


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder, -1 if the name is none of a checkpoint."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def sheet_of(folder: Path, step: int, number: int = 1) -> Path:
    """The path of a run's contact sheet, which need not exist.

    folder: the run's. step: after which it was drawn. number: which of the step's sheets, from 1.
    """
    return folder / "validation" / numbered(f"step-{step:06d}.png", number)


def pictures_of(folder: Path, step: int) -> Path:
    """The folder of a run's validation pictures, one by one, which need not exist.

    folder: the run's. step: after which they were drawn; 0 for the base model's.
    """
    return folder / "validation" / f"step-{step:06d}"


def scored_steps(folder: Path) -> list[int]:
    """The steps of which a run's folder has scores, in order; 0 is the base model's."""
    found = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in (folder / "validation").glob(f"*/{SCORES}"))
    return sorted(int(match[1]) for match in found if match)


def latest_sheet(folder: Path, step: int | None = None) -> Path | None:
    """The last contact sheet that a run has drawn with its adapter; of several the first. None if there is none.

    folder: the run's. step: leave out sheets of later steps; None for all.
    """
    found = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in (folder / "validation").glob("step-*.png"))
    sheets = {int(match[1]): path for match, path in found if match}
    return max(
        ((at, path) for at, path in sheets.items() if at > 0 and (step is None or at <= step)), default=(0, None)
    )[1]
