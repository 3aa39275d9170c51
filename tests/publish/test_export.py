"""What export.py writes, read back by the loaders of diffusers."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_base
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from pretended import pretended_gpu
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import write_flux, write_sd3
from tiny_models import randomise
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gsoft_diffusion.adapters import loading as adapters_loading
from gsoft_diffusion.adapters.file import read_adapter, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config import AdapterConfig, ExportConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import new_places
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.original_layout import original_layout
from gsoft_diffusion.publish.export import export

WIDEST = 64  # the tiny bases' largest width: the full rank of every layer


def write_adapter(base: Path, path: Path, **changes: object) -> Path:
    """An adapter of random rotations for the base."""
    model = load_model(str(base))
    identity = identity_of(model)
    config = AdapterConfig(**({"nblocks": 4} | changes))
    adapter = inject(config, model.denoiser, model.text_encoders)
    randomise(adapter, size=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(path, adapter, base_model=identity, training={}, prompts={"instance_prompt": "a sks dog"})
    return path


def enlarge(base: Path) -> Path:
    """Give the base the block structure of Stable Diffusion 2: four levels of two layers, OpenCLIP, linear layers."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=32,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=2,
        norm_num_groups=4,
    )
    config = CLIPTextConfig.from_pretrained(base / "text_encoder")
    config.update({"hidden_act": "gelu", "num_hidden_layers": 3})
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", CLIPTextModel(config))):
        part.save_pretrained(base / name)
    return base


@pytest.fixture(scope="module", params=["1.x, two levels", "2.x, real structure"])
def any_base(request, tmp_path_factory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("bases") / "base")
    return enlarge(folder) if request.param.startswith("2") else folder


@pytest.fixture(scope="module")
def any_adapter(any_base) -> Path:
    return write_adapter(any_base, any_base.parent / "adapter.safetensors")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter.safetensors")


@contextmanager
def adapted(path: Path, base: Path) -> Iterator[BaseModel]:
    """The base with its adapter at work, not merged."""
    model = load_model(str(base))
    load_adapter(path, model.unet, [model.text_encoder])
    with torch.no_grad():
        yield model


def weights(model: BaseModel | StableDiffusionPipeline) -> dict[str, Tensor]:
    parts = {"text_encoder": model.text_encoder, "vae": model.vae, "unet": model.unet}
    return {
        f"{part}.{name}": tensor for part, network in parts.items() for name, tensor in network.state_dict().items()
    }


@pytest.fixture(scope="module")
def second(base, tmp_path_factory) -> Path:
    """Another adapter for the same base, in another shape and not in the text encoder."""
    path = tmp_path_factory.mktemp("second") / "adapter.safetensors"
    return write_adapter(base, path, nblocks=2, text_encoder=False)


def stacked_weights(strengths: dict[Path, float], base: Path) -> dict[str, Tensor]:
    model = load_model(str(base))
    stack = AdapterStack(model.unet, [model.text_encoder])
    for path in strengths:
        stack.load(str(path), path)
    stack.use({str(path): strength for path, strength in strengths.items()})
    return weights(model)


def merged_weights(path: Path, base: Path) -> dict[str, Tensor]:
    model = load_model(str(base))
    load_adapter(path, model.unet, [model.text_encoder])[0].merge()
    return weights(model)


@torch.no_grad()
def outputs(model: BaseModel | StableDiffusionPipeline) -> tuple[Tensor, Tensor]:
    """The text encoder's and the UNet's for fixed tokens, latents and timesteps."""
    tokens = torch.arange(32).reshape(2, 16)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = model.text_encoder.eval()(tokens)[0]
    return text, model.unet.eval()(latents, torch.tensor([3, 500]), text).sample


def assert_outputs_agree(given, wanted, relative: float) -> None:
    for one, other in zip(given, wanted, strict=True):
        assert (one - other).norm() <= relative * other.norm()


