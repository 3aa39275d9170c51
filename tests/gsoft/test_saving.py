"""Adapters of any model through their files, and what is refused."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_models import TiedModel, inputs, mlp, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import gsoft
from gsoft import Config, FileError, GSOFTError

CONFIG = Config(target_modules=["0", "2"], block_size=3, nfactors="dense", parametrization="exp")
WITH_HEAD = Config(target_modules=["0", "2"], block_size=6, modules_to_save=["4"])
NOTES = {"steps": 3, "of": ["a", 1.5, None]}


def written(path: Path, config: Config = CONFIG, notes: object = NOTES) -> tuple[nn.Module, gsoft.Adapter]:
    model = mlp()
    adapter = gsoft.inject(model, config)
    randomise(adapter)
    gsoft.save(adapter, path, notes)
    return model, adapter


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("config", [CONFIG, WITH_HEAD, Config(target_modules=r"[02]", nblocks=3, double=False)])
@torch.no_grad()
def test_everything_comes_back_to_the_bit(path, config):
    model, adapter = written(path, config)
    loaded = mlp()
    again = gsoft.load(path, loaded)
    assert again.config == config
    assert again.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(tensor, adapter.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(loaded(inputs(5, 12)), model(inputs(5, 12)))
    file = gsoft.read(path)
    assert (file.config, file.notes, file.base_model) == (config, NOTES, adapter.base_model)
    assert all(parameter.requires_grad for parameter in again.parameters())  # to train on


@pytest.mark.parametrize("merged", [False, True])
def test_saving_does_not_depend_on_the_models_state(path, merged):
    model, adapter = written(path)
    first = gsoft.read(path)
    model.to(torch.bfloat16)
    if merged:
        adapter.merge()
    gsoft.save(adapter, path, NOTES)
    again = gsoft.read(path)
    assert (again.config, again.base_model) == (first.config, first.base_model)
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(tensor, first.tensors[name]) for name, tensor in again.tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_of_the_base_model_is_accepted(path, dtype):
    written(path)
    assert all(parameter.dtype == torch.float32 for parameter in gsoft.load(path, mlp().to(dtype)).parameters())


@torch.no_grad()
def test_strength(path):
    model, _ = written(path, WITH_HEAD)
    x = inputs(5, 12)
    weak, none, full = mlp(), mlp(), mlp()
    gsoft.load(path, weak, strength=0.5)
    adapter = gsoft.load(path, none, strength=0.0)
    gsoft.load(path, full, strength=1.0)
    assert torch.equal(full(x), model(x))
    assert adapter.unchanged() == ["model.0", "model.2"]
    assert torch.equal(none[4].weight, model[4].weight)  # modules to save are as they were trained
    assert not torch.equal(weak(x), full(x))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(path, strength):
    written(path)
    model = mlp()
    with pytest.raises(GSOFTError, match=f"its strength {strength} is not a number"):
        gsoft.load(path, model, strength=strength)
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(1), "trained on the base model Sequential, but the model given, Sequential, has other weights"),
        (lambda: nn.Sequential(*mlp()[:2], nn.Linear(24, 12)), "has another architecture"),
        (TiedModel, "fits no linear layer of TiedModel"),
    ],
)
def test_another_base_model_is_refused_and_stays_as_it_was(path, make, message):
    written(path)
    model = make()
    with pytest.raises(gsoft.GSOFTError, match=message):
        gsoft.load(path, model)
    assert not any(type(module).__name__ == "RotatedLinear" for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def rewrite(path: Path, tensors=None, metadata=None) -> None:
    """Change tensors and metadata of a file; None as a new value drops the entry."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    changed, texts = load_file(path) | (tensors or {}), old | (metadata or {})
    save_file(
        {name: tensor for name, tensor in changed.items() if tensor is not None},
        path,
        {name: text for name, text in texts.items() if text is not None},
    )


def config_json(**changes: object) -> dict[str, str]:
    return {"config": json.dumps(CONFIG.to_dict() | changes)}


