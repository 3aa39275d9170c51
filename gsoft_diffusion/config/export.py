"""All settings of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gsoft_diffusion.config.settings import (
    POSITIVE,
    Mark,
    OnlyWith,
    Settings,
    check_rules,
    refuse_without_effect,
    settle_paths,
)
from gsoft_diffusion.config.strengths import strength_by_adapter
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import checkpoint_name, run_folder

DEFAULT_RANK = 64


@dataclass(frozen=True)
class ExportConfig(Settings):
    """All settings of an export.

    adapter: adapter file that training wrote, or the folder of a run or of a checkpoint; several for the same base
      model act in this order.
    format: diffusers (a folder) and checkpoint (one file with Stable Diffusion's original keys) are the whole model
      with the adapter merged in; diffusers_lora and kohya_lora are small files that approximate it; diff is the whole
      change of every layer, large, and at strength 1 exact but for rounding; ComfyUI and Forge add it.
    strength: strength of each adapter, from 0 (the base model) to 1 (as trained); by default 1.
    output: folder or file to write, which must not exist yet; by default in the run's folder, named after the format
      and, if there is one, the checkpoint.
    rank: rank of a LoRA, 64 by default; a higher rank is nearer to the adapter.
    precision: type of the numbers written.
    pretrained_model_name_or_path: where the base model is now, if it has moved since training.
    variant: variant of the base model's weight files, such as fp16; by default as in training, where there are such
      files.
    base_config: for a base model in a .safetensors file, the diffusers folder or model on the hub that has its
      configuration; by default as in training, or the usual one of its kind.
    accept_other_base: take a base model with other weights than the adapter was trained on, such as a fine-tune of it;
      says how far away they are.
    """

    adapter: Annotated[tuple[str, ...], Mark.PATH]
    format: Literal["diffusers", "checkpoint", "diffusers_lora", "kohya_lora", "diff"]
    strength: tuple[float, ...] = ()
    output: Annotated[str | None, Mark.PATH] = None
    rank: Annotated[int | None, POSITIVE] = None
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    pretrained_model_name_or_path: Annotated[str | None, Mark.PATH] = None
    variant: str | None = None
    base_config: Annotated[str | None, Mark.PATH] = None
    accept_other_base: bool = False

    def __post_init__(self) -> None:
        settle_paths(self)
        if not any(strength_by_adapter(self.adapter, self.strength).values()):
            raise UserError("--strength 0: would give the base model itself; there is nothing to export")
        check_rules(self)
        refuse_without_effect(self, [_RANK])
        if self.output and (self.format == "diffusers") == self.output.endswith(".safetensors"):
            wanted = "is a folder" if self.format == "diffusers" else "must end in .safetensors"
            raise UserError(f"--output {self.output}: {wanted} with --format {self.format}")

    @property
    def strengths(self) -> dict[str, float]:
        """The adapters with their strengths, in their order."""
        return strength_by_adapter(self.adapter, self.strength)

    @property
    def is_lora(self) -> bool:
        """Whether the format is a LoRA's."""
        return self.format.endswith("_lora")

    @property
    def is_change(self) -> bool:
        """Whether the format holds the change of the weights, and not a whole model."""
        return self.is_lora or self.format == "diff"


def default_output(adapter: Path, layout: str, rank: int, made_of: str | None = None) -> Path:
    """Where an export goes by default: in the run's folder, named after the format and what it was made of.

    adapter: the file. layout: the format. rank: of a LoRA. made_of: ends the name; by default the checkpoint, if the
    adapter is that of one.
    """
    stem = {"diffusers": "merged", "checkpoint": "merged", "diff": "diff"}.get(layout, f"{layout}_rank{rank}")
    made_of = checkpoint_name(adapter) if made_of is None else made_of
    end = "" if layout == "diffusers" else ".safetensors"
    return run_folder(adapter) / f"{stem}{f'_{made_of}' if made_of else ''}{end}"


_RANK = OnlyWith(
    ("rank",),
    lambda settings: settings.is_lora,
    "it is for LoRAs; give a --format that is one, or leave it out",
)