# Whole models


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_folder_is_a_whole_model(any_base, any_adapter, tmp_path, precision):
    folder = export(
        ExportConfig((str(any_adapter),), "diffusers", output=str(tmp_path / "out" / "dog"), precision=precision)
    )
    dtype = getattr(torch, precision)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    found, wanted = weights(pipeline), merged_weights(any_adapter, any_base)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in wanted)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    prompt = "a sks dog"
    assert pipeline.tokenizer(prompt).input_ids == load_model(str(any_base)).tokenizer(prompt).input_ids
    assert {path.name for path in (folder / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    assert [path.name for path in folder.parent.iterdir()] == ["dog"]


def test_folder_can_be_trained_on_and_drawn_with_again(base, adapter, tmp_path):
    folder = export(ExportConfig((str(adapter),), "diffusers", output=str(tmp_path / "dog"), precision="float32"))
    with adapted(adapter, base) as model:
        assert_outputs_agree(outputs(load_model(str(folder))), outputs(model), 1e-6)


def keys_of(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_text_encoders_have_the_names_that_other_programs_ask_for(base, adapter, tmp_path):
    """Whether the base's have them or not: transformers since 5.6 leaves the prefix out of what it makes itself."""
    assert not any(name.startswith("text_model.") for name in keys_of(base / "text_encoder" / "model.safetensors"))
    folder = export(ExportConfig((str(adapter),), "diffusers", output=str(tmp_path / "dog"), precision="float32"))
    again = write_adapter(folder, tmp_path / "again" / "adapter.safetensors")
    twice = export(ExportConfig((str(again),), "diffusers", precision="float32"))
    for merged, own in ((folder, adapter), (twice, again)):
        names = keys_of(merged / "text_encoder" / "model.safetensors")
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
        assert all(re.match(r"text_model\.(?!text_model)", name) for name in names)
        of_base = folder if merged is twice else base
        found, wanted = weights(load_model(str(merged))), merged_weights(own, of_base)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", ["diffusers", "checkpoint", "diffusers_lora", "kohya_lora", "diff"])
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_modes_that_the_user_asks_for(adapter, tmp_path, layout, umask):
    suffix = "" if layout == "diffusers" else ".safetensors"
    before = os.umask(umask)
    try:
        export(ExportConfig((str(adapter),), layout, output=str(tmp_path / f"dog{suffix}")))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 1
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_checkpoint_loads_as_a_single_file(any_base, any_adapter, tmp_path, precision):
    path = export(
        ExportConfig((str(any_adapter),), "checkpoint", output=str(tmp_path / "dog.safetensors"), precision=precision)
    )
    dtype = getattr(torch, precision)
    pipeline = StableDiffusionPipeline.from_single_file(
        path, config=str(any_base), torch_dtype=dtype, local_files_only=True
    )
    found, wanted = weights(pipeline), merged_weights(any_adapter, any_base)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in wanted)


# Names in the published v1-5 and v2-1 checkpoints.
PUBLISHED = {
    "model.diffusion_model.time_embed.2.bias",
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight",
    "model.diffusion_model.input_blocks.11.0.emb_layers.1.bias",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.middle_block.2.out_layers.3.weight",
    "model.diffusion_model.output_blocks.2.1.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.bias",
    "model.diffusion_model.output_blocks.8.2.conv.weight",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias",
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
    "model.diffusion_model.out.2.bias",
    "first_stage_model.encoder.down.0.block.1.norm2.weight",
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
    "first_stage_model.encoder.down.2.downsample.conv.weight",
    "first_stage_model.encoder.mid.attn_1.proj_out.weight",
    "first_stage_model.encoder.norm_out.bias",
    "first_stage_model.decoder.mid.block_2.conv1.weight",
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
    "first_stage_model.decoder.up.3.block.2.conv2.weight",
    "first_stage_model.decoder.up.1.upsample.conv.bias",
    "first_stage_model.quant_conv.weight",
    "first_stage_model.post_quant_conv.bias",
}
OPEN_CLIP = {
    "cond_stage_model.model.positional_embedding",
    "cond_stage_model.model.token_embedding.weight",
    "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
    "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias",
    "cond_stage_model.model.transformer.resblocks.1.attn.out_proj.bias",
    "cond_stage_model.model.transformer.resblocks.1.ln_2.weight",
    "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.weight",
    "cond_stage_model.model.transformer.resblocks.1.mlp.c_proj.bias",
    "cond_stage_model.model.ln_final.weight",
}
CLIP = {
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
}


def test_original_names_are_the_published_ones(base, tmp_path):
    model = load_model(str(enlarge(write_base(tmp_path / "base"))))
    tensors = original_layout(model.unet, model.vae, model.text_encoder)
    assert tensors.keys() >= PUBLISHED | OPEN_CLIP
    assert not [name for name in tensors if ".transformer.text_model." in name]
    assert sum(name.startswith("model.diffusion_model.") for name in tensors) == 686  # as in the published files
    assert sum(name.startswith("first_stage_model.") for name in tensors) == 248
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert tensors["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 32)
    first = load_model(str(base))
    assert original_layout(first.unet, first.vae, first.text_encoder).keys() >= CLIP


def test_a_projection_that_a_single_file_cannot_hold_is_refused(tmp_path):
    model = load_model(str(write_sd3(tmp_path / "base")))
    names = model.original_layout().keys()
    assert sum(name.startswith("text_encoders.t5xxl.transformer.") for name in names) == len(
        model.text_encoder_3.state_dict()
    )
    model.text_encoder.text_projection.weight[0, 1] = 0.1
    with pytest.raises(UserError, match=r"text_projection is not the identity.*--format diffusers"):
        model.original_layout()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("checkpoint", "--format checkpoint: no single-file layout is known for FLUX.1; use --format diffusers"),
        ("kohya_lora", "--format kohya_lora: not known for Stable Diffusion 3 and 3.5; use --format diffusers_lora"),
    ],
)
def test_a_format_that_the_family_cannot_have_is_refused_before_weights_are_read(tmp_path, kind, message):
    base = (write_flux if kind == "checkpoint" else write_sd3)(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter.safetensors")
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        export(ExportConfig((str(adapter),), kind))


def test_what_has_no_place_in_the_original_layout_is_named(base):
    model = load_model(str(base))
    model.unet.add_module("novelty", torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"novelty\.weight.*--format diffusers"):
        original_layout(model.unet, model.vae, model.text_encoder)
    model.text_encoder.config.hidden_act = "relu"
    with pytest.raises(UserError, match="relu"):
        original_layout(model.unet, model.vae, model.text_encoder)


# LoRAs


def with_lora(base: Path, path: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    return pipeline


@pytest.mark.parametrize("layout", ["diffusers_lora", "kohya_lora"])
@pytest.mark.slow
def test_lora_of_full_rank_is_the_adapter(any_base, any_adapter, tmp_path, layout):
    output = str(tmp_path / "dog.safetensors")
    path = export(ExportConfig((str(any_adapter),), layout, output=output, rank=WIDEST, precision="float32"))
    pipeline = with_lora(any_base, path)
    with adapted(any_adapter, any_base) as model:
        wanted = outputs(model)
    assert_outputs_agree(outputs(pipeline), wanted, 1e-5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = merged_weights(any_adapter, any_base)
    for name, tensor in weights(pipeline).items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=2e-6 * merged[name].abs().max().item())
    with path.with_suffix(".csv").open() as file:
        assert all(float(row["error"]) < 1e-5 for row in csv.DictReader(file))


@pytest.mark.parametrize("layout", ["diffusers_lora", "kohya_lora"])
def test_a_lora_in_bfloat16_is_the_adapter_up_to_rounding(base, adapter, tmp_path, layout):
    output = str(tmp_path / "dog.safetensors")
    path = export(ExportConfig((str(adapter),), layout, output=output, rank=WIDEST, precision="bfloat16"))
    assert {x.dtype for name, x in load_file(path).items() if not name.endswith(".alpha")} == {torch.bfloat16}
    with adapted(adapter, base) as model:
        assert_outputs_agree(outputs(with_lora(base, path)), outputs(model), 2e-2)
    with path.with_suffix(".csv").open() as file:
        assert all(float(row["error"]) < 1e-2 for row in csv.DictReader(file))


def test_alphas_are_exact_whatever_the_precision(adapter, tmp_path):
    """bfloat16 has no 261: a layer would be weaker by the quotient of alpha and rank."""
    output = str(tmp_path / "dog.safetensors")
    path = export(ExportConfig((str(adapter),), "kohya_lora", output=output, rank=261, precision="bfloat16"))
    assert {x.item() for name, x in load_file(path).items() if name.endswith(".alpha")} == {261}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers_lora", "kohya_lora"])
def test_truncated_lora_does_what_its_product_does(any_base, any_adapter, tmp_path, layout):
    path = export(ExportConfig((str(any_adapter),), layout, output=str(tmp_path / "dog.safetensors"), rank=3))
    model = load_model(str(any_base))
    plain = outputs(model)
    base, merged = weights(model), merged_weights(any_adapter, any_base)
    by_hand, errors = {}, {}
    for name, tensor in merged.items():
        change = tensor - base[name]
        if change.any():
            u, s, vh = torch.linalg.svd(change.double())
            by_hand[name] = base[name] + (u[:, :3] * s[:3] @ vh[:3]).float()
            errors[name] = (s[3:].norm() / s.norm()).item()
    for part in ("unet", "text_encoder"):
        changed = {name.removeprefix(f"{part}."): by_hand[name] for name in by_hand if name.startswith(f"{part}.")}
        assert changed
        getattr(model, part).load_state_dict(changed, strict=False)
    wanted = outputs(model)
    found = outputs(with_lora(any_base, path))
    assert_outputs_agree(found, wanted, 2e-3)  # the file is float16
    assert (wanted[1] - plain[1]).norm() > 20 * (found[1] - wanted[1]).norm()
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["error"]) for row in rows) == pytest.approx(sorted(errors.values()), rel=5e-3)


def test_lora_of_an_adapter_without_the_text_encoder(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter.safetensors", text_encoder=False)
    path = export(ExportConfig((str(adapter),), "kohya_lora", rank=4))
    assert path == tmp_path / "kohya_lora_rank4.safetensors"
    assert all(name.startswith("lora_unet_") for name in load_file(path))
    text, image = outputs(with_lora(base, path))
    plain_text, plain_image = outputs(load_model(str(base)))
    assert torch.equal(text, plain_text)
    assert not torch.equal(image, plain_image)


def test_kohya_names_and_metadata(base, adapter, tmp_path):
    path = export(ExportConfig((str(adapter),), "kohya_lora", output=str(tmp_path / "dog.safetensors"), rank=8))
    tensors = load_file(path)
    attention = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{attention}.lora_down.weight"].shape == (8, 32)
    assert tensors[f"{attention}.lora_up.weight"].shape == (32, 8)
    assert tensors[f"{attention}.alpha"] == 8
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in tensors
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {torch.float16}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_v2"], metadata["ss_network_dim"]) == ("False", "8")
    assert metadata["ss_base_model_version"] == "sd_v1_v"
    assert {name: text for name, text in metadata.items() if name.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "sgm",
        "modelspec.title": "dog",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "v",
    }
    assert json.loads(metadata["gsoft_diffusion"])["prompts"] == {"instance_prompt": "a sks dog"}


# Bad input


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("diffusers", "merged"),
        ("checkpoint", "merged.safetensors"),
        ("diffusers_lora", "diffusers_lora_rank64.safetensors"),
        ("kohya_lora", "kohya_lora_rank64.csv"),
        ("diff", "diff.md"),
    ],
)
def test_nothing_is_written_over(base, tmp_path, layout, name):
    adapter = write_adapter(base, tmp_path / "adapter.safetensors")
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists"):
        export(ExportConfig((str(adapter),), layout))
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("layout", ["diffusers", "checkpoint"])
def test_numbers_too_large_for_float16(base, tmp_path, layout):
    model = load_model(str(base))
    huge = shutil.copytree(base, tmp_path / "huge")
    model.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = 1e6
    model.vae.save_pretrained(huge / "vae")
    adapter = write_adapter(huge, tmp_path / "adapter.safetensors")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight.*--precision bfloat16 or float32"):
        export(ExportConfig((str(adapter),), layout))
    assert set(tmp_path.iterdir()) == before
    export(ExportConfig((str(adapter),), layout, precision="bfloat16"))


