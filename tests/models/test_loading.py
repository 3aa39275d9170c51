from __future__ import annotations

import json
import logging
import shutil
from fnmatch import fnmatch

import httpx
import pytest
import torch
from conftest import PIXELS, TEXT_LENGTH, write_base
from diffusers import DDIMScheduler
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from pretended import pretended_gpu
from safetensors.torch import save_file
from tiny_families import WRITERS, write_flux2_klein

from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.config import SamplerConfig
from gsoft_diffusion.foundation import bundled, memory
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models import loading as models_module
from gsoft_diffusion.models.families import Flux2Klein, StableDiffusion
from gsoft_diffusion.models.families import base as families_base
from gsoft_diffusion.models.loading import known_device, load_architecture, load_model
from gsoft_diffusion.sampling.schedulers import make_scheduler


@pytest.fixture
def own_base(base, tmp_path):
    """A copy of the base that a test may spoil."""
    return shutil.copytree(base, tmp_path / "own")


def change_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sizes_are_read_from_the_model(base):
    model = load_model(str(base))
    assert model.vae_scale_factor == 2
    assert model.resolution == PIXELS
    assert model.latent_shape(64) == (4, 32, 32)
    assert model.prepare(["a dog", ""])["tokens"].shape == (2, TEXT_LENGTH)
    assert model.encode_prompts(["a dog", ""])["encoder_hidden_states"].shape == (2, TEXT_LENGTH, 32)
    assert model.encode_images(torch.zeros(2, 3, PIXELS, PIXELS)).shape == (2, 8, PIXELS // 2, PIXELS // 2)
    assert model.decode(torch.zeros(1, 4, 16, 16)).shape == (1, 3, PIXELS, PIXELS)


def test_everything_is_frozen_and_in_evaluation_mode(base):
    model = load_model(str(base))
    for part in (model.unet, model.vae, model.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not part.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_unet_and_text_encoder_but_not_of_the_vae(base, dtype):
    model = load_model(str(base), dtype=dtype)
    assert model.dtype == model.text_encoder.dtype == dtype
    assert model.vae.dtype == torch.float32


def test_the_scheduler_is_the_one_in_the_folder(any_base):
    model = load_model(str(any_base))
    assert isinstance(model.scheduler, DDIMScheduler)
    assert model.scheduler.config.prediction_type == any_base.name
    assert model.scheduler.config.timestep_spacing == "trailing"


def test_latents_are_drawn_and_scaled(base):
    model = load_model(str(base))
    mean, log_variance = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    noise = torch.randn(1, 4, 8, 8)
    latents = model.sample_latents(torch.cat([mean, log_variance], dim=1), noise)
    torch.testing.assert_close(latents, 0.5 * (mean + (0.5 * log_variance).exp() * noise))


def test_a_prompt_that_is_cut_is_named_once(base, caplog):
    model = load_model(str(base))
    prompt = "a very very very long \x1b[2Jprompt " * 5
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert model.prepare([prompt, "short"])["tokens"].shape == (2, TEXT_LENGTH)
    shown = prompt[:60].replace("\x1b", "\N{REPLACEMENT CHARACTER}")  # in captions of others there may be anything
    assert [record.getMessage() for record in caplog.records] == [
        f"prompt cut after {TEXT_LENGTH} of its {len(model.tokenizer(prompt).input_ids)} tokens: {shown}…"
    ]


@pytest.mark.parametrize("resolution", [32, 64, 36])
def test_resolution_that_fits(base, resolution):
    load_model(str(base)).check_sides(resolution=resolution)


@pytest.mark.parametrize("resolution", [33, 34, 30])
def test_resolution_that_does_not_fit(base, resolution):
    with pytest.raises(UserError, match=f"--resolution {resolution}: must be a multiple of 4"):
        load_model(str(base)).check_sides(resolution=resolution)


def test_the_bundled_base_is_found_from_anywhere(tmp_path, monkeypatch):
    write_base(tmp_path / "repository" / "data" / "mini")
    monkeypatch.setitem(bundled._PARENTS, "data", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    assert load_model("data/mini").resolution == PIXELS


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "unet", "scheduler"])
def test_a_missing_part_is_named(own_base, part):
    shutil.rmtree(own_base / part)
    with pytest.raises(UserError, match=f"own has no {part}"):
        load_model(str(own_base))


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "unet", "scheduler"])
def test_an_empty_part_is_named(own_base, part):
    for path in (own_base / part).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"cannot load the {part}") as caught:
        load_model(str(own_base))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_damaged_weights_are_named(own_base, part):
    path = own_base / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"cannot load the {part.split('/')[0]}"):
        load_model(str(own_base))


