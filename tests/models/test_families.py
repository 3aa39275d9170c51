"""Every family through a whole life: load → train → save → load → merge → draw, and all ways out.

What each can do is the table in docs/models.md, which
`UPDATE_DOCS=1 python -m pytest tests/models/test_families.py` writes anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import PIXELS
from tiny_families import WRITERS, diffusers_guidance, write_flux
from tiny_models import randomise

from gsoft_diffusion.adapters.file import save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import Adapter, inject
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import AdapterConfig, ExportConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import (
    FAMILIES,
    BaseModel,
    Flux,
    Flux2Dev,
    Flux2Klein,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
    chosen,
)
from gsoft_diffusion.models.families import base as families_base
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.publish.model_card import BASE_PLACE
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.training.progress import read_progress
from gsoft_diffusion.training.train import train

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
COLUMNS = (
    "train",
    "text encoder",
    "save",
    "load",
    "merge",
    "LoRA, diffusers",
    "LoRA, kohya",
    "single file",
)
SAMPLER = SamplerConfig(num_inference_steps=3, guidance_scale=2.0)


def picture(model: BaseModel, width: int = PIXELS, height: int = PIXELS) -> np.ndarray:
    (sample,) = generate(model, [("a dog", 3)], SAMPLER, width=width, height=height)
    return np.asarray(sample.image, dtype=int)


def pipeline_picture(pipeline: diffusers.DiffusionPipeline, width: int = PIXELS, height: int = PIXELS) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompt="a dog",
        num_inference_steps=SAMPLER.num_inference_steps,
        guidance_scale=diffusers_guidance(pipeline, SAMPLER.guidance_scale),
        generator=torch.Generator().manual_seed(3),
        width=width,
        height=height,
    )
    return np.asarray(drawn.images[0], dtype=int)


class Life:
    """One family's steps, in the order of `COLUMNS`; each raises AssertionError, or UserError if it is refused."""

    def __init__(self, family: type[BaseModel], folder: Path, photos: Path) -> None:
        self.family, self.folder, self.photos = family, folder, photos
        self.base = WRITERS[family](folder / "base")

    def train(self) -> None:
        config = TrainingConfig(
            str(self.photos),
            class_word="dog",
            output_dir=str(self.folder / "run"),
            pretrained_model_name_or_path=str(self.base),
            adapter=AdapterConfig(nblocks=4),
            resolution=PIXELS,
            aspect_buckets=True,
            gradient_checkpointing=True,
            max_train_steps=3,
            train_batch_size=2,
            learning_rate=0.3,
            num_validation_images=1,
            validation_prompts=("a dog",),
            validation_loss=True,
            report_to="none",
            sampler=SAMPLER,
        )
        result = train(config)
        assert read_progress(self.folder / "run")[-1].validation_loss is not None
        assert result.steps == 3
        assert (self.folder / "run" / "validation" / "step-000003.png").is_file()
        self.adapter_path = result.adapter

    def text_encoder(self) -> None:
        model = load_model(str(self.base))
        if not model.text_encoders:
            raise UserError("none that can be adapted: its embeddings are cached")
        adapter, _ = load_adapter(self.adapter_path, model.denoiser, model.text_encoders)
        trained = {name.partition(".")[0] for name, value in adapter.named_parameters() if value.abs().max() > 0}
        roots = {
            f"text_encoder{'' if number == 1 else f'_{number}'}" for number in range(1, len(model.text_encoders) + 1)
        }
        assert roots < trained

    def save(self) -> None:
        assert self.adapter_path.stat().st_size > 0

    def load(self) -> None:
        untouched = picture(load_model(str(self.base)))
        self.adapted, self.adapter = self.loaded()
        self.expected = picture(self.adapted)
        assert np.abs(self.expected - untouched).mean() > 1, "the adapter changes nothing"
        assert self.adapter.orthogonality_error() < 1e-5

    def loaded(self) -> tuple[BaseModel, Adapter]:
        model = load_model(str(self.base))
        adapter, _ = load_adapter(self.adapter_path, model.denoiser, model.text_encoders)
        return model, adapter

    def merge(self) -> None:
        target = export(ExportConfig((str(self.adapter_path),), "diffusers", precision="float32"))
        self.adapter.merge()
        assert np.abs(picture(self.adapted) - self.expected).max() <= 1
        assert np.abs(picture(load_model(str(target))) - self.expected).max() <= 1
        pipeline = diffusers.DiffusionPipeline.from_pretrained(target)
        assert type(pipeline).__name__ == self.family.pipeline
        assert np.abs(pipeline_picture(pipeline) - self.expected).max() <= 1

    def lora(self, layout: str) -> None:
        base, adapter, expected = self.base, self.adapter_path, self.expected
        if (self.family, layout) == (Flux, "kohya_lora"):
            # diffusers reads single-stream blocks only in the published width: see test_families_flow.py.
            base = write_flux(self.folder / "double", num_single_layers=0)
            adapter, expected = self.random_adapter(base)
        target = export(ExportConfig((str(adapter),), layout, rank=64, precision="float32"))  # type: ignore[arg-type]
        pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(str(target.parent), weight_name=target.name)
        assert np.abs(pipeline_picture(pipeline) - expected).max() <= 2

    def random_adapter(self, base: Path) -> tuple[Path, np.ndarray]:
        """An adapter for another base, and the picture with it."""
        model = load_model(str(base))
        untouched, identity = picture(model), identity_of(model)
        adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
        randomise(adapter)
        path = self.folder / "random" / "adapter.safetensors"
        path.parent.mkdir()
        save_adapter(path, adapter, base_model=identity, training={}, prompts={})
        expected = picture(model)
        assert np.abs(expected - untouched).mean() > 1, "the adapter changes nothing"
        return path, expected

    def single_file(self) -> None:
        """By the code on the model card, but for the places of file and base."""
        target = export(ExportConfig((str(self.adapter_path),), "checkpoint", precision="float32"))
        code = target.with_suffix(".md").read_text().partition("```python\n")[2].partition("image = ")[0]
        for name, place in ((target.name, target), (BASE_PLACE, self.base)):
            assert f'"{name}"' in code
            code = code.replace(f'"{name}"', repr(str(place)))
        names: dict[str, Any] = {}
        exec(code, names)
        pipeline = names["pipeline"]
        assert type(pipeline).__name__ == self.family.pipeline
        assert np.abs(pipeline_picture(pipeline) - self.expected).max() <= 1

    def row(self) -> list[str]:
        steps: list[Callable[[], None]] = [
            self.train,
            self.text_encoder,
            self.save,
            self.load,
            self.merge,
            lambda: self.lora("diffusers_lora"),
            lambda: self.lora("kohya_lora"),
            self.single_file,
        ]
        return [outcome(step) for step in steps]


def outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except UserError as error:
        return str(error)
    return "pass"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_table_says_what_the_family_can_do(family, tmp_path, photos):
    line = f"| {family.title} | {' | '.join(Life(family, tmp_path, photos).row())} |"
    text = TABLE.read_text(encoding="utf-8")
    (committed,) = [row for row in table_rows() if row.startswith(f"| {family.title} |")]
    if os.environ.get("UPDATE_DOCS"):
        TABLE.write_text(text.replace(committed, line), encoding="utf-8")
    else:
        assert committed == line


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_pictures_that_are_not_square(family, tmp_path):
    base = WRITERS[family](tmp_path / "base")
    model = load_model(str(base))
    found = picture(model, width=2 * PIXELS)
    assert found.shape == (PIXELS, 2 * PIXELS, 3)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    assert np.abs(found - pipeline_picture(pipeline, width=2 * PIXELS)).max() <= 1
    with pytest.raises(UserError, match=f"--height {PIXELS + 2}: must be a multiple of {model.size_step} for"):
        picture(model, height=PIXELS + 2)


def table_rows() -> list[str]:
    """The rows of the table, as they are in the documentation."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| family | {' | '.join(COLUMNS)} |")
    return list(takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))


def test_the_table_has_every_family_and_no_other():
    assert [row.split(" | ")[0] for row in table_rows()] == [f"| {family.title}" for family in FAMILIES]


def test_numbers_that_the_cpu_looks_up_by_are_waited_for(monkeypatch):
    """Before a copy to main memory has arrived, whatever was there is read; a GPU (here: meta) keeps the order."""
    asked = []
    monkeypatch.setattr(families_base, "waits_not", lambda device: device.type == "meta")
    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append((device.type, non_blocking))
        return to(tensor, device, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    conditioning = {"lengths": torch.tensor([3, 5, 7]), "embeddings": torch.empty(3, 2, device="meta")}
    found = chosen(conditioning, torch.tensor([2, 0]))
    assert found["lengths"].tolist() == [7, 3]
    assert found["embeddings"].shape == (2, 2)
    assert asked == [("cpu", False), ("meta", True)]


def test_every_family_has_a_name_a_pipeline_and_parts():
    for family in FAMILIES:
        assert hasattr(diffusers, family.pipeline)
        assert {"scheduler", "vae"} < family.parts().keys()


WRONG = {  # a part's setting that does not go with the other parts
    "sd": (
        StableDiffusion,
        "unet",
        {"class_embed_type": "timestep"},
        "not a text-to-image model like Stable Diffusion",
    ),
    "sdxl": (StableDiffusionXL, "unet", {"addition_time_embed_dim": 3}, "not made for the second text encoder"),
    "sd3 latents": (StableDiffusion3, "transformer", {"patch_size": 4}, "does not take the VAE's latents"),
    "sd3 text": (StableDiffusion3, "transformer", {"joint_attention_dim": 7}, "third text encoder's width is"),
    "sd3 pooled": (
        StableDiffusion3,
        "transformer",
        {"pooled_projection_dim": 7},
        "not made for these CLIP text encoders",
    ),
    "flux latents": (Flux, "transformer", {"in_channels": 7}, "takes more than latents"),
    "flux text": (Flux, "transformer", {"joint_attention_dim": 7}, "but the transformer takes 7"),
    "klein latents": (Flux2Klein, "transformer", {"in_channels": 7}, "does not take the VAE's latents"),
    "klein text": (Flux2Klein, "transformer", {"joint_attention_dim": 7}, "but the transformer takes 7"),
    "klein guidance": (
        Flux2Klein,
        "transformer",
        {"guidance_embeds": True},
        "not a plain FLUX.2 klein: .* is told a guid",
    ),
    "dev guidance": (Flux2Dev, "transformer", {"guidance_embeds": False}, "not a plain FLUX.2 dev: .* is not told"),
    "dev text": (Flux2Dev, "transformer", {"joint_attention_dim": 7}, r"gives 3·16 numbers a token, .* takes 7"),
    "z-image latents": (ZImage, "transformer", {"in_channels": 7}, "does not take the VAE's latents"),
    "z-image text": (ZImage, "transformer", {"cap_feat_dim": 7}, "but the transformer takes 7"),
    "z-image pictures": (ZImage, "transformer", {"siglip_feat_dim": 7}, "its transformer also takes pictures"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_do_not_go_together_are_refused(wrong, tmp_path):
    family, part, changes, message = WRONG[wrong]
    model = load_model(str(WRITERS[family](tmp_path / "base")))
    getattr(model, part).register_to_config(**changes)
    with pytest.raises(UserError, match=message):
        model.check()


def test_min_snr_is_refused_for_flow_matching(tmp_path, photos):
    base = write_flux(tmp_path / "base")
    config = TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(tmp_path / "run"),
        pretrained_model_name_or_path=str(base),
        snr_gamma=5.0,
        report_to="none",
    )
    with pytest.raises(UserError, match=r"--snr_gamma: .* learns by flow matching"):
        train(config)