def test_what_cannot_be_written_is_found_before_the_work(adapter, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("gsoft_diffusion.publish.export.load_base", lambda *arguments: pytest.fail("worked in vain"))
    with pytest.raises(UserError, match=r"--output: cannot write .*dog\.safetensors"):
        export(ExportConfig((str(adapter),), "checkpoint", output=str(tmp_path / "file" / "dog.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_may_start_at_home(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export(ExportConfig((str(adapter),), "checkpoint", output="~/dog.safetensors")).parent == tmp_path


def test_an_adapter_that_changes_nothing_is_not_exported(base, adapter, tmp_path):
    model = load_model(str(base))
    identity = identity_of(model)
    path = tmp_path / "adapter.safetensors"
    untrained = inject(AdapterConfig(nblocks=4), model.unet, [model.text_encoder])
    save_adapter(path, untrained, base_model=identity, training={}, prompts={})
    for config in (
        ExportConfig((str(path),), "kohya_lora"),
        ExportConfig((str(path), str(adapter)), "kohya_lora", strength=(1.0, 0.0)),
    ):
        with pytest.raises(UserError, match="does not change the base model; nothing is exported"):
            export(config)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("layout", ["diffusers_lora", "kohya_lora"])
def test_a_format_that_other_programs_read_in_part_is_said_to_be(adapter, tmp_path, capsys, layout):
    export(ExportConfig((str(adapter),), layout, output=str(tmp_path / "dog.safetensors")))
    note = "ComfyUI and Forge read only the text encoders' part of this format; choose kohya_lora or diff"
    assert (note in capsys.readouterr().out) == (layout == "diffusers_lora")


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def write() -> None:
        with new_places("--output", first, second) as places:
            for place in places:
                place.write_text("ours")
            second.write_text("theirs")

    with pytest.raises(UserError, match="second exists"):
        write()
    assert list(tmp_path.iterdir()) == [second]
    assert second.read_text() == "theirs"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "checkpoint", "rank": 4}, "--rank"),
        ({"format": "kohya_lora", "rank": 0}, "--rank"),
        ({"format": "diff", "rank": 4}, "--rank"),
        ({"format": "checkpoint", "output": "dog"}, r"\.safetensors"),
        ({"format": "diffusers", "output": "dog.safetensors"}, "folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ExportConfig(("adapter.safetensors",), **settings)


def test_adapters_that_cannot_be_read_and_bases_that_do_not_fit(base, any_base, adapter, tmp_path):
    with pytest.raises(UserError, match="no such adapter"):
        export(ExportConfig((str(tmp_path / "nothing.safetensors"),), "diffusers"))
    other = enlarge(write_base(tmp_path / "other"))
    with pytest.raises(UserError, match="another architecture"):
        export(ExportConfig((str(adapter),), "checkpoint", pretrained_model_name_or_path=str(other)))
    assert not (adapter.parent / "merged.safetensors").exists()


def sibling_of(base: Path, folder: Path) -> Path:
    """A base of the same architecture whose UNet was trained on."""
    shutil.copytree(base, folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for parameter in unet.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim == 2 else 0
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("layout", ["checkpoint", "diff"])
def test_an_export_for_a_sibling_of_the_base_says_so(base, adapter, tmp_path, caplog, layout):
    other = sibling_of(base, tmp_path / "fine-tune")
    config = ExportConfig(
        (str(adapter),), layout, output=str(tmp_path / "x.safetensors"), pretrained_model_name_or_path=str(other)
    )
    with pytest.raises(UserError, match=r"has other weights, about .*; --accept_other_base takes it all the same"):
        export(config)
    path = export(replace(config, accept_other_base=True))
    assert len([message for message in caplog.messages if "has other weights, about" in message]) == 1
    card = path.with_suffix(".md").read_text()
    trained_on = base.name.replace("_", r"\_")  # as Markdown has it
    assert f"The adapter was trained on {trained_on}. Compared with that one's, the attention weights of" in card
    with safe_open(path, "pt") as file:
        origin = json.loads(file.metadata()["gsoft_diffusion"])["base_model"]
    assert origin == {"name": "fine-tune", "fingerprint": identity_of(load_model(str(other))).fingerprint}
    if layout == "checkpoint":
        model = load_model(str(other))
        load_adapter(adapter, model.unet, [model.text_encoder], accept_other_base=True)[0].merge()
        found, wanted = load_file(path), original_layout(model.unet, model.vae, model.text_encoder)
        assert all(torch.equal(found[name], wanted[name].half()) for name in wanted)


# Several adapters


def test_several_adapters_are_merged_together(adapter, second, base, tmp_path, capfd):
    paths = (str(adapter), str(second))
    config = ExportConfig(paths, "diffusers", (0.5, 0.8), str(tmp_path / "both"), precision="float32")
    folder = export(config)
    wanted = stacked_weights({adapter: 0.5, second: 0.8}, base)
    found = weights(StableDiffusionPipeline.from_pretrained(folder))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "with 2 adapters merged in" in capfd.readouterr().out


def test_a_lora_of_several_adapters(adapter, second, base, tmp_path):
    """Of full rank, so that it must reproduce what they do together."""
    output = str(tmp_path / "both.safetensors")
    config = ExportConfig((str(adapter), str(second)), "kohya_lora", (1.0, 0.5), output, WIDEST, "float32")
    path = export(config)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    model = load_model(str(base))
    stack = AdapterStack(model.unet, [model.text_encoder])
    for file in (adapter, second):
        stack.load(str(file), file)
    stack.use({str(adapter): 1.0, str(second): 0.5})
    assert_outputs_agree(outputs(pipeline), outputs(model), 1e-4)
    with safe_open(path, "pt") as file:
        origin = json.loads(file.metadata()["gsoft_diffusion"])
    assert origin["strengths"] == [1.0, 0.5]
    assert len(origin["prompts"]["subjects"]) == 2


# Memory


@pytest.mark.parametrize("layout", ["kohya_lora", "diff"])
def test_a_change_is_made_of_weights_as_they_are_stored(base, tmp_path, layout, monkeypatch):
    """Which take half the memory, and give the same as in float32."""
    half = shutil.copytree(base, tmp_path / "half")
    model = load_model(str(base), dtype=torch.bfloat16)
    model.unet.save_pretrained(half / "unet")
    model.text_encoder.save_pretrained(half / "text_encoder")
    adapter = write_adapter(half, tmp_path / "dog" / "adapter.safetensors")
    loaded, results = [], []
    for dtype in (None, torch.float32):

        def load(name, forced=dtype, **options):
            loaded.append(load_model(name, **options | {"dtype": forced or options["dtype"]}))
            return loaded[-1]

        monkeypatch.setattr(adapters_loading, "load_model", load)
        output = tmp_path / str(dtype) / "change.safetensors"
        rank = 4 if "lora" in layout else None
        path = export(ExportConfig((str(adapter),), layout, output=str(output), rank=rank, precision="float32"))
        results.append((load_file(path), path.with_suffix(".csv").read_text()))
    stored, full = loaded
    assert (stored.dtype, stored.text_encoder.dtype, stored.vae.dtype) == (*[torch.bfloat16] * 2, torch.float32)
    assert full.dtype == torch.float32
    (found, said), (wanted, said_in_full) = results
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert said == said_in_full


@pytest.mark.parametrize(
    ("precision", "loaded"), [(precision, torch.bfloat16) for precision in ("float16", "bfloat16", "float32")]
)
def test_a_whole_model_is_made_of_weights_as_they_are_stored(base, tmp_path, precision, loaded, monkeypatch):
    """Rounded once: as if all had been loaded in float32."""
    half = shutil.copytree(base, tmp_path / "half")
    model = load_model(str(base), dtype=loaded)
    model.unet.save_pretrained(half / "unet")
    model.text_encoder.save_pretrained(half / "text_encoder")
    adapter = write_adapter(half, tmp_path / "dog" / "adapter.safetensors")
    results, dtypes = [], []
    for dtype in (None, torch.float32):

        def load(name, forced=dtype, **options):
            model = load_model(name, **options | {"dtype": forced or options["dtype"]})
            dtypes.append(model.dtype)
            return model

        monkeypatch.setattr(adapters_loading, "load_model", load)
        output = tmp_path / str(dtype) / "whole.safetensors"
        config = ExportConfig((str(adapter),), "checkpoint", output=str(output), precision=precision)
        results.append(load_file(export(config)))
    assert dtypes == [loaded, torch.float32]
    found, wanted = results
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_weight_that_does_not_fit_is_refused(base, tmp_path):
    large = shutil.copytree(base, tmp_path / "large")
    unet = load_model(str(base)).unet
    unet.conv_in.bias.data[0] = 1e6
    unet.save_pretrained(large / "unet")
    adapter = write_adapter(large, tmp_path / "dog" / "adapter.safetensors")
    with pytest.raises(
        UserError, match=r"conv_in\.bias does not fit into float16: give --precision bfloat16 or float32"
    ):
        export(ExportConfig((str(adapter),), "diffusers", output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_singular_values_are_found_on_the_gpu(adapter, tmp_path):
    """Which takes a fraction of the time; the factors are those of the CPU, up to rounding and their signs."""
    products = []
    for where in (nullcontext(), pretended_gpu()):
        with where as gpu:
            output = tmp_path / str(gpu is None) / "dog.safetensors"
            factors = load_file(export(ExportConfig((str(adapter),), "diffusers_lora", output=str(output), rank=4)))
            assert gpu is None or gpu.kernels["_linalg_svd"] > 0
        names = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
        products.append(
            [factors[f"{name}.lora_B.weight"].float() @ factors[f"{name}.lora_A.weight"].float() for name in names]
        )
    torch.testing.assert_close(*products, atol=1e-3, rtol=1e-2)


# Model cards


@pytest.mark.parametrize("layout", ["diffusers", "checkpoint", "kohya_lora", "diff"])
def test_every_export_has_a_card(adapter, base, tmp_path, layout):
    run = tmp_path / "dog"
    (run / "validation").mkdir(parents=True)
    (run / "validation" / "step-000100.png").write_bytes(b"a sheet")
    shutil.copy(adapter, run / "adapter.safetensors")
    target = export(ExportConfig((str(run / "adapter.safetensors"),), layout, rank=4 if "lora" in layout else None))
    card = target / "README.md" if layout == "diffusers" else target.with_suffix(".md")
    sheet = "preview.png" if layout == "diffusers" else target.with_suffix(".png").name
    text = card.read_text()
    assert f"]({sheet})" in text
    assert ('from_pretrained(".")' if layout == "diffusers" else target.name) in text
    assert "instance_prompt: a sks dog" in text
    assert str(base.parent) not in text
    assert card.with_name(sheet).read_bytes() == b"a sheet"


def test_the_card_of_a_checkpoint_shows_no_later_sheet(base, tmp_path):
    run = tmp_path / "dog"
    path = write_adapter(base, run / "checkpoint-2" / "adapter.safetensors")
    file = read_adapter(path)
    save_adapter(path, file, base_model=file.base_model, training={"step": 2}, prompts=file.prompts)
    (run / "settings.yaml").touch()
    (run / "validation").mkdir()
    for step in (1, 4):
        (run / "validation" / f"step-{step:06d}.png").write_bytes(b"%d" % step)
    target = export(ExportConfig((str(path.parent),), "diffusers"))
    assert target == run / "merged_checkpoint-2"
    assert (target / "preview.png").read_bytes() == b"1"


def test_a_card_that_is_there_already_is_not_written_over(adapter, tmp_path):
    (tmp_path / "dog.md").write_text("my own words")
    with pytest.raises(UserError, match=r"dog\.md exists"):
        export(ExportConfig((str(adapter),), "kohya_lora", output=str(tmp_path / "dog.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["dog.md"]
