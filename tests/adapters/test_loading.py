"""Finding the base model that an adapter belongs to."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import save_file
from tiny_models import randomise

from gsoft_diffusion.adapters.file import read_adapter, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.loading import family_of_base, load_base
from gsoft_diffusion.config import AdapterConfig, ExportConfig, GenerationConfig
from gsoft_diffusion.config.command_line import parse
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models import loading as models_loading
from gsoft_diffusion.models.families import StableDiffusion
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.single_file import usual_config


def test_what_is_said_of_the_base_does_not_steer_a_terminal(base, tmp_path, capfd):
    """Its place comes from the settings beside the adapter, which anyone may have written."""
    place = tmp_path / "\x1b[2Jmodels"
    place.mkdir()
    (place / base.name).symlink_to(base)
    model = load_model(str(base))
    identity = identity_of(model)
    adapter = inject(AdapterConfig(nblocks=4), model.unet, [model.text_encoder])
    randomise(adapter)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, base_model=identity, training={}, prompts={})
    (tmp_path / "settings.yaml").write_text(f'pretrained_model_name_or_path: "{tmp_path}/\\e[2Jmodels/{base.name}"\n')
    load_base(read_adapter(path))
    said = capfd.readouterr().out
    assert f"base model: {tmp_path}/\N{REPLACEMENT CHARACTER}[2Jmodels/{base.name}, as " in said
    assert "\x1b" not in said


def adapter_of(model, path, **training):
    """The file of an adapter that changes the model a little, and says so much of its training."""
    identity = identity_of(model)
    adapter = inject(AdapterConfig(nblocks=4), model.unet, [model.text_encoder])
    randomise(adapter)
    save_adapter(path, adapter, base_model=identity, training=training, prompts={})
    return read_adapter(path)


@pytest.fixture
def half(base, tmp_path):
    """The tiny base, whose weights are there as the variant fp16 alone."""
    folder = shutil.copytree(base, tmp_path / "half")
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (folder / part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    return folder


def test_a_base_that_has_moved_keeps_the_variant_that_it_was_trained_in(base, half, tmp_path):
    file = adapter_of(load_model(str(base)), tmp_path / "adapter.safetensors", variant="fp16")
    load_base(file, str(half))
    load_base(file, str(base))  # has no such files, so the plain ones are taken
    assert family_of_base(file, str(half)) is StableDiffusion


def test_a_variant_that_training_did_not_need_can_be_given(base, half, tmp_path):
    file = adapter_of(load_model(str(base)), tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match="give --variant fp16"):
        load_base(file, str(half))
    load_base(file, str(half), variant="fp16")
    parse(GenerationConfig, "", ["--adapter", "a", "--variant", "fp16"])
    parse(ExportConfig, "", ["--adapter", "a", "--format", "diff", "--variant", "fp16"])


def test_a_configuration_that_is_not_there_counts_as_none(base, tmp_path, monkeypatch, capfd):
    """As the adapter's file has no more of its name than the folder's."""
    model = load_model(str(base))
    place = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.original_layout().items()}, place)
    file = adapter_of(model, tmp_path / "adapter.safetensors", base_config="cfg")
    asked = []
    monkeypatch.setattr(models_loading, "_fetch", lambda name, *_: asked.append(name) or base)
    load_base(file, str(place))
    assert "note: the configuration cfg, which " in capfd.readouterr().out
    assert asked == [usual_config(str(place))]
    load_base(file, str(place), base_config=str(base))
    assert len(asked) == 1
    parse(GenerationConfig, "", ["--adapter", "a", "--base_config", "cfg"])
    parse(ExportConfig, "", ["--adapter", "a", "--format", "diff", "--base_config", "cfg"])


@pytest.mark.parametrize(("place", "given"), [("folder", "base_config"), ("model.safetensors", "variant")])
def test_a_version_that_the_base_cannot_have_is_refused(base, tmp_path, place, given):
    file = adapter_of(load_model(str(base)), tmp_path / "adapter.safetensors")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"--{given} would have no effect: .*{place} is .*; leave it out"):
        load_base(file, str(tmp_path / place), **{given: "fp16"})