def test_pickled_weights_are_not_read(own_base):
    path = own_base / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(UserError, match="cannot load the unet"):
        load_model(str(own_base))


def test_a_text_encoder_of_another_width_is_refused(own_base, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(own_base / "text_encoder")
    config.hidden_size = 16
    CLIPTextModel(config).save_pretrained(own_base / "text_encoder")
    with pytest.raises(UserError, match="width is 16, but the UNet takes 32"):
        load_model(str(own_base))


def test_a_folder_without_an_index_is_refused(own_base):
    (own_base / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"own has no model_index\.json"):
        load_model(str(own_base))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_index_is_refused(own_base, content):
    (own_base / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model_index\.json"):
        load_model(str(own_base))


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"transformer": ["diffusers", "HunyuanDiT2DModel"]},
        {"text_encoder": ["os", "system"]},
        {"vae": None},
    ],
)
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(own_base, changes):
    change_json(own_base / "model_index.json", **changes)
    with pytest.raises(UserError, match=r"own consists of .* Supported are Stable Diffusion 1\.x and 2\.x") as caught:
        load_model(str(own_base))
    assert "\n" not in str(caught.value)


def test_an_unknown_scheduler_is_refused(own_base):
    change_json(own_base / "scheduler" / "scheduler_config.json", _class_name="os")
    with pytest.raises(UserError, match="no scheduler os"):
        load_model(str(own_base))


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, r"\(FlowMatchEulerDiscreteScheduler\)"),
        ({"_class_name": "EDMEulerScheduler"}, r"\(EDMEulerScheduler, epsilon\)"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, r"\(DDIMScheduler, flow_prediction\)"),
    ],
)
def test_noise_of_another_kind_is_refused(own_base, scheduler, said):
    """Otherwise such a fine-tune would be trained on noise and targets that it has never learned."""
    (own_base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for load in (load_model, load_architecture):
        with pytest.raises(UserError, match=f"own: its scheduler {said} adds noise in another way than Stable Diff"):
            load(str(own_base))


@pytest.mark.parametrize("kind", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_a_flow_model_needs_a_shift_of_timesteps(tmp_path, kind):
    folder = write_flux2_klein(tmp_path / "klein")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(
        UserError, match=rf"klein: its scheduler \({kind}, epsilon\) adds noise in another way than FLUX"
    ):
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_flow_model_may_have_another_scheduler_with_a_shift(tmp_path, kind):
    folder = write_flux2_klein(tmp_path / "klein")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, "shift": 3.0}))
    model = load_model(str(folder))
    assert model.noise_scheduler().timesteps[500] == 750
    assert type(make_scheduler(model, SamplerConfig(num_inference_steps=4))).__name__ == kind


