"""Tiny checkpoints with random weights of every family: the real configurations, scaled down.

Source of all that is not a size: the configuration files on the hub of stabilityai/stable-diffusion-xl-base-1.0 and
stable-diffusion-3.5-medium, black-forest-labs/FLUX.1-dev, FLUX.1-schnell, FLUX.2-klein-base-4B and FLUX.2-klein-4B,
Tongyi-MAI/Z-Image and Z-Image-Turbo, and Qwen/Qwen3-4B (read in copies, for some ask to accept a licence);
diffusers' scripts/convert_*_to_diffusers.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import PIXELS, TEXT_LENGTH, write_base, write_tokenizer
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from tiny_models import randomise
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.families import (
    BaseModel,
    Flux,
    Flux2Dev,
    Flux2Klein,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
    whole_view,
)


def write_parts(folder: Path, pipeline: str, parts: dict[str, Any], **options: object) -> Path:
    """Write models and scheduler, and the index of them and of the tokenizers that are there already."""
    index: dict[str, object] = {"_class_name": pipeline, **options}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    for path in folder.glob("tokenizer*"):
        if path.name in index:  # a processor
            continue
        index[path.name] = ["transformers", json.loads((path / "tokenizer_config.json").read_text())["tokenizer_class"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def clip_config(vocabulary: int, **changes: object) -> CLIPTextConfig:
    """With the token numbers that the published files have, which are not the tokenizer's: 2 has come to mean the
    largest number for the end.
    """
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return CLIPTextConfig(**(config | changes))


def tiny_vae(**changes: object) -> AutoencoderKL:
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": PIXELS,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**(config | changes))


def write_sdxl(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Two text encoders of which the second has another width and padding, no attention on the first level."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    parts = {
        "text_encoder": CLIPTextModel(clip_config(vocabulary)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(vocabulary, hidden_size=64, hidden_act="gelu")),
        "vae": tiny_vae(force_upcast=True),
        "unet": UNet2DConditionModel(
            sample_size=PIXELS // 2,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            norm_num_groups=8,
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=96,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }
    return write_parts(folder, "StableDiffusionXLPipeline", parts, force_zeros_for_empty_prompt=True)


def write_t5_tokenizer(folder: Path) -> int:
    """Write a T5 tokenizer that knows single letters; returns the vocabulary's size."""
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,"]
    tokenizer = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    return tokenizer.get_vocab_size()


def tiny_t5(vocabulary: int, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def write_sd3(folder: Path) -> Path:
    """As 3.5 medium: normalised queries, dual attention in the first block; 16 latent channels with a shift.

    The first text encoder's projection is the identity, which is what diffusers takes for it in any single file.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    parts = {
        "text_encoder": CLIPTextModelWithProjection(clip_config(vocabulary)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(vocabulary, hidden_size=64, hidden_act="gelu")),
        "text_encoder_3": tiny_t5(write_t5_tokenizer(folder / "tokenizer_3"), 128),
        "vae": tiny_vae(latent_channels=16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        "transformer": SD3Transformer2DModel(
            sample_size=PIXELS // 2,
            patch_size=2,
            in_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=128,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=48,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    torch.nn.init.eye_(parts["text_encoder"].text_projection.weight)
    return write_parts(folder, "StableDiffusion3Pipeline", parts)


def write_flux(folder: Path, *, guidance_embeds: bool = True, num_single_layers: int = 2) -> Path:
    """As dev: told its guidance, timesteps shifted by the picture's size. As schnell without guidance."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    parts = {
        "text_encoder": CLIPTextModel(clip_config(vocabulary)),
        "text_encoder_2": tiny_t5(write_t5_tokenizer(folder / "tokenizer_2"), 32),
        "vae": tiny_vae(shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=num_single_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(**(dynamic if guidance_embeds else {})),
    }
    return write_parts(folder, "FluxPipeline", parts)


def write_chat_tokenizer(folder: Path, tokenizer_class: str, **settings: object) -> int:
    """Write a tokenizer of single letters with a template for chats; returns the vocabulary's size."""
    vocabulary = write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class, "model_max_length": 512}
    path.write_text(json.dumps(known | settings))
    return vocabulary


