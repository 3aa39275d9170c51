from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gsoft_diffusion.config import AdapterConfig, Concept, GenerationConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.config.command_line import command, parse, run
from gsoft_diffusion.foundation.errors import UserError

BASIC = ["--instance_data_dir", "photos", "--class_word", "dog"]


def training(*arguments: str) -> TrainingConfig:
    return parse(TrainingConfig, "", [*BASIC, *arguments])


def test_without_flags_the_defaults_hold():
    assert training() == TrainingConfig("photos", class_word="dog")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--resolution", "256"], "resolution", 256),
        (["--resolution", "none"], "resolution", None),
        (["--random_flip"], "random_flip", True),
        (["--no_cache_latents"], "cache_latents", False),
        (["--no-cache_latents"], "cache_latents", False),
        (["--cache_latents"], "cache_latents", True),
        (["--lr_scheduler", "cosine"], "lr_scheduler", "cosine"),
        (["--validation_prompt", "a b", "--validation_prompt", "c"], "validation_prompts", ("a b", "c")),
        (["--validation_prompts", "a b", "c"], "validation_prompts", ("a b", "c")),
        (["--nblocks", "4"], "adapter", AdapterConfig(nblocks=4)),
        (["--block_size", "4"], "adapter", AdapterConfig(block_size=4)),
        (["--block_size", "4", "--nfactors", "3"], "adapter", AdapterConfig(block_size=4, nfactors=3)),
        (["--block_size", "4", "--nfactors", "dense"], "adapter", AdapterConfig(block_size=4, nfactors="dense")),
        (["--nblocks", "4", "--one_sided"], "adapter", AdapterConfig(nblocks=4, double=False)),
        (["--nblocks", "4", "--no_output_scale"], "adapter", AdapterConfig(nblocks=4, output_scale=False)),
        (["--nblocks", "4", "--no_train_text_encoder"], "adapter", AdapterConfig(nblocks=4, text_encoder=False)),
        (["--quantize_base", "nf4"], "quantize_base", "nf4"),
        (["--quantize_base", "none"], "quantize_base", None),
        (["--guidance_scale", "2"], "sampler", SamplerConfig(guidance_scale=2.0)),
    ],
)
def test_flags(arguments, name, value):
    assert getattr(training(*arguments), name) == value


def test_several_adapters():
    arguments = ["--adapter", "a", "b", "--adapter", "c", "--strength", "1", "0.6", "-0.5", "--prompt", "x"]
    config = parse(GenerationConfig, "", arguments)
    assert config.strengths == {"a": 1.0, "b": 0.6, "c": -0.5}
    assert parse(GenerationConfig, "", ["--adapter", "a"]).strengths == {"a": 1.0}


def test_part_of_the_adapter_keeps_its_default_size():
    default = TrainingConfig("photos", class_word="dog").adapter
    assert training("--one_sided").adapter == AdapterConfig(**(default.to_dict() | {"double": False}))


def test_file_with_flags_on_top(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "instance_data_dir: there\nclass_word: cat\nlearning_rate: 1e-3\nmixed_precision: no\n"
        "validation_prompts: [a, b]\nadapter: {nblocks: 8, double: false}\nsampler: {num_inference_steps: 5}\n"
    )
    arguments = ["--config", str(path), "--class_word", "dog", "--block_size", "2", "--validation_prompt", "c"]
    config = parse(TrainingConfig, "", arguments)
    assert config == TrainingConfig(
        "there",
        class_word="dog",
        learning_rate=1e-3,
        validation_prompts=("c",),
        adapter=AdapterConfig(block_size=2, double=False),
        sampler=SamplerConfig(num_inference_steps=5),
    )


def test_written_settings_are_read_back(tmp_path):
    config = training("--nblocks", "4", "--learning_rate", "3e-7", "--mixed_precision", "bf16").resolved()
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml())
    assert parse(TrainingConfig, "", ["--config", str(path)]) == config


