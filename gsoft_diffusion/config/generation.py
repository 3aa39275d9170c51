"""All settings of drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from gsoft_diffusion.config.sampler import NEGATIVE_PROMPT_RULE
from gsoft_diffusion.config.settings import (
    BELOW_2_TO_63,
    NOT_NEGATIVE,
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


@dataclass(frozen=True)
class GenerationConfig(Settings):
    """All settings of drawing.

    adapter: adapter file that training wrote, or the folder of a run or of a checkpoint; several for the same base
      model act in this order.
    strength: strength of each adapter, from 0 (the base model) to 1 (as trained); by default 1.
    prompts: prompts to draw, with the subject's name from the training, such as "a sks dog" or "a {0} {1}".
    prompts_file: text file with one prompt a line, instead of prompts; a line that starts with # is a comment;
      `{0} {1}` stands for the subject's name, and `{2} {3}` for that of a second one.
    num_images: pictures for each prompt.
    seed: seed of each prompt's first picture; the following ones count upwards from it.
    num_inference_steps: denoising steps; by default as in the adapter's training.
    guidance_scale: weight of classifier-free guidance; 1 or less switches it off; by default as in the adapter's
      training.
    negative_prompt: what guidance steers pictures away from; by default as in the adapter's training.
    scheduler: a diffusers scheduler class such as DDIMScheduler; by default as in the adapter's training.
    resolution: side in pixels of square pictures; by default as in the adapter's training.
    width: width in pixels of pictures that are not square; by default the resolution.
    height: height in pixels of pictures that are not square; by default the resolution.
    batch_size: pictures drawn at a time; changes speed and memory, not the pictures.
    output_dir: folder for the pictures; by default `images` in the run's folder, or `images/checkpoint-<step>` there
      for a checkpoint's adapter.
    compare: draw the untouched base model's picture with the same seed beside each.
    side_by_side: draw with each of several adapters by itself, such as a run's checkpoints, instead of with all
      together.
    pretrained_model_name_or_path: where the base model is now, if it has moved since training.
    variant: variant of the base model's weight files, such as fp16; by default as in training, where there are such
      files.
    base_config: for a base model in a .safetensors file, the diffusers folder or model on the hub that has its
      configuration; by default as in training, or the usual one of its kind.
    accept_other_base: take a base model with other weights than the adapter was trained on, such as a fine-tune of it;
      says how far away they are.
    mixed_precision: type of weights and activations; by default as in the adapter's training.
    compile: fuse the denoiser's operations with torch.compile; the first picture takes minutes.
    cpu_offload: keep VAE and text encoders in main memory while they are not in use; the pictures stay the same.
    offload_layers: keep the denoiser's layers that no adapter uses in main memory, and copy each to the GPU while it
      computes: slower; the pictures stay the same.
    device: cpu, cuda, cuda:1, mps; by default a GPU if there is one.
    """

    adapter: Annotated[tuple[str, ...], Mark.PATH]
    strength: tuple[float, ...] = ()
    prompts: tuple[str, ...] = ()
    prompts_file: Annotated[str | None, Mark.PATH] = None
    num_images: Annotated[int, POSITIVE] = 4
    seed: Annotated[int, NOT_NEGATIVE, BELOW_2_TO_63] = 0
    num_inference_steps: Annotated[int | None, POSITIVE] = None
    guidance_scale: Annotated[float | None, NOT_NEGATIVE] = None
    negative_prompt: str | None = None
    scheduler: str | None = None
    resolution: Annotated[int | None, POSITIVE] = None
    width: Annotated[int | None, POSITIVE] = None
    height: Annotated[int | None, POSITIVE] = None
    batch_size: Annotated[int, POSITIVE] = 4
    output_dir: Annotated[str | None, Mark.PATH] = None
    compare: bool = False
    side_by_side: bool = False
    pretrained_model_name_or_path: Annotated[str | None, Mark.PATH] = None
    variant: str | None = None
    base_config: Annotated[str | None, Mark.PATH] = None
    accept_other_base: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    compile: bool = False
    cpu_offload: bool = False
    offload_layers: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        settle_paths(self)
        strength_by_adapter(self.adapter, self.strength)
        if self.prompts and self.prompts_file:
            raise UserError("--prompt and --prompts_file: give only one of them")
        check_rules(self)
        refuse_without_effect(self, [NEGATIVE_PROMPT_RULE, *_REFUSED])

    @property
    def strengths(self) -> dict[str, float]:
        """The adapters with their strengths, in their order."""
        return strength_by_adapter(self.adapter, self.strength)


_REFUSED = (
    OnlyWith(
        ("side_by_side",),
        lambda settings: len(settings.adapter) > 1,
        "there is one adapter; give several, or leave it out",
    ),
    OnlyWith(
        ("resolution",),
        lambda settings: not (settings.width and settings.height),
        "--width and --height are given; leave it out",
    ),
    OnlyWith(
        ("compare",),
        lambda settings: any(settings.strengths.values()),
        "at --strength 0 both pictures are the base model's; leave one of the two out",
    ),
)
