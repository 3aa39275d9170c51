from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from tiny_families import clip_config, write_sdxl
from tiny_models import randomise
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.bases import SDXL
from gsoft_diffusion.adapters.file import save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig, ExportConfig, SamplerConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import StableDiffusionXL
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.sampling.generation import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture
def model(folder) -> StableDiffusionXL:
    loaded = load_model(str(folder))
    assert isinstance(loaded, StableDiffusionXL)
    return loaded


def pipeline_of(model: StableDiffusionXL, **options: object) -> StableDiffusionXLPipeline:
    parts = {name: getattr(model, name) for name in model.parts()}
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(model: StableDiffusionXL, sampler: SamplerConfig, seed: int = 3) -> np.ndarray:
    (sample,) = generate(model, [("a dog", seed)], sampler)
    return np.asarray(sample.image, dtype=int)


def test_embeddings_are_those_of_the_pipeline(model):
    with torch.no_grad():
        states, _, pooled, _ = pipeline_of(model).encode_prompt(["a dog", "a cat"], do_classifier_free_guidance=False)
        conditioning = model.encode_prompts(["a dog", "a cat"])
    assert torch.equal(conditioning["encoder_hidden_states"], states)
    assert torch.equal(conditioning["text_embeds"], pooled)


@pytest.mark.parametrize("negative", ["", "a cat"])
@pytest.mark.parametrize("force_zeros", [True, False])
def test_same_pictures_as_diffusers_pipeline(model, negative, force_zeros):
    model.index_values["force_zeros_for_empty_prompt"] = force_zeros
    pipeline = pipeline_of(model, force_zeros_for_empty_prompt=force_zeros)
    expected = pipeline(
        "a dog",
        negative_prompt=negative or None,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    drawn = picture(model, SamplerConfig(num_inference_steps=4, guidance_scale=3.0, negative_prompt=negative))
    assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1


def test_an_empty_negative_prompt_is_zeros_if_the_checkpoint_says_so(model):
    assert all(not tensor.any() for tensor in model.encode_negative("").values())
    model.index_values["force_zeros_for_empty_prompt"] = False
    assert all(tensor.any() for tensor in model.encode_negative("").values())


def test_the_view_reaches_the_unet(model):
    """Original size, crop and target size, in the order of diffusers' time ids."""
    seen = {}

    def watch(module, arguments, options) -> None:
        seen.update(options["added_cond_kwargs"])

    model.unet.register_forward_pre_hook(watch, with_kwargs=True)
    views = torch.tensor([[480, 640, 0, 128, 512, 512]])
    with torch.no_grad():
        model.predict(torch.randn(1, 4, 16, 16), torch.tensor([5]), model.encode_prompts(["a dog"]), views)
        plain = pipeline_of(model)._get_add_time_ids((480, 640), (0, 128), (512, 512), torch.float32, 32)
    assert torch.equal(seen["time_ids"], plain)


def test_the_vae_is_float32_in_half_precision(folder):
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert (model.dtype, model.text_encoder_2.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.vae.dtype == torch.float32
    assert picture(model, SamplerConfig(num_inference_steps=2)).shape == (32, 32, 3)


def test_the_adapter_is_in_both_text_encoders_and_the_view_in_the_gradient(model):
    adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
    randomise(adapter, size=0.1)
    views = torch.tensor([[480, 640, 0, 128, 512, 512]])
    model.predict(
        torch.randn(1, 4, 16, 16), torch.tensor([5]), model.encode_prompts(["a dog"]), views
    ).square().mean().backward()
    idle = {name for name, parameter in adapter.named_parameters() if parameter.grad is None}
    # The last layer of the first encoder has no say: the UNet gets the hidden states before it.
    assert {name.rsplit(".", 2)[0] for name in idle} == {"text_encoder.layers.1"}
    assert {name.partition(".")[0] for name, _ in adapter.named_parameters()} == {
        "unet",
        "text_encoder",
        "text_encoder_2",
    }


@pytest.fixture
def own(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "own")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"addition_embed_type": None}, "its UNet is not"),
        ("vae", {"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "its latents are not"),
    ],
)
def test_variants_that_are_computed_differently_are_refused(own, part, change, message):
    path = own / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_model(str(own))


