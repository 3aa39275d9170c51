"""SD3, FLUX.1, FLUX.2 and Z-Image: what the life of every family (test_families.py) does not show."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import PIXELS
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from tiny_families import WRITERS, diffusers_guidance, write_flux, write_flux2_klein, write_sd3, write_z_image
from tiny_models import randomise

from benchmarks.bases import PUBLISHED
from gsoft_diffusion.adapters.injection import find_attentions, find_linears, inject
from gsoft_diffusion.config import AdapterConfig, SamplerConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import Flux, Flux2Dev, Flux2Klein, StableDiffusion3, ZImage, whole_view
from gsoft_diffusion.models.families.flux import pack, unpack
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.low_rank import LoraLayer, by_module, diffusers_tensors, kohya_tensors
from gsoft_diffusion.publish.tensor_files import write_tensors
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.sampling.schedulers import with_model_sampler

FAMILIES = (StableDiffusion3, Flux, Flux2Klein, Flux2Dev, ZImage)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def folder(request, tmp_path_factory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("flow") / "base")


def picture(model, sampler: SamplerConfig) -> np.ndarray:
    (sample,) = generate(model, [("a dog", 3)], sampler, resolution=PIXELS)
    return np.asarray(sample.image, dtype=int)


def pipeline_picture(folder: Path, guidance_scale: float, **settings: object) -> np.ndarray:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings |= {"width": PIXELS, "height": PIXELS, "generator": torch.Generator().manual_seed(3)}
    guidance_scale = diffusers_guidance(pipeline, guidance_scale)
    return np.asarray(pipeline(prompt="a dog", guidance_scale=guidance_scale, **settings).images[0], dtype=int)


def test_same_pictures_as_diffusers_pipeline(folder):
    found = picture(load_model(str(folder)), SamplerConfig(num_inference_steps=3, guidance_scale=2.5))
    assert np.abs(found - pipeline_picture(folder, num_inference_steps=3, guidance_scale=2.5)).max() <= 1


@pytest.mark.parametrize(
    ("write", "options"),
    [(write_flux, {"guidance_embeds": False}), (write_flux2_klein, {"is_distilled": True})],
    ids=["schnell", "distilled klein"],
)
def test_distilled_models_are_drawn_without_guidance(tmp_path, write, options, caplog):
    base = write(tmp_path / "base", **options)
    model = load_model(str(base))
    found = picture(model, SamplerConfig(num_inference_steps=2, guidance_scale=5.0))
    assert (found == picture(model, SamplerConfig(num_inference_steps=2, guidance_scale=1.0))).all()
    assert "the guidance scale has no effect" in caplog.text
    caplog.clear()
    picture(model, SamplerConfig(num_inference_steps=2, negative_prompt="a cat"))
    assert "the negative prompt has no effect" in caplog.text
    assert np.abs(found - pipeline_picture(base, num_inference_steps=2, guidance_scale=1.0)).max() <= 1


@pytest.mark.parametrize("family", [Flux, Flux2Klein, Flux2Dev], ids=lambda family: family.__name__)
def test_the_usual_guidance_is_that_of_diffusers_pipeline(tmp_path, family):
    model = load_model(str(WRITERS[family](tmp_path / "base")))
    usual = inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters["guidance_scale"].default
    assert with_model_sampler(model, SamplerConfig()).guidance_scale == usual


def test_z_image_turbo_is_drawn_without_guidance_unless_it_is_asked_for(tmp_path):
    """Only its scheduler tells it from the base model, so guidance can still be had."""
    turbo, base = (load_model(str(write_z_image(tmp_path / f"{shift}", shift=shift))) for shift in (3.0, 6.0))
    found = picture(turbo, SamplerConfig(num_inference_steps=2))
    assert (found == picture(turbo, SamplerConfig(num_inference_steps=2, guidance_scale=1.0))).all()
    assert np.abs(found - pipeline_picture(tmp_path / "3.0", num_inference_steps=2, guidance_scale=1.0)).max() <= 1
    assert (found != picture(turbo, SamplerConfig(num_inference_steps=2, guidance_scale=5.0))).any()
    with pytest.raises(UserError, match="--negative_prompt would have no effect: guidance is off"):
        picture(turbo, SamplerConfig(num_inference_steps=2, negative_prompt="a cat"))
    usual = picture(base, SamplerConfig(num_inference_steps=2))
    assert (usual == picture(base, SamplerConfig(num_inference_steps=2, guidance_scale=5.0))).all()


def test_z_images_prompts_keep_their_lengths_in_a_batch(tmp_path):
    """Of each other they change rounding only, though they are of 1 and 3 times the length that is filled up to."""
    model = load_model(str(write_z_image(tmp_path / "base")))
    prompts = ["a dog", ", ".join(["a dog on a beach"] * 9)]
    conditioning = model.encode_prompts(prompts)
    short, long = conditioning["lengths"].tolist()
    assert short < 32 < 64 < long
    latents = torch.randn(2, *model.latent_shape(PIXELS))
    times, views = torch.tensor([900.0, 100.0]), whole_view(PIXELS, PIXELS).repeat(2, 1)
    together = model.predict(latents, times, conditioning, views)
    for at, prompt in enumerate(prompts):
        one = slice(at, at + 1)
        alone = model.predict(latents[one], times[one], model.encode_prompts([prompt]), views[one])
        torch.testing.assert_close(together[one], alone)
        other = model.predict(latents[one], times[one], model.encode_prompts(["a cat"]), views[one])
        assert (alone - other).abs().max() > 1e-3


def test_z_image_has_positions_for_pictures_of_some_size_only(tmp_path):
    model = load_model(str(write_z_image(tmp_path / "base")))
    with pytest.raises(UserError, match="--width 260: must be 256 or less"):
        list(generate(model, [("a dog", 3)], SamplerConfig(num_inference_steps=2), width=260, height=PIXELS))


def test_z_images_single_file_has_the_original_names(tmp_path):
    """Those that ComfyUI asks for, and diffusers' own conversion takes it back to what it was."""
    model = load_model(str(write_z_image(tmp_path / "base")))
    tensors = model.original_layout()
    assert {name.partition(".")[0] for name in tensors} == {"model", "vae", "text_encoders"}
    fused = tensors["model.diffusion_model.layers.2.attention.qkv.weight"]
    attention = model.transformer.layers[2].attention
    assert torch.equal(fused, torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]))
    assert "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj.weight" in tensors
    denoiser = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    back, wanted = convert_z_image_transformer_checkpoint_to_diffusers(denoiser), model.transformer.state_dict()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)
    write_tensors(tmp_path / "whole.safetensors", tensors, {})
    vae = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "whole.safetensors"), config=str(tmp_path / "base"), subfolder="vae", local_files_only=True
    )
    assert all(map(torch.equal, vae.state_dict().values(), model.vae.state_dict().values()))