def test_a_scheduler_without_a_name_is_refused(own_base):
    (own_base / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot load the scheduler .*: scheduler_config\.json has no _class_name"):
        load_model(str(own_base))


def test_a_unet_that_is_told_its_guidance_is_refused(own_base):
    """As those that were distilled to latent consistency models."""
    change_json(own_base / "unet" / "config.json", time_cond_proj_dim=8)
    with pytest.raises(UserError, match=r"own: not a text-to-image model like Stable Diffusion 1\.x or 2\.x"):
        load_architecture(str(own_base))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere/model", "a/b/c", "nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(models_module, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no model folder"):
        load_model(name)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(*arguments, **options):
        raise LocalEntryNotFoundError("cannot find it\nand many more lines")

    monkeypatch.setattr(models_module, "why_unreachable", lambda: None)
    monkeypatch.setattr(models_module, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"someone/model.*cannot find it.*network") as caught:
        load_model("someone/model")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_safetensors_of_the_variant(base, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(base)

    monkeypatch.setattr(models_module, "why_unreachable", lambda: None)
    monkeypatch.setattr(models_module, "snapshot_download", download)
    with pytest.raises(UserError, match=r"someone/model has no weights of the variant fp16; leave --variant out"):
        load_model("someone/model", revision="v1", variant="fp16")
    assert (asked["name"], asked["revision"]) == ("someone/model", "v1")
    assert load_model("someone/model").resolution == PIXELS


@pytest.mark.parametrize("piece", ["model.fp16-{}-of-00002.safetensors", "model-{}-of-00002.fp16.safetensors"])
def test_a_variant_in_pieces_is_asked_for_and_counted(base, tmp_path, piece, monkeypatch):
    """By the names that the libraries write today, and by those that they wrote before."""
    hub = shutil.copytree(base, tmp_path / "hub")
    (hub / "text_encoder" / "model.safetensors").unlink()
    tensors = load_model(str(base)).text_encoder.state_dict()
    half = len(tensors) // 2
    names = [piece.format(f"{number:05d}") for number in (1, 2)]
    for name, part in zip(names, (list(tensors)[:half], list(tensors)[half:]), strict=True):
        save_file({key: tensors[key] for key in part}, hub / "text_encoder" / name)

    def download(name, *, revision, allow_patterns):
        paths = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        fetched.update(path for path in paths if any(fnmatch(path, pattern) for pattern in allow_patterns))
        return str(hub)

    fetched, counted = set(), []
    monkeypatch.setattr(models_module, "why_unreachable", lambda: None)
    monkeypatch.setattr(models_module, "snapshot_download", download)
    monkeypatch.setattr(models_module, "check_weights", lambda name, files, device, advice: counted.extend(files))
    with pytest.raises(UserError, match="cannot load"):  # nor has the local stand-in an index of the pieces
        load_model("someone/model", variant="fp16")
    wanted = {f"text_encoder/{name}" for name in names}
    assert wanted < fetched
    plain = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    assert {path.relative_to(hub).as_posix() for path, _ in counted} == wanted | plain


def test_networks_that_lack_the_variant_are_loaded_without(base, tmp_path, monkeypatch):
    """As diffusers does, for instance of Stable Diffusion 3, of which only the text encoders are there in fp16."""
    hub, cache = shutil.copytree(base, tmp_path / "hub"), tmp_path / "cache"
    path = hub / "text_encoder" / "model.safetensors"
    path.rename(path.with_suffix(".fp16.safetensors"))
    shutil.copy(hub / "unet" / "diffusion_pytorch_model.safetensors", path)  # no text encoder: it must not be read

    def download(name, *, revision, allow_patterns):
        for path in hub.rglob("*"):
            place = path.relative_to(hub).as_posix()
            if path.is_file() and any(fnmatch(place, pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / place)
        return str(cache)

    monkeypatch.setattr(models_module, "why_unreachable", lambda: None)
    monkeypatch.setattr(models_module, "snapshot_download", download)
    for name in ("someone/model", str(hub)):
        assert (
            identity_of(load_model(name, variant="fp16")).fingerprint == identity_of(load_model(str(base))).fingerprint
        )
    assert not (cache / "text_encoder" / "model.safetensors").exists()


REQUEST = httpx.Request("GET", "https://huggingface.co/someone/model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError,
            r"someone/model can be had once its licence is accepted.*huggingface\.co/someone/model.*HF_TOKEN",
        ),
        (RepositoryNotFoundError, r"there is no model someone/model on the hub, or it is private"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def refuse(*arguments, **options):
        raise error("401 Client Error. (Request ID: x)\n\nmore", response=httpx.Response(401, request=REQUEST))

    monkeypatch.setattr(models_module, "why_unreachable", lambda: None)
    monkeypatch.setattr(models_module, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message) as caught:
        load_model("someone/model")
    assert "Request ID" not in str(caught.value)


def test_weights_that_are_there_in_half_precision_alone(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "half")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(UserError, match=r"cannot load the vae .*\.fp16\.safetensors alone, give --variant fp16"):
        load_model(str(folder))
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError) as caught:
        load_model(str(folder), variant="fp16")
    assert "give --variant" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"device": "cpu", "dtype": torch.float32}, "programs, or give --mixed_precision bf16$"),
        ({"device": "cpu", "dtype": None}, "end other programs$"),
        ({"device": "mps", "dtype": torch.bfloat16}, "end other programs$"),
        ({"device": "cuda", "dtype": torch.bfloat16}, "or give --offload_layers or --cpu_offload$"),
        ({"device": "cuda", "dtype": torch.bfloat16, "cpu_offload": True}, "or give --offload_layers$"),
        ({"device": "cuda", "dtype": torch.bfloat16, "quantize_base": "float8"}, "end other programs$"),
    ],
)
def test_weights_that_are_too_many_are_refused_with_what_would_help(base, monkeypatch, options, advice):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    with pytest.raises(UserError, match=advice):
        load_model(str(base), **options)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, False),  # all are mapped from the files
        ({"dtype": torch.bfloat16}, True),
        ({"quantize_base": "float8"}, True),
        ({"quantize_base": "nf4"}, False),
        ({"offload_layers": True}, True),
    ],
)
def test_main_memory_need_hold_only_the_weights_that_are_copied_to_it(base, monkeypatch, options, refused):
    """On the way to a GPU, whose own memory is large enough here."""
    for part in ("require_bitsandbytes", "quantize"):
        monkeypatch.setattr(models_module, part, lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 if device.type == "cpu" else 2**40)
    monkeypatch.setattr(models_module, "_load", lambda *_: pytest.fail("loaded", pytrace=False))
    with pytest.raises(UserError, match="free on cpu") if refused else pytest.raises(pytest.fail.Exception):
        load_model(str(base), **{"device": "cuda", "cpu_offload": True, **options})


