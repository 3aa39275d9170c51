from __future__ import annotations

import os

import pytest

from gsoft_diffusion.config import GenerationConfig, TrainingConfig
from gsoft_diffusion.config.command_line import parse
from gsoft_diffusion.config.launcher import check_launched, process_count
from gsoft_diffusion.foundation.errors import UserError

BASIC = ["--instance_data_dir", "photos", "--class_word", "dog"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "DIFFUSERS_ATTN_BACKEND"):
            monkeypatch.delenv(name)


def training(*arguments: str) -> TrainingConfig:
    return parse(TrainingConfig, "", [*BASIC, *arguments])


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "no", "mixed_precision", "no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps", 4),
        ("DIFFUSERS_ATTN_BACKEND", "native", "attention_backend", "native"),
    ],
)
def test_what_is_not_given_is_the_launchers(monkeypatch, variable, value, name, expected):
    monkeypatch.setenv(variable, value)
    assert getattr(training(), name) == expected
    assert getattr(training(f"--{name}", value), name) == expected


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("ACCELERATE_USE_CPU", "true", "cpu"), ("ACCELERATE_TORCH_DEVICE", "cuda:1", "cuda:1")],
)
def test_inference_takes_the_launchers_device_and_precision(monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    config = parse(GenerationConfig, "", ["--adapter", "a"])
    assert (config.device, config.mixed_precision) == (expected, "fp16")
    with pytest.raises(UserError, match=f"--device mps: {variable} says {expected}"):
        parse(GenerationConfig, "", ["--adapter", "a", "--device", "mps"])


def test_a_flag_may_choose_where_the_launcher_has_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher says if nobody told it anything
    assert training("--mixed_precision", "bf16").mixed_precision == "bf16"


def test_a_file_and_the_launcher_may_not_disagree(monkeypatch, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("mixed_precision: no\n")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="--mixed_precision no: ACCELERATE_MIXED_PRECISION says bf16"):
        training("--config", str(path))


@pytest.mark.parametrize(
    ("variable", "value", "flags", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["--mixed_precision", "no"], "--mixed_precision no"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", [], "fp8: give the launcher one of no, fp16, bf16"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "1",
            ["--gradient_accumulation_steps", "4"],
            "--gradient_accumulation_steps 4: ACCELERATE_GRADIENT_ACCUMULATION_STEPS says 1",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", [], "must be a whole number"),
        ("ACCELERATE_USE_DEEPSPEED", "true", [], "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "true", [], "FSDP is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", [], "Megatron-LM is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", [], "give --compile instead"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", [], "--max_grad_norm"),
        ("WORLD_SIZE", "2", [], "no launcher has started this process"),
        ("WORLD_SIZE", "two", [], "must be a whole number"),
    ],
)
def test_what_cannot_be_had_is_refused(monkeypatch, variable, value, flags, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        training(*flags)


def test_what_launchers_set_without_being_asked_is_no_reason_to_refuse(monkeypatch):
    plain = training()
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_USE_FSDP": "false",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert training() == plain
    assert process_count() == 2
    check_launched(plain.to_dict())


def test_inference_is_not_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="runs in one process, and 2 were launched"):
        parse(GenerationConfig, "", ["--adapter", "a"])
