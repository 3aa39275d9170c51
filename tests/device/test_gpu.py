"""What only a real GPU can show. Without one these tests are skipped; `benchmarks/gpu.sh` runs them first.

`tests/training/test_on_gpu.py` runs every family on a pretended GPU, with more switches.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import write_photos
from PIL import Image
from plain_models import randomise
from tiny_families import WRITERS
from torch import nn
from training_runs import difference, few_steps

import gsoft
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig, ExportConfig, GenerationConfig, TrainingConfig
from gsoft_diffusion.models.families import FAMILIES, StableDiffusion
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.sampling.drawing import draw
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.step_memory import step_bytes
from gsoft_diffusion.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and PyTorch built with CUDA"),
]


@pytest.fixture(autouse=True)
def exact_convolutions():
    """float32 as on the CPU: GPUs round convolutions to TF32 unless they are told not to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def config(request, tmp_path) -> TrainingConfig:
    """Three steps of a tiny model of each family."""
    base = WRITERS[request.param](tmp_path / "base")
    return few_steps(base, write_photos(tmp_path / "photos"), tmp_path / "run")


@pytest.fixture
def sd_config(tmp_path) -> TrainingConfig:
    """Three steps of a tiny Stable Diffusion."""
    base = WRITERS[StableDiffusion](tmp_path / "base")
    return few_steps(base, write_photos(tmp_path / "photos"), tmp_path / "run")


def train_anew(config: TrainingConfig) -> dict[str, torch.Tensor]:
    """The adapter of a run for which accelerate chooses the device again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return read_adapter(train(config).adapter).tensors


def test_a_rotated_model_has_the_cpu_s_outputs_and_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))
    adapter = gsoft.inject(model, gsoft.Config(nblocks=4))
    randomise(adapter)
    x = torch.randn(4096, 48)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        adapter.to(device)
        adapter.zero_grad()
        y = model(x.to(device))
        y.square().mean().backward()
        gradients = [parameter.grad.to("cpu", copy=True) for parameter in adapter.parameters()]  # `to` moves them too
        found.append((y.detach().cpu(), gradients))
    torch.testing.assert_close(*(y for y, _ in found), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(gradients for _, gradients in found), rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        before = model(x.cuda())
        adapter.merge()
        torch.testing.assert_close(model(x.cuda()), before, rtol=1e-4, atol=1e-5)


def test_training_drawing_and_exporting_have_the_cpu_s_numbers(config, tmp_path, monkeypatch):
    on_gpu = train_anew(config)
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        on_cpu = train_anew(replace(config, output_dir=str(tmp_path / "cpu")))
    assert difference(on_gpu, on_cpu) < 1e-3
    pictures = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / f"pictures-{device}"
        adapter = (config.output_dir or "",)
        draw(GenerationConfig(adapter, prompts=("a dog",), num_images=1, device=device, output_dir=str(folder)))
        (path,) = folder.glob("0*.png")
        pictures.append(np.asarray(Image.open(path), dtype=int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1
    assert (export(ExportConfig(adapter, "diffusers")) / "model_index.json").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "cpu_offload": True, "gradient_checkpointing": True},
        {"mixed_precision": "fp16", "cache_latents": False, "dataloader_num_workers": 1},
        {"mixed_precision": "fp16", "gradient_accumulation_steps": 2},
        {"optimizer": "adamw8bit"},
        {"mixed_precision": "bf16", "quantize_base": "nf4"},
        {"mixed_precision": "bf16", "quantize_base": "float8", "offload_layers": True},
        {"mixed_precision": "bf16", "attention_backend": "xformers"},
    ],
    ids=str,
)
def test_settings_that_train_and_resume(sd_config, changes):
    libraries = {"adamw8bit": "bitsandbytes", "nf4": "bitsandbytes", "xformers": "xformers"}
    for library in {libraries[value] for value in changes.values() if value in libraries}:
        pytest.importorskip(library)
    config = replace(sd_config, **changes)
    whole = train_anew(config)
    assert max(tensor.abs().max() for name, tensor in whole.items() if not name.endswith("output_scale")) > 0
    (Path(config.output_dir or "") / "adapter.safetensors").unlink()
    assert difference(train_anew(replace(config, resume_from_checkpoint="latest")), whole) < 1e-3


def test_a_step_waits_for_the_gpu_once(sd_config, monkeypatch):
    """PyTorch itself says where: for the loss, with the gradients' norm."""
    update, steps = TrainingStep.update, []

    def watched(step, *arguments):
        update(step, *arguments)
        steps.append([warning for warning in said if "synchroniz" in str(warning.message)])
        said.clear()

    monkeypatch.setattr(TrainingStep, "update", watched)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_anew(replace(sd_config, checkpointing_steps=0, num_validation_images=0, max_train_steps=4))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(steps[2]) == 1, [f"{warning.filename}:{warning.lineno}" for warning in steps[2]]


def test_the_estimate_of_a_step_s_memory_is_a_lower_bound(sd_config):
    """And not a far one: kernels' own memory and rounding of sizes come on top."""
    model = load_model(sd_config.pretrained_model_name_or_path, device="cuda")
    adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
    shape = model.latent_shape(256)
    estimated = step_bytes(model, adapter, 8, shape, trains_text=True)
    predictor = Predictor(model, adapter, [""]).train()
    numbers = torch.zeros(8, dtype=torch.long, device="cuda")

    def step() -> None:
        latents, views = torch.zeros(8, *shape, device="cuda"), torch.zeros(8, 6, device="cuda")
        predictor(latents, numbers, numbers[:1], numbers, views).square().mean().backward()
        adapter.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken / 3 < estimated < 1.1 * taken
