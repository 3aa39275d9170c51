from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_models import randomise, run, tiny_text_encoder, tiny_unet
from torch import nn

from benchmarks import choosing, keeping, sampling, step_memory, trainer
from benchmarks.bases import SDXL
from benchmarks.measure import Records, bytes_in_use, file_to_write
from benchmarks.peft_boft import PeftButterflyLinear, compute_as_peft
from benchmarks.pretended_gpu import PretendedGPU
from benchmarks.published import PublishedAdapter, PublishedLinear
from benchmarks.step import METHODS, Bench, report
from eval.baselines import BaselineConfig, inject_baseline
from eval.methods import count_parameters, matched
from eval.subjects import BUNDLED, read_subjects
from gsoft.blocks import skew_symmetric
from gsoft.linear import RotatedLayer
from gsoft.rotation import Rotation
from gsoft_diffusion import AdapterConfig
from gsoft_diffusion.adapters.injection import find_attentions, find_linears
from gsoft_diffusion.training.run import TrainingResult


def test_the_published_formulation_is_the_same_map():
    """Equal output and gradient by x at equal rotations and scales, so that only speed is compared."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).requires_grad_(False)
    config = AdapterConfig(nblocks=4, parametrization="cayley")
    ours, published = RotatedLayer(Rotation(config, 24, 40)), PublishedLinear(linear, config)
    learned = ours.rotation
    randomise(learned)
    with torch.no_grad():
        published.q_in.copy_(skew_symmetric(learned.q_in, 6).triu())  # A − Aᵀ is the skew block
        published.q_out.copy_(skew_symmetric(learned.q_out, 10).triu())
        published.output_scale.copy_(learned.output_scale)
    x = torch.randn(2, 5, 24, requires_grad=True)
    outputs = [ours(linear, x), published(x)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs))


def test_the_published_adapter_is_put_in_and_taken_out():
    unet = tiny_unet().requires_grad_(False)
    before, modules = run(unet), dict(unet.named_modules())
    adapter = PublishedAdapter(AdapterConfig(block_size=4), unet, [])
    torch.testing.assert_close(run(unet), before)
    run(unet).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable())
    adapter.remove()
    assert dict(unet.named_modules()) == modules
    assert torch.equal(run(unet), before)


def test_boft_as_peft_computes_it_is_the_same_map():
    """Two independent ways to multiply the factors: equal output, equal gradients."""
    unet = tiny_unet().requires_grad_(False)
    adapter = inject_baseline(BaselineConfig("boft", block_size=4, nfactors=2, text_encoder=False), unet)
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("scale")), std=0.2)
    found = []
    for change in (lambda: None, lambda: compute_as_peft([unet])):
        change()
        y = run(unet)
        found.append((y, torch.autograd.grad(y.square().sum(), list(adapter.parameters()))))
    torch.testing.assert_close(*(y for y, _ in found))
    torch.testing.assert_close(*(gradients for _, gradients in found), rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, PeftButterflyLinear) for module in unet.modules())


def settings(device: str = "cpu", **changes: object) -> Namespace:
    """What a benchmark's command line says of a tiny model."""
    usual = {"base": "tiny", "dtype": "float32", "latents": 8, "batch": 2, "clock": "wall", "compile": False}
    return Namespace(**(usual | {"device": torch.device(device)} | changes))


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_and_taken_out(monkeypatch, method, text_encoder):
    unet, text = tiny_unet().requires_grad_(False), tiny_text_encoder().requires_grad_(False)
    monkeypatch.setattr("benchmarks.step.load_base", lambda name, dtype, device: (unet, text, 8))
    bench = Bench(settings(gradient_checkpointing=False, text_encoder=text_encoder))
    before, modules = run(unet), dict(unet.named_modules())
    names = {name for name, _ in unet.named_parameters()}
    result = bench.measure(method, steps=1)
    assert result["parameters"] > 0
    assert len(result["seconds"]) == 1
    assert (dict(unet.named_modules()), {name for name, _ in unet.named_parameters()}) == (modules, names)
    assert torch.equal(run(unet), before)


