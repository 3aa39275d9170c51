from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import randomise, run, tiny_text_encoder, tiny_unet

from gsoft.errors import FileError
from gsoft_diffusion import (
    AdapterConfig,
    BaseModelIdentity,
    UserError,
    fingerprint,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
)
from gsoft_diffusion.adapters.file import FORMAT, read_adapters

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = AdapterConfig(nblocks=4, nfactors="dense", parametrization="exp")
TRAINING = {"learning_rate": 1e-4, "max_train_steps": 300}
PROMPTS = {"instance_prompt": "a photo of a sks dög", "validation": ["a sks dog", "…"]}


def model(seed: int = 0):
    return tiny_unet(seed), tiny_text_encoder(seed)


def trained_adapter(config: AdapterConfig = CONFIG):
    unet, text_encoder = model()
    base_model = BaseModelIdentity("tiny base", fingerprint(unet, [text_encoder]))
    adapter = inject(config, unet, [text_encoder])
    randomise(adapter)
    return unet, text_encoder, adapter, base_model


@pytest.fixture
def saved(tmp_path) -> Path:
    _, _, adapter, base_model = trained_adapter()
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, base_model=base_model, training=TRAINING, prompts=PROMPTS)
    return path


def test_everything_comes_back(saved):
    unet, text_encoder, adapter, base_model = trained_adapter()
    file = read_adapter(saved)
    assert (file.config, file.base_model) == (CONFIG, base_model)
    assert (file.training, file.prompts) == (TRAINING, PROMPTS)
    loaded_unet, loaded_text = model()
    loaded, _ = load_adapter(saved, loaded_unet, [loaded_text])
    assert loaded.config == CONFIG
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert torch.equal(tensor, file.tensors[name])
    with torch.no_grad():
        assert torch.equal(run(loaded_unet, loaded_text), run(unet, text_encoder))
    assert all(parameter.requires_grad for parameter in loaded.parameters())  # to train on


def test_a_fresh_process_draws_the_same_bits(saved, tmp_path):
    unet, text_encoder, _, _ = trained_adapter()
    with torch.no_grad():
        expected = run(unet, text_encoder)
    script = """
import sys, torch
from safetensors.torch import save_file
from tiny_models import run, tiny_text_encoder, tiny_unet
from gsoft_diffusion import load_adapter
unet, text_encoder = tiny_unet(), tiny_text_encoder()
load_adapter(sys.argv[1], unet, [text_encoder])
with torch.no_grad():
    save_file({"output": run(unet, text_encoder)}, sys.argv[2])
"""
    output = tmp_path / "output.safetensors"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    subprocess.run([sys.executable, "-c", script, str(saved), str(output)], env=environment, check=True)
    assert torch.equal(load_file(output)["output"], expected)


def test_the_file_is_plain_float32_safetensors_with_json(saved):
    with safe_open(saved, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["gsoft_diffusion_adapter"] == "2"
    assert json.loads(metadata["config"])["nfactors"] == "dense"


@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
def test_the_keys_say_what_shapes_do_not(tmp_path, parametrization):
    """For programs that drop metadata; `AdapterFile` has the parameters alone."""
    _, _, adapter, base_model = trained_adapter(replace(CONFIG, parametrization=parametrization))
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, base_model=base_model, training={}, prompts={})
    tensors = load_file(path)
    assert tensors.keys() - adapter.state_dict().keys() == {f"parametrization.{parametrization}"}
    assert tensors[f"parametrization.{parametrization}"].shape == (0,)
    assert read_adapter(path).tensors.keys() == adapter.state_dict().keys()


def test_a_program_of_the_first_version_says_that_it_is_too_old(saved):
    first = replace(FORMAT, version="1", earlier=())
    with (
        pytest.raises(FileError, match=r"format version '2' is unknown, '1' expected; update gsoft-diffusion"),
        first.open(saved),
    ):
        pass


