from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_base
from safetensors.torch import load_file, save_file
from tiny_families import write_sd3, write_sdxl

from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.config import AdapterConfig, TrainingConfig
from gsoft_diffusion.foundation import memory
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models import loading as models_module
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.train import train


@pytest.fixture(scope="module", params=[write_base, write_sdxl, write_sd3], ids=["SD", "SDXL", "SD3"])
def checkpoint(request, tmp_path_factory) -> tuple[Path, Path]:
    """A diffusers folder and the same weights in one file."""
    place = tmp_path_factory.mktemp("single")
    folder = request.param(place / "folder")
    file = place / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in load_model(str(folder)).original_layout().items()}, file)
    return folder, file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_the_same_model_as_the_folder(checkpoint, dtype):
    folder, file = checkpoint
    expected, found = (load_model(str(path), base_config=str(folder), dtype=dtype) for path in (folder, file))
    assert type(found) is type(expected)
    assert found.index_values == expected.index_values
    assert found.noise_scheduler().config.prediction_type == expected.noise_scheduler().config.prediction_type
    assert identity_of(found).fingerprint == identity_of(expected).fingerprint
    for part in (name for name, kind in expected.parts().items() if issubclass(kind, torch.nn.Module)):
        wanted = getattr(expected, part).state_dict()
        weights = getattr(found, part).state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items()), part
        assert not any(parameter.requires_grad for parameter in getattr(found, part).parameters())
        assert not getattr(found, part).training, part
    assert found.vae.dtype == torch.float32


@pytest.mark.parametrize(("marks", "zero_snr"), [({"v_pred"}, False), ({"v_pred", "ztsnr"}, True)])
def test_a_velocity_model_is_told_by_its_marks(tmp_path, marks, zero_snr):
    """As of Stable Diffusion XL, whose usual configuration says epsilon."""
    folder, file = write_sdxl(tmp_path / "folder"), tmp_path / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in load_model(str(folder)).original_layout().items()}
    save_file(tensors | {mark: torch.empty(0) for mark in marks}, file)
    config = load_model(str(file), base_config=str(folder)).noise_scheduler().config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr == zero_snr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("edm_vpred.sigma_max", "a model with EDM's noise, such as CosXL"),
        ("model.diffusion_model.scaled_fp8", "its weights are quantised, with scales"),
        ("model.diffusion_model.out.2.scale_weight", "its weights are quantised, with scales"),
        ("text_encoders.clip_l.transformer.a.weight_scale", "its weights are quantised, with scales"),
    ],
)
def test_what_the_converters_would_pass_over_is_refused(checkpoint, tmp_path, name, said):
    folder, file = checkpoint
    save_file(load_file(file) | {name: torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=rf"odd\.safetensors: {said}"):
        load_model(str(tmp_path / "odd.safetensors"), base_config=str(folder))


def test_reading_a_file_shows_nothing(checkpoint, capfd):
    """diffusers has a progress bar, and a warning of its own cast to another dtype."""
    folder, file = checkpoint
    load_model(str(file), base_config=str(folder), dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_does_not_fit_into_memory_is_refused(checkpoint, monkeypatch):
    folder, file = checkpoint
    monkeypatch.setattr(memory, "free_memory", lambda device: file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"not enough memory for .*model\.safetensors"):
        load_model(str(file), base_config=str(folder))


def test_without_a_network_one_line_says_what_to_give(checkpoint, monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("no network\nand many more lines")

    monkeypatch.setattr(models_module, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"model\.safetensors needs the configuration of .*--base_config") as caught:
        load_model(str(checkpoint[1]))
    assert "\n" not in str(caught.value)


def test_the_usual_configuration_is_asked_for_without_weights(checkpoint, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, allow_patterns))
        return str(checkpoint[0])

    monkeypatch.setattr(models_module, "snapshot_download", download)
    load_model(str(checkpoint[1]))
    ((name, patterns),) = asked
    assert "/" in name
    assert not any("safetensors" in pattern or pattern in ("*", "*/*") for pattern in patterns)


def test_a_file_that_lacks_weights_is_refused(checkpoint, tmp_path):
    folder, file = checkpoint
    weights = load_file(file)
    name = next(name for name in weights if ".middle_block." in name or ".joint_blocks.1." in name)
    del weights[name]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part\.safetensors") as caught:
        load_model(str(tmp_path / "part.safetensors"), base_config=str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_training_takes_the_configuration_that_is_named(checkpoint, photos, tmp_path):
    folder, file = checkpoint
    model = {"pretrained_model_name_or_path": str(file), "base_config": str(folder)}
    quick = {"max_train_steps": 1, "num_validation_images": 0, "report_to": "none", "adapter": AdapterConfig(nblocks=4)}
    data = {"instance_data_dir": str(photos), "class_word": "dog", "output_dir": str(tmp_path / "out")}
    assert train(TrainingConfig(**model, **quick, **data)).adapter.is_file()


def test_a_file_of_other_sizes_is_refused(checkpoint, tmp_path):
    folder, file = checkpoint
    weights = load_file(file)
    name = next(name for name in weights if name.endswith((".out.2.weight", ".final_layer.linear.weight")))
    weights[name] = torch.cat([weights[name], weights[name]], dim=1)
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"cannot load .*odd\.safetensors"):
        load_model(str(tmp_path / "odd.safetensors"), base_config=str(folder))


@pytest.mark.parametrize("name", ["unet.a.q_in", "lora_unet_a.lora_up.weight", "conv_in.weight"])
def test_a_file_of_something_else_is_refused(tmp_path, name):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors: holds no whole model; name a checkpoint, and no adapter"):
        load_model(str(tmp_path / "lora.safetensors"))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.safetensors: not a readable safetensors file"):
        load_model(str(tmp_path / "bad.safetensors"))


def test_pickled_and_missing_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="can run code"):
        load_model(str(tmp_path / "model.ckpt"))
    with pytest.raises(UserError, match="no model file"):
        load_model(str(tmp_path / "nowhere.safetensors"))