def test_sd3_has_positions_for_pictures_of_some_size_only(tmp_path):
    model = load_model(str(write_sd3(tmp_path / "base")))
    with pytest.raises(UserError, match="--width 196: must be 192 or less"):
        list(generate(model, [("a dog", 3)], SamplerConfig(num_inference_steps=2), width=196, height=PIXELS))


def test_latents_come_back_from_the_vae_as_diffusers_has_them(folder):
    """Scaled and shifted, or patched and normalised: decoding undoes exactly what sampling does."""
    model = load_model(str(folder))
    latents = torch.randn(1, *model.latent_shape(PIXELS))
    raw = []
    model.vae.decode = lambda z: raw.append(z) or SimpleNamespace(sample=z)
    model.decode(latents)
    moments = torch.cat([raw[0], torch.zeros_like(raw[0])], dim=1)
    torch.testing.assert_close(model.sample_latents(moments, torch.zeros_like(latents)), latents)


def test_every_trained_layer_gets_a_gradient_with_checkpointing(folder):
    model = load_model(str(folder))
    config = AdapterConfig(nblocks=4, text_encoder=bool(model.text_encoders))
    adapter = inject(config, model.denoiser, model.text_encoders)
    randomise(adapter, size=0.1)

    def gradients() -> dict[str, torch.Tensor | None]:
        adapter.zero_grad()
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, *model.latent_shape(PIXELS, 2 * PIXELS), generator=generator)
        conditioning = model.encode_prompts(["a dog", "a cat"])
        views = whole_view(PIXELS, 2 * PIXELS).repeat(2, 1)
        prediction = model.predict(latents, torch.tensor([900.0, 100.0]), conditioning, views)
        assert prediction.shape == latents.shape
        prediction.square().mean().backward()
        return {name: parameter.grad for name, parameter in adapter.named_parameters()}

    model.denoiser.train()
    plain = gradients()
    model.denoiser.enable_gradient_checkpointing()
    checkpointed = gradients()
    for name, gradient in plain.items():
        if gradient is None:  # the last layers of CLIP that nobody reads
            assert name.startswith("text_encoder"), name
        else:
            torch.testing.assert_close(checkpointed[name], gradient)


def test_removing_the_adapter_gives_the_model_back(folder):
    model = load_model(str(folder))
    conditioning = model.encode_prompts(["a dog"])
    latents, views = torch.randn(1, *model.latent_shape(PIXELS)), whole_view(PIXELS, PIXELS)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model.predict(latents, torch.tensor([500.0]), conditioning, views)

    before, layers = run(), [type(module) for module in model.denoiser.modules()]
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), model.denoiser)
    assert torch.equal(run(), before)
    randomise(adapter)
    assert not torch.allclose(run(), before, atol=1e-3)
    adapter.remove()
    assert torch.equal(run(), before)
    assert [type(module) for module in model.denoiser.modules()] == layers