HOSTILE = {
    "missing tensor": ({"tensors": {"model.0.q_in": None}}, r"model\.0\.q_in is missing"),
    "missing layer": ({"tensors": dict.fromkeys(f"model.0.{n}" for n in ("q_in", "q_out", "output_scale"))}, "missing"),
    "other root": ({"tensors": {"unet.0.q_in": torch.zeros(3)}}, r"unexpected key unet\.0\.q_in"),
    "other parameter": ({"tensors": {"model.0.lora": torch.zeros(3)}}, r"unexpected key model\.0\.lora"),
    "module that is not to save": (
        {"tensors": {"modules_to_save.4.bias": torch.zeros(3)}},
        "unexpected key modules_to",
    ),
    "half precision": ({"tensors": {"model.0.output_scale": torch.ones(24).half()}}, "is F16, not F32"),
    "nan": ({"tensors": {"model.0.output_scale": torch.full((24,), torch.nan)}}, "not finite"),
    "other shape": ({"tensors": {"model.0.q_in": torch.zeros(3, 4, 4)}}, r"model\.0\.q_in has shape"),
    "no format": ({"metadata": {"gsoft_adapter": None}}, "metadata has no gsoft_adapter"),
    "new format": ({"metadata": {"gsoft_adapter": "99"}}, "format version '99' is unknown, '1' expected; update gsoft"),
    "no JSON": ({"metadata": {"notes": "{'a': 1"}}, "notes is not valid JSON"),
    "unknown setting": ({"metadata": config_json(rank=4)}, r"bad adapter settings .*rank"),
    "setting of a wrong type": ({"metadata": config_json(block_size="3")}, r"bad adapter settings .*block_size"),
    "truth for a number": ({"metadata": config_json(nfactors=True)}, r"bad adapter settings .*nfactors"),
    "targets of a wrong type": ({"metadata": config_json(target_modules=[3])}, r"bad adapter settings .*target_modul"),
    "too deep a pattern": ({"metadata": config_json(target_modules="(" * 2000)}, r"bad adapter settings"),
    "too large a number in a pattern": (
        {"metadata": config_json(target_modules="a{99999999999999999999}")},
        r"bad adapter settings",
    ),
    "no pattern": ({"metadata": config_json(target_modules="(")}, r"not a regular expression"),
    "list for object": ({"metadata": {"notes": "[1]"}}, "notes is not a JSON object"),
    "no notes": ({"metadata": {"notes": None}}, "metadata has no notes"),
    "name twice in JSON": ({"metadata": {"notes": '{"a": 1, "a": 2}'}}, "notes is not valid JSON .*comes twice"),
    "too large a number": ({"metadata": {"notes": '{"a": 1e999}'}}, "notes is not valid JSON .*too large"),
    "nan in JSON": ({"metadata": {"notes": '{"a": NaN}'}}, "notes is not valid JSON"),
    "impossible shape": ({"tensors": {"model.0.q_in": torch.zeros(2, 480)}}, r"impossible shape \(2, 480\)"),
    "no width": ({"tensors": {"model.0.output_scale": torch.zeros(25)}}, "its shapes do not fit its settings"),
    "no fingerprint": ({"metadata": {"base_model": '{"name": "x"}'}}, "must have a name and a fingerprint"),
    "broken fingerprint": ({"metadata": {"base_model": '{"name": "x", "fingerprint": "0:nan"}'}}, "is malformed"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_changed_file_is_refused(path, attack):
    written(path)
    changes, message = HOSTILE[attack]
    rewrite(path, **changes)
    model = mlp()
    with pytest.raises(FileError, match=message) as error:
        gsoft.load(path, model)
    assert str(path) in str(error.value)
    assert not any(type(module).__name__ == "RotatedLinear" for module in model.modules())


@pytest.mark.parametrize("content", [b"", b"\0" * 64, struct.pack("<Q", 2**62) + b"{}", b"\x80\x04pickle"])
def test_a_broken_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(FileError, match="it is cut short, or no safetensors file at all"):
        gsoft.read(path)


def test_a_file_without_tensors_and_one_with_a_tensor_twice_are_refused(path):
    written(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    name = next(name for name in json.loads(header) if name != "__metadata__")
    twice = header[:-1] + b", " + json.dumps({name: json.loads(header)[name]})[1:].encode()
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + content[8 + length :])
    with pytest.raises(FileError, match=r"header is not valid JSON \(a name comes twice"):
        gsoft.read(path)
    path.write_bytes(content)
    rewrite(path, dict.fromkeys(load_file(path)))
    with pytest.raises(FileError, match="it holds no tensors"):
        gsoft.read(path)


def test_a_file_of_modules_to_save_that_does_not_fit_is_refused(path):
    written(path, WITH_HEAD)
    rewrite(path, {"modules_to_save.4.bias": torch.zeros(4)})
    with pytest.raises(
        FileError, match=r"modules_to_save\.4\.bias has shape \(4,\), but its base model asks for \(3,\)"
    ):
        gsoft.load(path, mlp())


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float8_e4m3fn, r"modules_to_save\.4\.bias is F8_E4M3; known are"),
        (torch.complex64, "modules_to_save.4.bias is C64; known are"),
        (torch.int64, r"modules_to_save\.4\.bias is torch\.int64, but its base model has torch\.float32 there"),
    ],
)
def test_a_module_to_save_of_another_kind_of_numbers_is_refused(path, dtype, message):
    written(path, WITH_HEAD)
    rewrite(path, {"modules_to_save.4.bias": torch.zeros(3).to(dtype)})
    with pytest.raises(FileError, match=message):
        gsoft.load(path, mlp())


