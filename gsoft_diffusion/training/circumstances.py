"""Facts besides the settings that decide the training; a checkpoint records them."""

from __future__ import annotations

import hashlib
import os
from itertools import chain
from pathlib import Path
from typing import Any

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.photos.image_files import content
from gsoft_diffusion.training.dataset import DreamBoothDataset

BASE_WEIGHTS = "weights of the base model"  # by their fingerprint


def circumstances(
    config: TrainingConfig, dataset: DreamBoothDataset, identity: BaseModelIdentity, num_processes: int
) -> dict[str, Any]:
    """The number of processes, the base model's fingerprint and a sum of every photo, as they are now.

    config: the run's settings; its `unmasked_weight` says whether masks count.
    dataset: whose photos, subjects' and classes', are summed with their prompts.
    identity: of the base model, before the adapter was put in.
    num_processes: how many train together.

    Returns plain values by the names that `check_unchanged` reports; photos are named `<folder>/<file>`. Raises
    UserError for one that cannot be read any more, as class images may have taken long.
    """
    sums: dict[str, Any] = {}
    for photo in chain(*dataset.streams):
        folder = Path(os.path.abspath(photo.path)).parent.name  # noqa: PTH100 - keeps links
        photo_sum = sums.setdefault(f"{folder}/{photo.path.name}", hashlib.sha256())
        photo_sum.update(content(photo.path))
        if photo.mask and config.unmasked_weight != 1:
            photo_sum.update(content(photo.mask))
        photo_sum.update(photo.prompt.encode())
    photo_sums = {name: photo_sum.hexdigest() for name, photo_sum in sums.items()}
    base = {BASE_WEIGHTS: identity.fingerprint}
    return {"number of processes": num_processes, **base, **photo_sums}