def write_qwen_tokenizer(folder: Path) -> int:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %} ->"
    return write_chat_tokenizer(folder, "Qwen2Tokenizer", chat_template=template)


def tiny_qwen(vocabulary: int, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )


def tiny_flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=PIXELS,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def tiny_flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        mlp_ratio=3.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    with torch.no_grad():  # random blocks that matter, though they are few
        for block in transformer.transformer_blocks:
            block.attn.to_v.weight *= 5
            block.attn.to_out[0].weight *= 5
    return transformer


def dynamic_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15)


def write_flux2_klein(folder: Path, *, is_distilled: bool = False) -> Path:
    """As the 4B base model, whose index does not speak of distilling: fused single blocks, and of Qwen3's 36 layers the
    28 that the embeddings, of the 9th, 18th and 27th, need.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = write_qwen_tokenizer(folder / "tokenizer")
    parts = {
        "text_encoder": tiny_qwen(vocabulary, 28),
        "vae": tiny_flux2_vae(),
        "transformer": tiny_flux2_transformer(guidance_embeds=False),
        "scheduler": dynamic_scheduler(),
    }
    return write_parts(folder, "Flux2KleinPipeline", parts, **({"is_distilled": True} if is_distilled else {}))


def write_flux2_dev(folder: Path) -> Path:
    """Told its guidance; of Mistral's 40 layers the 31 that the embeddings, of the 10th, 20th and 30th, need."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = write_chat_tokenizer(folder / "tokenizer", "CLIPTokenizer", padding_side="left")
    template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocabulary += tokenizer.add_special_tokens({"additional_special_tokens": marks})
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=template)
    shutil.rmtree(folder / "tokenizer")
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    parts = {
        "tokenizer": processor,
        "text_encoder": Mistral3ForConditionalGeneration(config),
        "vae": tiny_flux2_vae(),
        "transformer": tiny_flux2_transformer(guidance_embeds=True),
        "scheduler": dynamic_scheduler(),
    }
    return write_parts(folder, "Flux2Pipeline", parts)


def write_z_image(folder: Path, *, shift: float = 6.0) -> Path:
    """As the base model; with a shift of 3 as Turbo, whose files say no more of being distilled. The text encoder's
    files are those of a whole language model.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    language_model = tiny_qwen(write_qwen_tokenizer(folder / "tokenizer"), 3)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    parts = {
        "text_encoder": language_model.model,
        "vae": tiny_vae(latent_channels=16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    write_parts(folder, "ZImagePipeline", parts)
    language_model.save_pretrained(folder / "text_encoder")
    return folder


def diffusers_guidance(pipeline: object, scale: float) -> float:
    """What diffusers' pipeline calls a guidance scale: Z-Image's counts from 0, where all others count from 1."""
    return scale - 1 if type(pipeline).__name__ == ZImage.pipeline else scale


def prediction_and_gradients(model: BaseModel) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Of a model with a new random adapter, for noise and two prompts; activations are computed again."""
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), model.denoiser)
    randomise(adapter, size=0.1)
    model.denoiser.train()
    model.denoiser.enable_gradient_checkpointing()
    latents = torch.randn(2, *model.latent_shape(PIXELS), generator=torch.Generator().manual_seed(0))
    conditioning = model.encode_prompts(["a dog", "a cat"])
    views = whole_view(PIXELS, PIXELS).repeat(2, 1)
    prediction = model.predict(latents, torch.tensor([900.0, 100.0]), conditioning, views)
    prediction.square().mean().backward()
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    return prediction.detach(), {name: parameter.grad for name, parameter in adapter.named_parameters()}


WRITERS: dict[type[BaseModel], Callable[[Path], Path]] = {
    StableDiffusion: write_base,
    StableDiffusionXL: write_sdxl,
    StableDiffusion3: write_sd3,
    Flux: write_flux,
    Flux2Klein: write_flux2_klein,
    Flux2Dev: write_flux2_dev,
    ZImage: write_z_image,
}
