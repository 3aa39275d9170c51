"""The names that Stable Diffusion's original checkpoints, whole models in one file, give to diffusers' weights.

    model.diffusion_model.…          UNet: latent-diffusion's blocks, counted through all resolutions; transformer of 3
    first_stage_model.…              VAE
    cond_stage_model.transformer.…   text encoder of 1.x: OpenAI's CLIP, as transformers names it
    cond_stage_model.model.…         text encoder of 2.x: OpenCLIP, with query, key and value in one matrix
    conditioner.embedders.0.…, .1.…  text encoders of XL: one of each of these kinds
    text_encoders.clip_l.…           text encoders of 3, with clip_g and t5xxl: as transformers names them

Derived from the models' structure, so that it holds for any number of blocks and layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from gsoft_diffusion.foundation.errors import UserError

TEXT_MODEL = "text_model."
# Inside a block: diffusers' name, the original's.
UNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
JOINT_LAYERS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINT_ATTENTION = {  # query, key and value, in one matrix in the original
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def original_layout(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """All weights of Stable Diffusion 1.x or 2.x under their original names; dtypes stay.

    unet, vae: the networks of those names.
    text_encoder: OpenAI's CLIP for 1.x, OpenCLIP for 2.x; its activation tells which (see `is_open_clip`).

    Raises UserError if a weight has no place in that layout.
    """
    text = open_clip_tensors(text_encoder) if is_open_clip(text_encoder) else clip_tensors(text_encoder)
    return (
        {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(unet).items()}
        | {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(vae).items()}
        | {f"cond_stage_model.{name}": tensor for name, tensor in text.items()}
    )


def original_layout_xl(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    *,
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
) -> dict[str, Tensor]:
    """All weights of Stable Diffusion XL under their original names; dtypes stay.

    ComfyUI and Forge tell its velocity models by an empty tensor `v_pred`, and ComfyUI by `ztsnr` beside it those whose
    last timestep is all noise.

    unet, vae: the networks of those names.
    text_encoder: OpenAI's CLIP; text_encoder_2: OpenCLIP.
    v_prediction: whether the UNet predicts velocity; adds `v_pred`.
    zero_terminal_snr: whether its last timestep is all noise; adds `ztsnr`, in velocity models only.

    Raises UserError if a weight has no place in that layout.
    """
    tensors = (
        {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(unet).items()}
        | {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(vae).items()}
        | {f"conditioner.embedders.0.{name}": tensor for name, tensor in clip_tensors(text_encoder).items()}
        | {f"conditioner.embedders.1.{name}": tensor for name, tensor in open_clip_tensors(text_encoder_2).items()}
    )
    marks = ["v_pred", *(["ztsnr"] if zero_terminal_snr else [])] if v_prediction else []
    return tensors | {mark: torch.empty(0) for mark in marks}


def original_layout_3(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    clip_l: CLIPTextModelWithProjection,
    clip_g: CLIPTextModelWithProjection,
    t5xxl: T5EncoderModel,
) -> dict[str, Tensor]:
    """All weights of Stable Diffusion 3 or 3.5 under their original names; dtypes stay.

    transformer, vae: the networks of those names.
    clip_l, clip_g, t5xxl: the first, second and third text encoder, as the original calls them.

    Raises UserError if a weight has no place in that layout, or if CLIP-L has a projection, where readers put the
    identity.
    """
    projection = clip_l.text_projection.weight
    if not torch.equal(projection, torch.eye(*projection.shape, dtype=projection.dtype)):
        raise UserError(
            "--format checkpoint: text_encoder.text_projection is not the identity, and a single file of Stable "
            "Diffusion 3 has no place for it; choose --format diffusers"
        )
    text = {f"clip_l.transformer.{name}": tensor for name, tensor in text_encoder_tensors(clip_l).items()}
    text |= {f"clip_g.transformer.{name}": tensor for name, tensor in text_encoder_tensors(clip_g).items()}
    text |= {f"t5xxl.transformer.{name}": tensor for name, tensor in t5xxl.state_dict().items()}
    embedding = "t5xxl.transformer.encoder.embed_tokens.weight"  # `shared` again: diffusers asks for both
    text[embedding] = text[embedding].clone()  # one file cannot hold one tensor twice
    return (
        {f"model.diffusion_model.{name}": tensor for name, tensor in joint_transformer_tensors(transformer).items()}
        | {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(vae).items()}
        | {f"text_encoders.{name}": tensor for name, tensor in text.items()}
    )


def is_open_clip(text_encoder: CLIPTextModel) -> bool:
    """Whether a text encoder is OpenCLIP (Stable Diffusion 2.x), not OpenAI's CLIP (1.x): their activations differ.

    The files have no place for the activation: who reads one takes it from the layout. Raises UserError for a third
    kind.
    """
    activation = text_encoder.config.hidden_act
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(
            f"a text encoder with activation {activation} has no place in Stable Diffusion's original layout"
        )
    return activation == "gelu"


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The UNet's weights under their original names, without the `model.diffusion_model.` before them.

    Raises UserError if one has no place in that layout.
    """
    return _renamed(unet, _unet_blocks(unet), UNET_LAYERS)


def original_unet_module(unet: UNet2DConditionModel, path: str) -> str:
    """What the original calls a module of the UNet.

    path: what diffusers calls it, such as `mid_block.attentions.0.proj_in`.

    Raises UserError if it is in no block that the original has.
    """
    return _rename(path, _unet_blocks(unet), UNET_LAYERS)


