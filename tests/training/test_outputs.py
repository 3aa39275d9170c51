"""What a run writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.training import outputs as outputs_module
from gsoft_diffusion.training import train as training
from gsoft_diffusion.training import validation as validation_module
from gsoft_diffusion.training.train import train


def test_an_adapter_does_not_tell_where_the_photos_were(config):
    content = train(config).adapter.read_bytes()
    assert config.instance_data_dir.encode() not in content
    assert b"instance_data_dir" not in content


def test_the_adapter_records_the_name_that_was_trained(config):
    config = replace(config, class_word="teddy bear", instance_prompt="a photo of zwx teddy bear", max_train_steps=1)
    file = read_adapter(train(config).adapter)
    assert (file.subjects[0]["unique_token"], file.subjects[0]["class_word"]) == ("zwx", "teddy bear")


def test_an_adapter_names_no_folder_of_the_base(config, base):
    content = train(replace(config, max_train_steps=1)).adapter.read_bytes()
    assert str(base.parent).encode() not in content


def test_what_was_trained_elsewhere_with_relative_paths_is_drawn_and_exported_from_anywhere(
    config, base, tmp_path, monkeypatch, capfd
):
    from gsoft_diffusion.config import ExportConfig, GenerationConfig
    from gsoft_diffusion.publish.export import export
    from gsoft_diffusion.sampling.drawing import draw

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mini").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    config = replace(config, instance_data_dir="photos", pretrained_model_name_or_path="models/mini", output_dir="dog")
    adapter = train(replace(config, checkpointing_steps=2)).adapter.absolute()
    printed = capfd.readouterr().out
    script = Path(training.__file__).parents[2] / "inference.py"
    assert f"try it: python {script} --adapter dog/adapter.safetensors --prompt" in printed
    file = read_adapter(adapter)
    assert (file.base_model.name, file.training["pretrained_model_name_or_path"]) == ("mini", "mini")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for trained in (adapter, adapter.parent / "checkpoint-2"):
        draw(GenerationConfig((str(trained),), prompts=("a {0} {1}",), num_images=1))
        card = export(ExportConfig((str(trained),), "checkpoint")).with_suffix(".md").read_text()
        assert "models" not in card.replace("whole models", "").partition("## Licence")[0]
        assert "| base model | mini |" in card
    assert sorted(path.name for path in adapter.parent.glob("merged*.safetensors")) == [
        "merged.safetensors",
        "merged_checkpoint-2.safetensors",
    ]
    assert f"base model: {tmp_path}/models/mini, as {adapter.parent}/settings.yaml says" in capfd.readouterr().out


def test_a_model_card_is_written_with_the_result(config, tmp_path):
    folder = train(replace(config, num_validation_images=1)).adapter.parent
    card = (folder / "README.md").read_text()
    assert "instance_prompt: a photo of a sks dog" in card
    assert "](validation/step-000004.png)" in card
    assert "| steps | 4 |" in card
    assert str(tmp_path) not in card
    assert str(Path(config.pretrained_model_name_or_path).parent) not in card


def test_a_card_of_ones_own_stays(config, capfd):
    config = replace(config, checkpointing_steps=4)
    card = train(config).adapter.parent / "README.md"
    card.write_text("my own words")
    train(replace(config, resume_from_checkpoint="latest", max_train_steps=5))
    assert card.read_text() == "my own words"
    assert "stays as you wrote it" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("step-000004.png", r"cannot write .*step-000004\.png: No space left on device; checkpoints are intact"),
        ("README.md", r"cannot write .*README\.md: No space left on device; the adapter is in .*adapter\.safetensors"),
    ],
)
def test_what_a_full_disk_stops_is_named(config, monkeypatch, name, message):
    original = outputs_module.whole_file

    def whole_file(path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return original(path)

    for module in (outputs_module, validation_module):
        monkeypatch.setattr(module, "whole_file", whole_file)
    with pytest.raises(UserError, match=message):
        train(replace(config, num_validation_images=1))
    assert (Path(config.output_dir or "") / "adapter.safetensors").exists()