def test_a_model_that_gets_its_weights_later(path):
    model, _ = written(path)
    with torch.device("meta"):
        later = mlp()
    loaded = gsoft.load(path, later)
    later.load_state_dict(mlp().state_dict(), assign=True)
    assert torch.equal(later(inputs(5, 12)), model(inputs(5, 12)))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    written(path, WITH_HEAD)
    with torch.device("meta"):
        later = mlp()
    with pytest.raises(GSOFTError, match=r"modules_to_save\.4\.weight is on the meta device"):
        gsoft.load(path, later)
    assert type(later[0]) is nn.Linear


def test_what_is_switched_off_is_not_saved(path):
    _, adapter = written(path, WITH_HEAD)
    before = path.read_bytes()
    with adapter.disabled(), pytest.raises(GSOFTError, match="the base model's values; save after it"):
        gsoft.save(adapter, path)
    assert path.read_bytes() == before
    with adapter.disabled():
        with adapter.disabled():
            pass
        with pytest.raises(GSOFTError, match="the base model's values; save after it"):
            gsoft.save(adapter, path)
    assert path.read_bytes() == before
    gsoft.save(adapter, path, NOTES)
    trained = gsoft.read(path).tensors["modules_to_save.4.bias"]
    assert torch.equal(trained, adapter.state_dict()["modules_to_save.4.bias"])


def test_what_fsdp_has_spread_is_not_saved(path):
    """As FSDP1 leaves a process that has none of a parameter's numbers."""
    _, adapter = written(path)
    before = path.read_bytes()
    next(adapter.parameters()).data = torch.zeros(0)
    with pytest.raises(GSOFTError, match=r"save: 0\.q_in is spread over processes \(FSDP\); gather the adapter"):
        gsoft.save(adapter, path)
    assert path.read_bytes() == before


def test_a_model_whose_name_is_a_path(path):
    model = mlp()
    model.config = SimpleNamespace(_name_or_path=Path("/models/a\x1b[2J"))
    gsoft.save(gsoft.inject(model, CONFIG), path)
    assert gsoft.read(path).base_model.name == "/models/a\N{REPLACEMENT CHARACTER}[2J"


