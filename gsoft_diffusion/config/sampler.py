"""The settings by which a picture is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from gsoft_diffusion.config.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    OnlyWith,
    Settings,
    check_rules,
    refuse_without_effect,
)


def guides(guidance_scale: float) -> bool:
    """Whether a guidance scale switches classifier-free guidance on; by the rule of diffusers' pipelines."""
    return guidance_scale > 1


NEGATIVE_PROMPT_RULE = OnlyWith(
    ("negative_prompt",),
    lambda settings: not settings.negative_prompt or settings.guidance_scale is None or guides(settings.guidance_scale),
    "guidance is off; give a --guidance_scale above 1, or leave it out",
)


@dataclass(frozen=True)
class SamplerConfig(Settings):
    """How a picture is drawn, apart from its prompt, its seed and the model.

    num_inference_steps: denoising steps.
    guidance_scale: weight of classifier-free guidance; 1 or less switches it off; by default 5; 3 on a miniature base,
      3.5 on FLUX.1 dev, 4 on FLUX.2, 1 on models that were distilled to draw without.
    negative_prompt: what guidance steers pictures away from.
    scheduler: a diffusers scheduler class such as DDIMScheduler; by default the base model's own.
    """

    num_inference_steps: Annotated[int, POSITIVE] = 30
    guidance_scale: Annotated[float | None, NOT_NEGATIVE] = None
    negative_prompt: str = ""
    scheduler: str | None = None

    def __post_init__(self) -> None:
        check_rules(self)
        refuse_without_effect(self, [NEGATIVE_PROMPT_RULE])