def _unet_blocks(unet: UNet2DConditionModel) -> dict[str, str]:
    blocks = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    count = 1  # conv_in is input block 0
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{count}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
        count += 1
    count = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{count}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{count}.1"
            count += 1
        place = 2 if hasattr(block, "attentions") else 1  # the last of what the level's last output block holds
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{place}.conv"
    return blocks


def joint_transformer_tensors(transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
    """The SD3 transformer's weights under their original names, without the `model.diffusion_model.` before them.

    Query, key and value are stacked in one matrix, and scale and shift change places in the last layers. Raises
    UserError if a weight has no place in that layout.
    """
    blocks = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    tensors = transformer.state_dict()
    renamed = {"pos_embed": tensors.pop("pos_embed.pos_embed")}
    last = len(transformer.transformer_blocks) - 1
    for kind in ("weight", "bias"):
        for name in (f"norm_out.linear.{kind}", f"transformer_blocks.{last}.norm1_context.linear.{kind}"):
            tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])  # scale and shift, the other way round
        for block in range(last + 1):
            for original, parts in JOINT_ATTENTION.items():
                names = [f"transformer_blocks.{block}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    renamed[f"joint_blocks.{block}.{original}.{kind}"] = torch.cat(
                        [tensors.pop(name) for name in names]
                    )
    blocks |= {f"transformer_blocks.{block}": f"joint_blocks.{block}" for block in range(last + 1)}
    return renamed | {_rename(name, blocks, JOINT_LAYERS): tensor for name, tensor in tensors.items()}


def vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The VAE's weights under their original names, without the `first_stage_model.` before them.

    The matrices of its attention become 1×1 convolutions. Raises UserError if a weight has no place in that layout.
    """
    blocks = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names = {
            "conv_in": "conv_in",
            "mid_block.resnets.0": "mid.block_1",
            "mid_block.attentions.0": "mid.attn_1",
            "mid_block.resnets.1": "mid.block_2",
            "conv_norm_out": "norm_out",
            "conv_out": "conv_out",
        }
        blocks |= {f"{half}.{name}": f"{half}.{original}" for name, original in names.items()}
    for level, block in enumerate(vae.encoder.down_blocks):
        blocks[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        for layer in range(len(block.resnets)):
            blocks[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
    for position, block in enumerate(vae.decoder.up_blocks):
        level = len(vae.decoder.up_blocks) - 1 - position  # the original counts from the finest resolution
        blocks[f"decoder.up_blocks.{position}.upsamplers.0"] = f"decoder.up.{level}.upsample"
        for layer in range(len(block.resnets)):
            blocks[f"decoder.up_blocks.{position}.resnets.{layer}"] = f"decoder.up.{level}.block.{layer}"
    tensors = _renamed(vae, blocks, VAE_LAYERS)
    for name, tensor in tensors.items():
        if ".mid.attn_1." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]  # 1×1 convolutions in the original
    return tensors


def clip_tensors(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The weights of OpenAI's CLIP under the names that they have below `cond_stage_model.`.

    `position_ids` is added: transformers no longer keeps it, and older tools ask for it.
    """
    tensors = {f"transformer.{name}": tensor for name, tensor in text_encoder_tensors(text_encoder).items()}
    length = text_encoder.config.max_position_embeddings
    return tensors | {"transformer.text_model.embeddings.position_ids": torch.arange(length)[None]}  # older tools ask


def open_clip_tensors(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The weights of OpenCLIP under the names that they have below `cond_stage_model.`.

    Query, key and value are stacked in one matrix, and the projection is transposed. Raises UserError if a weight has
    no place in that layout.
    """
    blocks = {"final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding"}
    for layer in range(text_encoder.config.num_hidden_layers):
        blocks[f"encoder.layers.{layer}"] = f"transformer.resblocks.{layer}"
    tensors = {name.removeprefix(TEXT_MODEL): each for name, each in text_encoder_tensors(text_encoder).items()}
    renamed = {"model.positional_embedding": tensors.pop("embeddings.position_embedding.weight")}
    for layer in range(text_encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"model.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    if "text_projection.weight" in tensors:
        renamed["model.text_projection"] = tensors.pop("text_projection.weight").T
    names = {name: _rename(name, blocks, OPEN_CLIP_LAYERS) for name in tensors}
    return renamed | {f"model.{names[name]}": tensor for name, tensor in tensors.items()}


def text_encoder_tensors(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The text encoder's weights with the `text_model.` that transformers put before them until 5.6.

    Other programs ask for it. Only the projection has never had it.
    """
    tensors = {name.removeprefix(TEXT_MODEL): tensor for name, tensor in text_encoder.state_dict().items()}
    return {name if name == "text_projection.weight" else TEXT_MODEL + name: tensor for name, tensor in tensors.items()}


def _renamed(model: nn.Module, blocks: Mapping[str, str], layers: Mapping[str, str]) -> dict[str, Tensor]:
    return {_rename(name, blocks, layers): tensor for name, tensor in model.state_dict().items()}


def _rename(name: str, blocks: Mapping[str, str], layers: Mapping[str, str]) -> str:
    """`<block>.<layer>.weight` in the original's words. UserError if the block is in none of the original models."""
    for block, original in blocks.items():
        if name.startswith(f"{block}."):
            rest = name.removeprefix(f"{block}.")
            for layer, original_layer in layers.items():
                if rest.startswith(f"{layer}."):
                    rest = original_layer + rest.removeprefix(layer)
                    break
            return f"{original}.{rest}"
    raise UserError(f"{name} has no place in Stable Diffusion's original layout; choose --format diffusers")
