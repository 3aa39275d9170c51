"""GSOFT in PEFT's image generation comparison, on a tiny FLUX.2 klein."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from tiny_families import write_flux2_klein

from benchmarks.bases import KLEIN_4B
from benchmarks.peft_image_generation import __main__ as command
from benchmarks.peft_image_generation.method import CONFIG_NAME, WEIGHTS_NAME, GSOFTConfig, get_gsoft_model
from gsoft_diffusion import UserError


@pytest.fixture
def pipeline(tmp_path) -> Flux2KleinPipeline:
    return Flux2KleinPipeline.from_pretrained(write_flux2_klein(tmp_path / "klein"), torch_dtype=torch.bfloat16)


def config(name: str) -> GSOFTConfig:
    return GSOFTConfig.from_pretrained(command.EXPERIMENTS / name)


def picture(pipeline: Flux2KleinPipeline) -> torch.Tensor:
    shape = (1, 8, pipeline.transformer.config.joint_attention_dim)
    return pipeline(
        prompt_embeds=torch.ones(shape, dtype=torch.bfloat16),
        negative_prompt_embeds=torch.zeros(shape, dtype=torch.bfloat16),
        num_inference_steps=2,
        guidance_scale=3.5,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def test_there_is_an_experiment_for_both_methods():
    assert command.experiment_names() == ["double_gsoft/flux2-klein-default", "gsoft/flux2-klein-default"]


@pytest.mark.parametrize(
    ("name", "numbers"), [("double_gsoft/flux2-klein-default", 34_068_480), ("gsoft/flux2-klein-default", 5_514_240)]
)
@pytest.mark.filterwarnings("error")
def test_the_configuration_fits_the_published_model(name, numbers):
    """On the 4B model's own configuration. All its layers have a dense Q, or there would be a warning."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**KLEIN_4B)
    adapted = get_gsoft_model(transformer, config(name))
    assert adapted.get_nb_trainable_parameters() == (numbers, 3_875_544_576 + numbers)
    assert len(adapted.adapter.targets.layers) == 80


@pytest.mark.parametrize("name", command.experiment_names())
def test_the_adapted_model_trains_draws_and_is_saved_as_peft_does(pipeline, name, tmp_path):
    base = picture(pipeline)
    transformer = pipeline.transformer
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    transformer.enable_gradient_checkpointing()
    adapted = pipeline.transformer = get_gsoft_model(transformer, config(name))
    assert {parameter.dtype for parameter in adapted.adapter.parameters()} == {torch.float32}
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        prediction = adapted(
            hidden_states=torch.ones(1, 4, 16, dtype=torch.bfloat16),
            timestep=torch.tensor([0.5], dtype=torch.bfloat16),
            guidance=None,
            encoder_hidden_states=torch.ones(1, 8, 48, dtype=torch.bfloat16),
            txt_ids=torch.zeros(1, 8, 4),
            img_ids=torch.zeros(1, 4, 4),
            return_dict=False,
        )[0]
        prediction.float().square().mean().backward()
        optimizer.step()
    adapted.eval()
    assert all(torch.equal(value, before[key]) for key, value in transformer.state_dict().items())
    assert not torch.equal(picture(pipeline), base)
    with adapted.disable_adapter():
        assert torch.equal(picture(pipeline), base)
    adapted.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / WEIGHTS_NAME)
    assert sum(tensor.numel() for tensor in saved.values()) == adapted.get_nb_trainable_parameters()[0]
    assert GSOFTConfig.from_pretrained(tmp_path / "saved").to_dict() == config(name).to_dict()
    assert json.loads(json.dumps(config(name).to_dict()))["peft_type"] == "GSOFT"


def test_rotations_in_half_precision_are_refused(pipeline):
    with pytest.raises(ValueError, match="autocast_adapter_dtype is False"):
        get_gsoft_model(pipeline.transformer, config("gsoft/flux2-klein-default"), autocast_adapter_dtype=False)


def test_configurations_of_other_methods_are_refused(tmp_path):
    (tmp_path / CONFIG_NAME).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="peft_type is LORA"):
        GSOFTConfig.from_pretrained(tmp_path)


def comparison(tmp_path, utilities: str):
    """A checkout whose program writes down what it is called with; its parts are named as PEFT's."""
    folder = tmp_path / "peft" / command.COMPARISON
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(utilities)
    (folder / "run.py").write_text(
        "import utils\nPeftConfig = PeftModel = None\ncalls = []\ndef main(**values):\n    calls.append(values)\n"
    )
    return tmp_path / "peft"


@pytest.fixture
def imports(monkeypatch):
    """Modules of the stand-in are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("run", "utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("run", "utils"):
        sys.modules.pop(name, None)


def test_peft_s_program_gets_our_method(tmp_path, monkeypatch, imports):
    checkout = comparison(tmp_path, "get_peft_model = None\n")
    monkeypatch.setattr(sys, "argv", ["peft", "--peft", str(checkout), "--clean", "gsoft/flux2-klein-default"])
    assert command.main() == 0
    program, utilities = sys.modules["run"], sys.modules["utils"]
    assert utilities.get_peft_model is get_gsoft_model
    assert program.PeftConfig is GSOFTConfig
    assert program.PeftModel is command.GSOFTModel
    (call,) = program.calls
    assert call["experiment_name"] == "gsoft/flux2-klein-default"
    assert GSOFTConfig.from_pretrained(call["path_experiment"]).rotations.double is False
    assert call["clean"] is True


def test_what_is_missing_is_said(tmp_path, imports):
    with pytest.raises(UserError, match=r"nowhere: has no .*; give a checkout of huggingface/peft"):
        command.peft_program(tmp_path / "nowhere")
    checkout = comparison(tmp_path, "raise RuntimeError('CUDA or XPU is not available')\n")
    with pytest.raises(UserError, match="does not start: CUDA or XPU is not available"):
        command.peft_program(checkout)
