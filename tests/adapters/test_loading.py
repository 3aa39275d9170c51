"""Finding the base model that an adapter belongs to."""

from __future__ import annotations

from tiny_models import randomise

from gsoft_diffusion.adapters.file import read_adapter, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.loading import load_base
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.loading import load_model


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