@pytest.mark.parametrize(
    "arguments",
    [
        ["--learning_rte", "1"],
        ["--learning_rate", "fast"],
        ["--max_train_steps", "1.5"],
        ["--lr_scheduler", "zigzag"],
        ["--nfactors", "many"],
        ["--learning", "1"],  # no guessing from a beginning
    ],
)
def test_wrong_flags_exit_with_status_2_naming_the_flag(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        training(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_what_is_required_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse(GenerationConfig, "", [])
    assert "give --adapter" in capsys.readouterr().err
    with pytest.raises(UserError, match="--instance_data_dir: name the folder"):
        parse(TrainingConfig, "", [])


CONCEPTS = (Concept("dogs", "dog"), Concept("cats", "cat", unique_token="zwx", class_prompt="cats"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "concepts.json",
            '[\n\t{"instance_data_dir": "dogs", "class_word": "dog"},\n\t{"instance_data_dir": "cats", '
            '"class_word": "cat", "unique_token": "zwx", "class_prompt": "cats"}\n]',
        ),
        (
            "concepts.yaml",
            "- {instance_data_dir: dogs, class_word: dog}\n"
            "- instance_data_dir: cats\n  class_word: cat\n  unique_token: zwx\n  class_prompt: cats\n",
        ),
    ],
)
def test_several_subjects_from_a_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    config = parse(TrainingConfig, "", ["--concepts_list", str(path)])
    assert config == TrainingConfig(concepts_list=CONCEPTS)
    settings = tmp_path / "settings.yaml"
    settings.write_text(config.resolved().to_yaml())
    assert parse(TrainingConfig, "", ["--config", str(settings)]) == config.resolved()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list"),
        ("[]", "expected a list"),
        ("a: b", "expected a list"),
        ("[", "cannot read"),
        ("- dogs", "'dogs' is not settings of Concept"),
        ("- {instance_data_dir: dogs, class_word: dog, class_word: cat}", "class_word comes twice"),
        ("- {class_word: dog}", "instance_data_dir must be given"),
        ("- {instance_data_dir: dogs}", "--class_word: name what the photos in dogs"),
        ("- {instance_data_dir: dogs, class_wrd: dog}", "unknown setting class_wrd; known: class_word"),
        ("- {instance_data_dir: dogs, class_word: 5}", "class_word: 5 is not a text"),
    ],
)
def test_a_list_of_subjects_that_is_wrong(tmp_path, text, message):
    path = tmp_path / "concepts.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse(TrainingConfig, "", ["--concepts_list", str(path)])


def test_a_list_of_subjects_that_is_not_there():
    with pytest.raises(UserError, match=r"nowhere\.json"):
        parse(TrainingConfig, "", ["--concepts_list", "nowhere.json"])


def test_both_sizes_are_refused():
    with pytest.raises(UserError, match="--nblocks"):
        training("--nblocks", "4", "--block_size", "4")


@pytest.mark.parametrize("config_class", [TrainingConfig, GenerationConfig])
def test_help_says_something_on_every_field(config_class, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(config_class, "what it does", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    names = {field.name for field in fields(config_class)} - {"adapter", "sampler"}
    assert all(f"--{name}" in text for name in names)


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["train_dreambooth_gsoft.py", "inference.py", "export.py"])
@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--nothing"], 2), (["--config", "nowhere"], 2)])
def test_help_and_mistakes_need_no_library_that_takes_seconds(script, arguments, status):
    process = [sys.executable, "-X", "importtime", REPOSITORY / script, *arguments]
    done = subprocess.run(process, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert done.returncode == status
    assert "gsoft_diffusion.config.training" in imported
    assert not imported & {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL"}


def fails() -> int:
    raise UserError("that file:\n  is broken")


def stopped() -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("main", "status"), [(lambda: 0, 0), (fails, 2), (stopped, 130), (lambda: 130, 130)])
def test_exit_status(main, status):
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit):
        run(fails)
    assert capsys.readouterr().err == "error: that file: is broken\n"


HELD_UP = """
import time
from gsoft_diffusion.config.command_line import run
from gsoft_diffusion.foundation.errors import UserError

class WaitsForItsPeers:
    def __del__(self):
        time.sleep(60)

def main():
    group = WaitsForItsPeers()
    raise UserError("a peer has ended")

run(main)
"""


def test_one_of_several_processes_ends_without_waiting_for_the_others():
    environment = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", HELD_UP], env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (2, "error: a peer has ended\n")


def test_scripts_are_called_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert command("gsoft-draw") == "python inference.py"
    monkeypatch.chdir(tmp_path)
    assert command("gsoft-draw") == f"python {REPOSITORY / 'inference.py'}"


def test_an_installation_has_console_scripts(monkeypatch):
    monkeypatch.setattr("gsoft_diffusion.config.command_line.CHECKOUT", None)
    assert command("gsoft-draw") == "gsoft-draw"
