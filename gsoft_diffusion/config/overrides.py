"""Training settings of a file with flags on top: what follows from others in the file follows from the flags' anew.

A run's `settings.yaml` has every setting, those as well that were derived from others or decided by the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE, lasting_name

DERIVED = ("validation_prompts", "class_prompt", "instance_prompt", "unique_token")  # each of what comes after it
BASE = "pretrained_model_name_or_path"
DECIDED_BY_BASE = (
    "resolution",
    "max_train_steps",
    "learning_rate",
    "text_encoder_lr",
    "adapter.nblocks",
    "adapter.block_size",
    "sampler.guidance_scale",
    "sampler.scheduler",
)


def left_to_flags(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings without those that are derived from others in it, and those that flags leave without effect.

    values: the file's. flags: by the names of fields, with `<group>.` before those of a group.
    """
    left = dict(values)
    for name in DERIVED:
        with suppress(UserError):  # the settings are not whole without it, or not without the flags
            fewer = {other: value for other, value in left.items() if other != name}
            if TrainingConfig.from_dict(fewer).resolved() == TrainingConfig.from_dict(left).resolved():
                left = fewer
    prodigy = flags.get("optimizer", values.get("optimizer")) == "prodigy"
    one_rate = prodigy and not flags.keys().isdisjoint(("optimizer", "learning_rate"))
    if one_rate or flags.get("adapter.text_encoder") is False:
        left.pop("text_encoder_lr", None)
    return left


def kept_from_another_base(values: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """The names of the settings that a file has for its base model, if flags name another and leave them as they are.

    values, flags: as in `left_to_flags`.
    """
    before = values.get(BASE, BUNDLED_BASE)
    if lasting_name(flags.get(BASE, before)) == lasting_name(before):
        return []
    sizes = {"adapter.nblocks", "adapter.block_size"}  # of which one replaces the other
    given = flags.keys() | (sizes if sizes & flags.keys() else set())
    kept = [name for name in DECIDED_BY_BASE if name not in given and _value(values, name) is not None]
    return [name.rpartition(".")[2] for name in kept]


def _value(values: Mapping[str, Any], name: str) -> Any:
    group, _, field = name.rpartition(".")
    inside = values.get(group) if group else values
    return inside.get(field) if isinstance(inside, Mapping) else None