def test_text_encoders_that_do_not_fit_are_refused(own, model):
    CLIPTextModel(clip_config(model.text_encoder.config.vocab_size, hidden_size=16)).save_pretrained(
        own / "text_encoder"
    )
    with pytest.raises(UserError, match="widths add up to 80, but the UNet takes 96"):
        load_model(str(own))


# Exports


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    identity = identity_of(model)
    adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
    randomise(adapter, size=0.2)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, base_model=identity, training={}, prompts={})
    adapter.merge()  # what the exports must come to
    return path


def weights_of(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {f"{part}.{name}": tensor for part in parts for name, tensor in getattr(pipeline, part).state_dict().items()}


@pytest.mark.parametrize("layout", ["diffusers", "checkpoint"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_whole_models_read_back_with_exactly_the_merged_weights(model, folder, adapter, layout, prediction_type):
    own = shutil.copytree(folder, adapter.parent / "base")
    path = own / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction_type}))
    target = export(
        ExportConfig((str(adapter),), layout, precision="float32", pretrained_model_name_or_path=str(own))  # type: ignore[arg-type]
    )
    if layout == "diffusers":
        read = StableDiffusionXLPipeline.from_pretrained(target)
        assert read.config.force_zeros_for_empty_prompt
    else:
        read = StableDiffusionXLPipeline.from_single_file(str(target), config=str(own), local_files_only=True)
    expected, found = weights_of(pipeline_of(model)), weights_of(read)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("prediction_type", "rescale", "marks"),
    [
        ("epsilon", True, set()),
        ("v_prediction", False, {"v_pred"}),
        ("v_prediction", True, {"v_pred", "ztsnr"}),
    ],
)
def test_a_single_file_says_how_the_model_predicts(own, prediction_type, rescale, marks):
    """By empty tensors, as ComfyUI reads them."""
    path = own / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    tensors = load_model(str(own)).original_layout()
    assert {name for name in tensors if "." not in name} == marks
    assert all(tensors[mark].shape == (0,) for mark in marks)


@pytest.mark.parametrize("layout", ["diffusers_lora", "kohya_lora"])
def test_a_lora_of_full_rank_does_what_the_adapter_does(model, folder, adapter, layout):
    sampler = SamplerConfig(num_inference_steps=3, guidance_scale=3.0)
    expected = picture(model, sampler)
    untouched = load_model(str(folder))
    assert isinstance(untouched, StableDiffusionXL)
    assert np.abs(picture(untouched, sampler) - expected).max() > 1
    target = export(
        ExportConfig((str(adapter),), layout, rank=64, precision="float32", pretrained_model_name_or_path=str(folder))
    )  # type: ignore[arg-type]
    pipeline = pipeline_of(untouched)
    pipeline.load_lora_weights(str(target.parent), weight_name=target.name)
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    pipeline.unload_lora_weights()
    found, wanted = weights_of(pipeline), weights_of(pipeline_of(model))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_layers_of_the_published_model():
    """stabilityai/stable-diffusion-xl-base-1.0's configuration on the meta device: 70 transformer blocks, 32 + 12."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        first = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    adapter = inject(AdapterConfig(nblocks=32), unet, [first, second])
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter.named_parameters()}
    layers = {name.rpartition(".")[0] for name in shapes}
    assert sum(name.startswith("unet.") for name in layers) == 70 * 8
    assert sum(name.startswith("text_encoder.") for name in layers) == 12 * 4
    assert sum(name.startswith("text_encoder_2.") for name in layers) == 32 * 4
    block = "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2"
    assert shapes[f"{block}.to_k.q_in"] == (2, 32, 64 * 63 // 2)
    assert shapes[f"{block}.to_k.q_out"] == (2, 32, 40 * 39 // 2)
    assert shapes["text_encoder_2.layers.31.out_proj.output_scale"] == (1280,)