def test_a_text_encoder_that_does_not_fit_beside_the_denoiser_computes_where_it_is(tmp_path, monkeypatch):
    """With `cpu_offload`: that of FLUX.2 is as large as the denoiser."""
    folder = write_flux2_klein(tmp_path / "klein")
    found = []
    for room in (0, 2**40):
        monkeypatch.setattr(families_base, "free_memory", lambda device, room=room: room)
        with pretended_gpu() as gpu:
            model = load_model(str(folder), device="cuda", cpu_offload=True)
            with model.on_device(*model.all_text_encoders()):
                assert model.text_encoder.device.type == ("cuda" if room else "cpu")
            states = model.encode_prompts(["a dog"])["encoder_hidden_states"]
            assert states.device.type == "cuda"
            with gpu.suspended():
                found.append(states.cpu())
    torch.testing.assert_close(*found)


CUDA = torch.OutOfMemoryError("CUDA out of memory")
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)")


@pytest.mark.parametrize(("write", "full"), [(write_base, CUDA), (write_flux2_klein, CUDA), (write_base, MPS)])
def test_a_vae_without_room_computes_in_tiles(tmp_path, monkeypatch, write, full, caplog):
    model = load_model(str(write(tmp_path / "model")))
    latents = torch.randn(1, *model.latent_shape(64))
    whole = model.decode(latents)
    monkeypatch.setattr(families_base, "TILE", 32)
    decode, sizes = model.vae.decoder.forward, []

    def small(z, *rest):
        if z.shape[-1] > 32 // model.vae_scale_factor:
            raise full
        sizes.append(z.shape[-1])
        return decode(z, *rest)

    monkeypatch.setattr(model.vae.decoder, "forward", small)
    tiled = model.decode(latents)
    assert tiled.shape == whole.shape
    assert len(sizes) > 1
    assert "it computes in tiles from now on" in caplog.text
    assert (tiled - whole).abs().mean() < 0.5 * whole.std()

    def fail(*arguments):
        raise full

    monkeypatch.setattr(model.vae.decoder, "forward", fail)
    with pytest.raises(type(full), match="out of memory"):
        model.decode(latents)