@pytest.mark.parametrize(
    "scheduler",
    [
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_a_perfect_model_draws_its_picture(folder, scheduler):
    model = load_model(str(folder))
    clean = torch.randn(1, *model.latent_shape(PIXELS), generator=torch.Generator().manual_seed(1))
    model.predict = lambda noisy, timestep, *rest: (noisy - clean) / (timestep / 1000)
    found = picture(model, SamplerConfig(num_inference_steps=10, guidance_scale=1.0, scheduler=scheduler))
    wanted = ((model.decode(clean)[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(found - wanted).mean() < 2


def test_packing_is_that_of_the_pipeline():
    latents = torch.randn(2, 4, 6, 8)
    packed = pack(latents)
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(packed, 6, 8), latents)


@pytest.mark.parametrize("rank", [4, 3])
def test_kohya_loras_of_flux_are_read_in_the_published_width(rank):
    """By diffusers' converter, which knows that width only: every layer's change comes back, and no other's."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    model = object.__new__(Flux)
    model.transformer = transformer
    generator = torch.Generator().manual_seed(0)
    linears = find_linears(find_attentions(transformer), {})
    layers = [
        LoraLayer(name, 1, 1, 0, *(torch.randn(shape, generator=generator) for shape in ((3072, rank), (rank, 3072))))
        for name in linears
    ]
    modules = by_module(layers, linears)
    tensors = kohya_tensors(modules, model.kohya_place)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * 3072, 3 * rank)
    assert tensors["lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight"].shape == (3 * rank, 3072)
    read, wanted = diffusers.FluxPipeline.lora_state_dict(tensors), diffusers_tensors(modules)
    modules = {name.removesuffix(".lora_A.weight") for name in read if name.endswith(".lora_A.weight")}
    rest = "transformer.single_transformer_blocks.0.proj_mlp"
    assert modules == {name.removesuffix(".lora_A.weight") for name in wanted if "lora_A" in name} | {rest}
    probe = torch.randn(3072, 2, generator=generator)
    for module in modules - {rest}:
        down, up = (read[f"{module}.lora_{side}.weight"] for side in "AB")
        wanted_down, wanted_up = (wanted[f"{module}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(up @ (down @ probe), wanted_up @ (wanted_down @ probe), rtol=1e-4, atol=1e-2)
    assert not read[f"{rest}.lora_B.weight"].any()


# The published models, on their configurations without weights.

QUERIES = ("to_q", "to_k", "to_v", "to_out")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LAST = ("add_k_proj", "add_v_proj")  # of the last block of SD3: nothing goes back to the text


def sd3_layers(blocks: int, dual: int = 0) -> set[str]:
    joint = {f"{n}.attn.{name}" for n in range(blocks) for name in QUERIES + (TEXT if n < blocks - 1 else LAST)}
    return {f"transformer_blocks.{name}" for name in joint} | {
        f"transformer_blocks.{n}.attn2.{name}" for n in range(dual) for name in QUERIES
    }


def flux_layers(double: int, single: int, of_single: Sequence[str] = QUERIES[:3]) -> set[str]:
    return {f"transformer_blocks.{n}.attn.{name}" for n in range(double) for name in QUERIES + TEXT} | {
        f"single_transformer_blocks.{n}.attn.{name}" for n in range(single) for name in of_single
    }


def z_image_layers(refiner: int, main: int) -> set[str]:
    blocks = {"noise_refiner": refiner, "context_refiner": refiner, "layers": main}
    return {f"{part}.{n}.attention.{name}" for part, count in blocks.items() for n in range(count) for name in QUERIES}


@pytest.mark.parametrize(
    ("name", "numbers", "layers", "width"),
    [
        ("Stable Diffusion 3 medium", 2_084_951_104, sd3_layers(24), 1536),
        ("Stable Diffusion 3.5 medium", 2_469_663_936, sd3_layers(24, dual=13), 1536),
        ("Stable Diffusion 3.5 large", None, sd3_layers(38), 2432),
        ("FLUX.1 dev", 11_901_408_320, flux_layers(19, 38), 3072),
        ("FLUX.2 klein 4B", 3_875_544_576, flux_layers(5, 20, QUERIES), 3072),
        ("FLUX.2 klein 9B", 9_078_581_248, flux_layers(8, 24, QUERIES), 4096),
        ("FLUX.2 dev", None, flux_layers(8, 48, QUERIES), 6144),
        ("Z-Image", 6_154_908_736, z_image_layers(2, 30), 3840),
    ],
)
def test_layers_of_the_published_models(name, numbers, layers, width):
    """`numbers` is how many are in the transformer's published weights, where that is known."""
    transformer, _ = PUBLISHED[name].networks()
    assert numbers in (None, sum(tensor.numel() for tensor in transformer.state_dict().values()))
    adapter = inject(AdapterConfig(nblocks=32, text_encoder=False), transformer)
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter.named_parameters()}
    assert {name.rpartition(".")[0] for name in shapes} == {f"transformer.{layer}" for layer in layers}
    size = width // 32
    assert {shape for name, shape in shapes.items() if "q_" in name.rpartition(".")[2]} == {
        (2, 32, size * (size - 1) // 2)
    }
    assert {shape for name, shape in shapes.items() if name.endswith("output_scale")} == {(width,)}