def test_sampling_is_measured_in_every_state(monkeypatch, tmp_path):
    unet, text = tiny_unet().requires_grad_(False), tiny_text_encoder().requires_grad_(False)
    monkeypatch.setattr("benchmarks.sampling.load_base", lambda name, dtype, device: (unet, text, 8))
    before, modules = run(unet), dict(unet.named_modules())
    records = Records(tmp_path / "sampling.json", {})
    sampling.measure(settings(states=list(sampling.STATES)), [0, 1], records)
    assert [set(record["seconds"]) for record in records.records] == [set(sampling.STATES)] * 2
    assert "as published" in sampling.report(records.records)
    assert dict(unet.named_modules()) == modules
    assert torch.equal(run(unet), before)


def test_sampling_is_reported_without_the_base_model():
    report = sampling.report([{"repetition": 0, "seconds": {"unmerged": 0.2, "merged": 0.1}}])
    assert "| merged | 0.100 |  |" in report


@pytest.mark.slow
def test_the_bundled_base_is_measured():
    """Its latents have eight channels."""
    options = {"gradient_checkpointing": False, "text_encoder": False}
    args = settings(base="mini", batch=1, **options)
    assert Bench(args).measure("floor", steps=1)["parameters"] > 0
    assert set(sampling.Bench(args).measured(["base"])["seconds"]) == {"base"}
    assert step_memory.measure("mini", "float32", 8, 1, False)["estimated_bytes"] > 0


def tiny_sdxl() -> UNet2DConditionModel:
    """A UNet of one level that is told of pooled text and sizes."""
    unet = tiny_unet(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return unet.requires_grad_(False)


@pytest.mark.slow
def test_every_method_is_measured_on_a_gpu(monkeypatch, tmp_path):
    """A pretended one, which shows that nothing is left on the CPU."""
    unet = tiny_sdxl()
    for module in ("step", "sampling"):
        monkeypatch.setattr(f"benchmarks.{module}.load_base", lambda name, dtype, device: (unet.to(device), None, 8))
    options = {"gradient_checkpointing": False, "text_encoder": False}
    with PretendedGPU() as gpu:
        bench = Bench(settings("cuda", **options, clock="gpu"))
        for method in METHODS:
            gpu.reset()
            assert bench.measure(method, steps=1)["parameters"] > 0
            assert gpu.kernels.total() > 500
        records = Records(tmp_path / "sampling.json", {}, torch.device("cuda"))
        sampling.measure(settings("cuda", states=list(sampling.STATES), clock="gpu"), [0], records)
    assert set(records.records[0]["seconds"]) == set(sampling.STATES)
    assert records.content["machine"]["gpu"]["name"] == "pretended GPU"


def test_memory_that_runs_out_is_recorded_and_the_method_taken_out(monkeypatch):
    unet = tiny_sdxl()
    monkeypatch.setattr("benchmarks.step.load_base", lambda name, dtype, device: (unet, None, 8))
    bench = Bench(settings(gradient_checkpointing=False, text_encoder=False))
    modules = dict(unet.named_modules())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "_loss", full)
    found = bench.measured("lora", steps=1)
    assert found == {"error": "out of memory"}
    assert dict(unet.named_modules()) == modules
    assert report([{"repetition": 0, "method": "lora", **found}]).startswith("|  | step, s |")