def test_a_file_of_the_first_version_has_no_such_key(saved):
    rewrite(saved, {"parametrization.exp": None}, {"gsoft_diffusion_adapter": "1"})
    assert read_adapter(saved).config == CONFIG
    rewrite(saved, {"parametrization.exp": torch.empty(0)})
    with pytest.raises(UserError, match=r"unexpected key parametrization\.exp"):
        read_adapter(saved)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saving_does_not_depend_on_the_models_state(saved, tmp_path, merged, dtype):
    unet, _, adapter, base_model = trained_adapter()
    unet.to(dtype)
    if merged:
        adapter.merge()
    save_adapter(tmp_path / "again", adapter, base_model=base_model, training=TRAINING, prompts=PROMPTS)
    first, again = load_file(saved), load_file(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


class TestSaving:
    def test_replaces_the_old_file_and_leaves_no_other(self, saved):
        _, _, adapter, base_model = trained_adapter()
        randomise(adapter, seed=1)
        save_adapter(saved, adapter, base_model=base_model, training={}, prompts={})
        assert read_adapter(saved).training == {}
        assert list(saved.parent.iterdir()) == [saved]

    def test_a_failure_keeps_the_old_file(self, saved, monkeypatch):
        _, _, adapter, base_model = trained_adapter()
        before = saved.read_bytes()

        def full_disk(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            save_adapter(saved, adapter, base_model=base_model, training={}, prompts={})
        assert saved.read_bytes() == before
        assert list(saved.parent.iterdir()) == [saved]

    def test_a_folder_that_does_not_exist(self, tmp_path):
        _, _, adapter, base_model = trained_adapter()
        with pytest.raises(UserError, match=r"cannot write .*missing.*No such file"):
            save_adapter(tmp_path / "missing" / "a", adapter, base_model=base_model, training={}, prompts={})

    def test_values_that_are_not_finite(self, saved):
        _, _, adapter, base_model = trained_adapter()
        before = saved.read_bytes()
        with torch.no_grad():
            next(adapter.parameters()).flatten()[0] = torch.nan
        with pytest.raises(UserError, match=r"was not written: unet\..*is not finite"):
            save_adapter(saved, adapter, base_model=base_model, training={}, prompts={})
        assert saved.read_bytes() == before


def rewrite(path: Path, tensors=None, metadata=None) -> None:
    """Change tensors and metadata of a file; None as a new value drops the entry."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    new_tensors = load_file(path) | (tensors or {})
    new_metadata = old | (metadata or {})
    save_file(
        {name: tensor for name, tensor in new_tensors.items() if tensor is not None},
        path,
        {name: text for name, text in new_metadata.items() if text is not None},
    )


Q_IN = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.q_in"  # width 64: (2, 4, 120)
SCALE = Q_IN.replace("q_in", "output_scale")


def config_json(**changes: object) -> dict[str, str]:
    return {"config": json.dumps(CONFIG.to_dict() | changes)}


HOSTILE = {
    "missing tensor": ({"tensors": {Q_IN: None}}, "q_in"),
    "missing layer": (
        {"tensors": {Q_IN.replace("q_in", name): None for name in ("q_in", "q_out", "output_scale")}},
        r"attn1\.to_q\.output_scale is missing",
    ),
    "extra parameter": ({"tensors": {"unet.x.to_q.extra": torch.zeros(3)}}, r"unexpected key unet\.x\.to_q\.extra"),
    "extra layer": ({"tensors": {"unet.x.to_q.output_scale": torch.zeros(3)}}, r"unet\.x\.to_q"),
    "key without layer": ({"tensors": {"q_in": torch.zeros(2, 4, 6)}}, "unexpected key q_in"),
    "key like a path": ({"tensors": {"../../evil": torch.zeros(3)}}, r"unexpected key \.\./\.\./evil"),
    "other number of factors": ({"tensors": {Q_IN: torch.zeros(3, 4, 120)}}, r"q_in has shape \(3, 4, 120\)"),
    "no number of blocks": ({"tensors": {Q_IN: torch.zeros(2, 8, 28)}}, "q_in"),
    "no triangular number": ({"tensors": {Q_IN: torch.zeros(2, 4, 119)}}, "q_in"),
    "wrong rank": ({"tensors": {Q_IN: torch.zeros(2, 480)}}, r"impossible shape \(2, 480\)"),
    "empty": ({"tensors": {Q_IN: torch.zeros(0, 4, 120)}}, r"impossible shape \(0, 4, 120\)"),
    "empty and huge": ({"tensors": {Q_IN: torch.zeros(0, 2**40, 120)}}, "impossible shape"),
    "other width": ({"tensors": {SCALE: torch.zeros(60)}}, "attn1.to_q"),
    "half precision": ({"tensors": {SCALE: torch.ones(64).half()}}, "output_scale is F16, not F32"),
    "integers": ({"tensors": {SCALE: torch.ones(64, dtype=torch.int32)}}, "output_scale is I32, not F32"),
    "nan": ({"tensors": {SCALE: torch.full((64,), torch.nan)}}, "output_scale has values that are not finite"),
    "infinity": ({"tensors": {SCALE: torch.full((64,), torch.inf)}}, "output_scale has values that are not finite"),
    "no parametrization": ({"tensors": {"parametrization.exp": None}}, r"parametrization\.exp is missing"),
    "another parametrization": (
        {"tensors": {"parametrization.exp": None, "parametrization.cayley": torch.empty(0)}},
        r"unexpected key parametrization\.cayley",
    ),
    "two parametrizations": (
        {"tensors": {"parametrization.cayley": torch.empty(0)}},
        r"unexpected key parametrization\.cayley",
    ),
    "numbers for the parametrization": (
        {"tensors": {"parametrization.exp": torch.ones(1)}},
        r"parametrization\.exp has shape \(1,\), but its format asks for \(0,\)",
    ),
    "no format": ({"metadata": {"gsoft_diffusion_adapter": None}}, "it is something else"),
    "new format": ({"metadata": {"gsoft_diffusion_adapter": "99"}}, "format version '99' is unknown"),
    "no config": ({"metadata": {"config": None}}, "metadata has no config"),
    "no JSON": ({"metadata": {"training": "{'a': 1"}}, "training is not valid JSON"),
    "deep JSON": ({"metadata": {"training": "[" * 100_000}}, "training is not valid JSON"),
    "name twice in JSON": ({"metadata": {"training": '{"a": 1, "a": 2}'}}, "training is not valid JSON .*comes twice"),
    "too large a number": ({"metadata": {"training": '{"lr": 1e999}'}}, "training is not valid JSON .*too large"),
    "steering a terminal": ({"tensors": {"\x1b[2J.q_in": torch.zeros(3)}}, r"unexpected key .\[2J|impossible shape"),
    "flooding a terminal": (
        {"tensors": {"x" * 100_000 + ".y": torch.zeros(3)}},
        r"unexpected key x{300,500} … x{300,500}",
    ),
    "nan in JSON": ({"metadata": {"training": '{"lr": NaN}'}}, "training is not valid JSON"),
    "list for object": ({"metadata": {"prompts": "[1]"}}, "prompts is not a JSON object"),
    "unknown setting": ({"metadata": config_json(rank=4)}, r"bad adapter settings .*rank"),
    "setting of a wrong type": ({"metadata": config_json(nblocks="4")}, r"bad adapter settings .*nblocks"),
    "code for a setting": ({"metadata": config_json(parametrization="os.system")}, "bad adapter settings"),
    "no size": ({"metadata": config_json(nblocks=None)}, "its settings have neither nblocks nor block_size"),
    "both sizes": ({"metadata": config_json(block_size=4)}, "bad adapter settings"),
    "astronomical size": ({"metadata": config_json(nfactors=10**12)}, r"asks for \(1000000000000"),
    "one-sided settings": ({"metadata": config_json(double=False)}, r"unexpected key .*q_out"),
    "settings without scale": ({"metadata": config_json(output_scale=False)}, r"unexpected key .*output_scale"),
    "steering a terminal by the base model's name": (
        {"metadata": {"base_model": json.dumps({"name": "\x1b[2Jx", "fingerprint": "0123456789abcdef"})}},
        "the name of its base model has control characters",
    ),
    "no fingerprint": ({"metadata": {"base_model": '{"name": "x"}'}}, "must have a name and a fingerprint"),
    "broken fingerprint": (
        {"metadata": {"base_model": '{"name": "x", "fingerprint": "0:nan"}'}},
        "fingerprint of its base model is malformed",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_changed_file_is_refused_and_the_models_stay_untouched(saved, attack):
    changes, message = HOSTILE[attack]
    rewrite(saved, **changes)
    unet, text_encoder = model()
    with torch.no_grad():
        before = run(unet, text_encoder)
        with pytest.raises(UserError, match=message) as error:
            load_adapter(saved, unet, [text_encoder])
        assert str(saved) in str(error.value)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1100
        assert torch.equal(run(unet, text_encoder), before)
    inject(CONFIG, unet, [text_encoder])  # nothing was left behind


def test_a_file_without_tensors_is_refused(saved):
    rewrite(saved, dict.fromkeys(name for name in load_file(saved) if name != "parametrization.exp"))
    with pytest.raises(UserError, match="holds no tensors"):
        read_adapter(saved)


def lie_about_size(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 10**12
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


BROKEN = {
    "empty": lambda content: b"",
    "truncated data": lambda content: content[:-1],
    "truncated header": lambda content: content[:100],
    "huge header": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "lying sizes": lie_about_size,
    "trailing data": lambda content: content + b"\0" * 8,
    "pickle": lambda content: b"\x80\x04\x95" + content,
    "no header": lambda content: b"\0" * 64,
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_refused(saved, damage):
    saved.write_bytes(BROKEN[damage](saved.read_bytes()))
    with pytest.raises(UserError, match=r"not a readable safetensors file|header|cut short") as error:
        read_adapter(saved)
    assert str(saved) in str(error.value)


def test_a_tensor_that_is_there_twice_is_refused(saved):
    """safetensors by itself takes the last one, and other readers may take the first."""
    content = saved.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    name = next(name for name in json.loads(header) if name != "__metadata__")
    twice = header[:-1] + b", " + json.dumps({name: json.loads(header)[name]})[1:].encode()
    saved.write_bytes(struct.pack("<Q", len(twice)) + twice + content[8 + length :])
    with pytest.raises(UserError, match=r"header is not valid JSON \(a name comes twice"):
        read_adapter(saved)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="it is something else"):
        read_adapter(tmp_path / "lora.safetensors")


def test_the_same_adapter_by_two_names_is_refused(saved, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(saved.read_bytes())
    with pytest.raises(UserError, match=r"--adapter .*copy\.safetensors: holds the same as .*; give one of them"):
        read_adapters([saved, copy])


@pytest.mark.parametrize("content", [b"", b"abc", b"\x89PNG\r\n\x1a\n and so on", b"settings: of a run"])
def test_files_of_other_kinds_are_refused_as_such(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors is not a valid adapter: .* no safetensors file at all"):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("place", ["missing.safetensors", "."])
def test_a_file_that_is_not_there(tmp_path, place):
    with pytest.raises(UserError, match=r"no such adapter file|holds no adapter"):
        read_adapter(tmp_path / place)


class TestBaseModel:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_dtype_of_the_same_checkpoint_is_accepted(self, saved, dtype):
        unet, text_encoder = model()
        adapter, _ = load_adapter(saved, unet.to(dtype), [text_encoder.to(dtype)])
        assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())

    @pytest.mark.parametrize(
        ("unet", "text_encoder", "difference"),
        [
            (tiny_unet(1), tiny_text_encoder(), "other weights"),
            (tiny_unet(), tiny_text_encoder(1), "other weights"),
            (tiny_unet(cross_attention_dim=48), tiny_text_encoder(), "another architecture"),
            (tiny_unet(attention_head_dim=8), tiny_text_encoder(), "another architecture"),
            (tiny_unet(layers_per_block=2), tiny_text_encoder(), "another architecture"),
        ],
        ids=["weights", "text encoder", "width", "heads", "depth"],
    )
    def test_another_model_is_refused_by_name(self, saved, unet, text_encoder, difference):
        unet.config["_name_or_path"] = unet.config.__dict__["_name_or_path"] = "other/model"
        with pytest.raises(
            UserError, match=f"base model tiny base, but the model given, other/model, has {difference}"
        ):
            load_adapter(saved, unet, [text_encoder])

    def test_a_fine_tuned_copy_is_another_model(self, saved):
        unet, text_encoder = model()
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter += 0.1 * parameter.std(correction=0) * torch.randn_like(parameter)
        with pytest.raises(UserError, match="other weights"):
            load_adapter(saved, unet, [text_encoder])

    def test_an_unmerged_adapter_does_not_change_the_fingerprint(self):
        unet, text_encoder, _, base_model = trained_adapter()
        assert fingerprint(unet, [text_encoder]) == base_model.fingerprint


def test_a_file_in_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(UserError, match=r"adapter\.safetensors: cannot be read \(Permission denied\)"):
        read_adapter(tmp_path / "adapter.safetensors")

    def test_other_weights_are_taken_if_asked_for_and_that_is_said(self, saved, caplog):
        unet, text_encoder = tiny_unet(1), tiny_text_encoder(1)
        with pytest.raises(UserError, match=r"away .*; --accept_other_base takes it all the same"):
            load_adapter(saved, unet, [text_encoder])
        adapter, _ = load_adapter(saved, unet, [text_encoder], accept_other_base=True)
        assert adapter.merge() is None
        (message,) = caplog.messages
        assert re.search(
            r"trained on the base model tiny base, but the model given, .*, has other weights, about 1\d\d% away "
            r"\(unrelated ones: 140%\); it is used all the same$",
            message,
        )

    def test_how_far_a_fine_tune_is(self, saved, caplog):
        unet, text_encoder = model()
        for parameter in (*unet.parameters(), *text_encoder.parameters()):
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                parameter.data += 0.1 * noise * parameter.norm() / noise.norm()
        load_adapter(saved, unet, [text_encoder], accept_other_base=True)
        (far,) = re.findall(r"about ([\d.]+)% away", caplog.text)
        assert 4 < float(far) < 16

    def test_another_architecture_is_never_taken(self, saved):
        with pytest.raises(UserError, match=r"has another architecture$"):
            load_adapter(saved, tiny_unet(layers_per_block=2), [tiny_text_encoder()], accept_other_base=True)

    def test_the_model_itself_needs_no_words(self, saved, caplog):
        unet, text_encoder = model()
        load_adapter(saved, unet, [text_encoder], accept_other_base=True)
        assert not caplog.messages