@pytest.mark.parametrize("device", ["meta"])
def test_the_default_device_does_not_matter(path, device):
    _, adapter = written(path)
    model = mlp()
    with torch.device(device):
        loaded = gsoft.load(path, model)
    assert loaded.base_model == adapter.base_model
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_what_cannot_be_written(path):
    _, adapter = written(path)
    before = path.read_bytes()
    with torch.no_grad():
        next(adapter.parameters()).flatten()[0] = torch.nan
    with pytest.raises(FileError, match=r"was not written: model\.0\.q_in is not finite"):
        gsoft.save(adapter, path)
    with pytest.raises(FileError, match=r"cannot write .*missing.*No such file"):
        gsoft.save(gsoft.inject(mlp(), CONFIG), path.parent / "missing" / "adapter")
    with pytest.raises(FileError, match="no such adapter file"):
        gsoft.read(path.parent / "other")
    assert path.read_bytes() == before


def test_other_weights_are_taken_if_asked_for_and_that_is_said(path, caplog):
    written(path)
    other = mlp(1)
    with pytest.raises(
        gsoft.FileError, match=r"has other weights, about .*; accept_other_base=True takes it all the same"
    ):
        gsoft.load(path, other)
    gsoft.load(path, other, accept_other_base=True).remove()
    stack = gsoft.AdapterStack(other)
    stack.load("a", path, accept_other_base=True)
    said = [message for message in caplog.messages if "has other weights, about" in message]
    assert len(said) == 2
    with pytest.raises(gsoft.FileError, match="has another architecture"):
        gsoft.load(path, nn.Sequential(*mlp()[:2], nn.Linear(24, 12)), accept_other_base=True)


def test_tied_parameters_of_a_module_to_save(path):
    model = nn.ModuleDict({"body": nn.Linear(12, 12), "head": nn.ModuleDict({"a": nn.Linear(12, 3)})})
    model["head"]["b"] = model["head"]["a"]
    config = Config(target_modules=["body"], block_size=4, modules_to_save=["head"])
    twin = copy.deepcopy(model)
    adapter = gsoft.inject(model, config)
    with torch.no_grad():
        model["head"]["a"].weight.fill_(2)
    gsoft.save(adapter, path)
    gsoft.load(path, twin)
    assert twin["head"]["b"].weight.eq(2).all()


def test_what_could_not_be_read_is_not_written(path, monkeypatch):
    monkeypatch.setattr("gsoft.file.MAX_HEADER", 100)
    adapter = gsoft.inject(mlp(), CONFIG)
    with pytest.raises(FileError, match=r"was not written: its header takes \d+ bytes, and 100 are read"):
        gsoft.save(adapter, path)
    assert not path.exists()


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_strangers_regular_expression_is_not_run(path, setting):
    """This one takes hours on the paths of these layers."""
    names = ["first_layer_of_the_model", "second_layer_of_the_model", "third"]
    layers = {name: nn.Linear(12, 12) for name in names}
    config = Config(target_modules=["first_layer_of_the_model", "third"], block_size=4)
    gsoft.save(gsoft.inject(nn.ModuleDict(layers), config), path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    section = json.loads(metadata["config"])
    section[setting] = r"(\w|\w\w?)+!"
    save_file(tensors, path, metadata | {"config": json.dumps(section)})
    model = nn.ModuleDict({name: nn.Linear(12, 12) for name in names})
    adapter = gsoft.load(path, model, accept_other_base=True)
    assert list(adapter.targets.layers) == ["first_layer_of_the_model", "third"]
    assert adapter.config == gsoft.read(path).config


def test_a_file_with_an_expression_on_a_model_without_its_layers(path):
    written(path, Config(target_modules=r"[02]", block_size=6))
    with pytest.raises(FileError, match=r"Sequential does not have the layers that it is for, .*expression \[02\]$"):
        gsoft.load(path, nn.Sequential(nn.ReLU(), nn.Linear(12, 24)))