def test_a_compiled_model_is_measured(monkeypatch, tmp_path):
    """Compiled for each method anew, as the one before has left its mark."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda unet: compiled.append(unet) or unet)
    unet = tiny_sdxl()
    for module in ("step", "sampling"):
        monkeypatch.setattr(f"benchmarks.{module}.load_base", lambda name, dtype, device: (unet, None, 8))
    bench = Bench(settings(gradient_checkpointing=False, text_encoder=False, compile=True))
    for method in ("floor", "lora"):
        bench.measure(method, steps=1)
    records = Records(tmp_path / "sampling.json", {})
    sampling.measure(settings(compile=True, states=["base", "lora"]), [0], records)
    assert compiled == [unet] * 4


@pytest.mark.slow
def test_sdxl_is_as_large_as_the_published_one_and_every_method_fits():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    layers = find_linears(find_attentions(unet), {})
    sizes = {
        method: count_parameters(matched(method, "small", layers, text_encoder=False), layers)
        for method in ("lora", "oft", "boft", "double_gsoft")
    }
    assert all(55e6 < (size or 0) < 75e6 for size in sizes.values())


@pytest.mark.slow
def test_the_training_loop_is_measured_beside_bare_steps():
    seconds = trainer.measure(steps=2)
    assert seconds.keys() == {"trained", "bare"}
    assert min(seconds.values()) > 0
    assert "| bare |" in trainer.report([seconds])


def test_measurements_are_kept_as_they_come(tmp_path):
    path = tmp_path / "results" / "step.json"
    Records(path, {"batch": 1}).add(repetition=0, method="lora", seconds=[1.0])
    again = Records(path, {"batch": 1})
    assert again.has(repetition=0, method="lora")
    assert not again.has(repetition=1, method="lora")
    again.add(repetition=1, method="lora", seconds=[2.0])
    assert len(json.loads(path.read_text())["records"]) == 2
    with pytest.raises(SystemExit, match="other settings"):
        Records(path, {"batch": 4})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"records": []}', None])
def test_a_file_of_something_else_is_not_gone_on_with(tmp_path, content):
    path = tmp_path / "step.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(SystemExit, match=r"step\.json: holds no measurements that can be gone on with; give another"):
        Records(path, {"batch": 1})


def test_the_folder_of_what_takes_minutes_is_made_before(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_to_write("~/new/out.json") == tmp_path / "new" / "out.json"
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    for wrong, why in ((tmp_path / "new", "is a folder"), (tmp_path / "file" / "out.json", "choose another place")):
        with pytest.raises(ArgumentTypeError, match=why):
            file_to_write(str(wrong))


@pytest.mark.parametrize("module", [choosing, keeping, trainer])
def test_a_training_that_a_signal_ended_is_no_measurement(tmp_path, monkeypatch, module):
    result = TrainingResult(tmp_path / "adapter.safetensors", steps=3, interrupted=True, seconds=1.0)
    monkeypatch.setattr(module, "train", lambda config: result)
    subject = next(subject for subject in read_subjects(BUNDLED) if subject.name == "teddy_bear")
    settings = Namespace(steps=4, validations=2, batch_size=1)
    arguments = {choosing: (settings, subject, 1e-4), keeping: (settings, subject, 0, "none"), trainer: (4,)}
    with pytest.raises(KeyboardInterrupt):
        module.measure(*arguments[module])


def test_ratios_are_taken_within_a_repetition():
    def record(repetition, method, seconds):
        memory = {"kept_bytes": 2**20, "peak_bytes": None}
        return {"repetition": repetition, "method": method, "seconds": seconds, "parameters": 7, **memory}

    slow_machine = [record(0, "floor", [2.0, 1.0]), record(0, "lora", [1.1]), record(0, "double_gsoft", [1.2])]
    fast_machine = [record(1, "floor", [0.1]), record(1, "double_gsoft", [0.14])]
    lines = report(slow_machine + fast_machine).splitlines()
    assert lines[2].split("|")[2:5] == [" 0.550 ", " 1.000 ", " 0.909 "]
    assert lines[4].split("|")[2:8] == [" 0.670 ", " 1.300 ", " 1.091 ", " 1 ", "  ", " 7 "]


def test_memory_is_counted_to_the_byte():
    before = bytes_in_use()
    if before is None:
        pytest.skip("this C library does not count")
    tensor = torch.empty(2**20)
    assert 0 <= bytes_in_use() - before - 4 * 2**20 < 2**16
    del tensor
    assert bytes_in_use() - before < 2**16