def test_other_errors_of_a_vae_are_not_taken_for_a_lack_of_memory(base, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("an internal error")

    model = load_model(str(base))
    monkeypatch.setattr(model.vae.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="an internal error"):
        model.decode(torch.zeros(1, *model.latent_shape(PIXELS)))
    assert not model.vae.use_tiling


def test_a_device_that_is_not_there(base):
    with pytest.raises(UserError, match="cannot put"):
        load_model(str(base), device="cuda:99")


@pytest.mark.parametrize("family", [StableDiffusion, Flux2Klein], ids=lambda family: family.__name__)
def test_a_gpu_takes_one_picture_at_a_time_through_the_vae(family, tmp_path):
    """In float32, several large ones would take gigabytes. The CPU takes all at once, as before."""
    folder = WRITERS[family](tmp_path / "base")

    def sizes_and_results(device: str) -> tuple[list[int], list[torch.Tensor]]:
        model, sizes = load_model(str(folder), device=device), []
        for part in (model.vae.encoder, model.vae.decoder):
            part.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        results = [model.encode_images(pixels), model.decode(latents.to(model.device))]
        return sizes, [result.cpu() for result in results]

    pixels = torch.randn(3, 3, PIXELS, PIXELS)
    latents = torch.randn(3, *load_model(str(folder)).latent_shape(PIXELS))
    together, expected = sizes_and_results("cpu")
    with pretended_gpu():
        apart, found = sizes_and_results("cuda")
    assert (together, apart) == ([3, 3], [1] * 6)
    torch.testing.assert_close(found, expected)


class Elsewhere(torch.nn.Module):
    """A denoiser on a device that this machine does not have, or so it says."""

    device, dtype = torch.device("cuda:7"), torch.float32


@pytest.mark.parametrize("name", ["nope", "cpu:x", "xla:99"])
def test_devices_that_cannot_be_used_are_named(name):
    with pytest.raises(UserError, match=rf"--device {name}: cannot be used"):
        known_device(name)
    assert known_device("cpu") == torch.device("cpu")


def test_with_offload_only_the_denoiser_must_fit_on_the_device(base, monkeypatch):
    needed = (base / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    with pytest.raises(UserError, match="not enough memory"):
        load_model(str(base))
    load_model(str(base), cpu_offload=True)


def test_parts_are_brought_to_the_denoiser_and_back(base, monkeypatch):
    model = load_model(str(base), cpu_offload=True)
    moves = []
    for name in ("vae", "text_encoder"):
        monkeypatch.setattr(getattr(model, name), "to", lambda where, name=name: moves.append((name, str(where))))
    model.unet = Elsewhere()
    with model.on_device(model.vae), model.on_device(*model.all_text_encoders()):
        assert moves == [("vae", "cuda:7"), ("text_encoder", "cuda:7")]
    assert moves[2:] == [("text_encoder", "cpu"), ("vae", "cpu")]


@pytest.fixture
def on_meta(base, monkeypatch):
    """A model that computes on PyTorch's meta device, from which nothing can be copied back."""
    model = load_model(str(base))
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    return model


def test_frozen_weights_are_not_copied_back(on_meta):
    part = torch.nn.Linear(3, 2)
    numbers, place = part.weight.clone(), part.weight.data_ptr()
    with on_meta.on_device(part), on_meta.on_device(part):
        assert part.weight.is_meta
    assert part.weight.data_ptr() == place
    assert torch.equal(part.weight, numbers)


def test_weights_that_are_written_are_copied_back(on_meta):
    part = torch.nn.Linear(3, 2)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"), on_meta.on_device(part, written=True):
        pass


def test_offloading_puts_only_the_denoiser_on_the_device(base, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where, **how: moved.append(type(module)) or module)
    monkeypatch.setattr("diffusers.ModelMixin.to", torch.nn.Module.to)
    model = load_model(str(base), cpu_offload=True)
    assert set(moved) == {type(model.unet)}
    load_model(str(base))
    assert set(moved) == {type(part) for part in (model.unet, model.vae, model.text_encoder)}


def test_pictures_and_latents_are_the_same_with_offloading(base):
    pixels = torch.randn(1, 3, PIXELS, PIXELS)
    plain, offloaded = load_model(str(base)), load_model(str(base), cpu_offload=True)
    assert torch.equal(plain.encode_images(pixels), offloaded.encode_images(pixels))
    assert torch.equal(
        plain.encode_prompts(["a dog"])["encoder_hidden_states"],
        offloaded.encode_prompts(["a dog"])["encoder_hidden_states"],
    )


@pytest.mark.parametrize("family", WRITERS, ids=lambda family: family.__name__)
def test_an_architecture_is_the_model_without_weights(family, tmp_path, monkeypatch):
    folder = WRITERS[family](tmp_path / "base")
    whole = load_model(str(folder))
    monkeypatch.setattr(models_module, "check_weights", lambda *_: pytest.fail("weights were looked at"))
    bare = load_architecture(str(folder))
    assert (type(bare), bare.resolution, bare.size_step) == (type(whole), whole.resolution, whole.size_step)
    for part in whole.parts():
        wanted, found = getattr(whole, part), getattr(bare, part)
        if isinstance(wanted, torch.nn.Module):
            shapes = {name: tensor.shape for name, tensor in wanted.named_parameters()}
            assert {name: tensor.shape for name, tensor in found.named_parameters()} == shapes
            assert all(tensor.is_meta and not tensor.requires_grad for tensor in found.parameters())
