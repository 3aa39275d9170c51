"""What is settled before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_families import write_sd3

from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.config.command_line import parse
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training import preparation as preparation_module
from gsoft_diffusion.training.preparation import set_up_networks, with_model_defaults
from gsoft_diffusion.training.train import train


def test_steps_and_learning_rate_follow_from_the_size_of_the_base(base, config, monkeypatch):
    model = load_model(str(base))
    open_ = replace(config, max_train_steps=None, learning_rate=None).resolved()
    miniature = with_model_defaults(open_, model)
    monkeypatch.setattr(preparation_module, "MINIATURE_BELOW", model.resolution)
    full_size = with_model_defaults(open_, model)
    assert (full_size.max_train_steps, full_size.learning_rate) == (3000, 2e-5)
    assert miniature.max_train_steps < full_size.max_train_steps
    assert miniature.learning_rate > full_size.learning_rate
    assert with_model_defaults(config.resolved(), model).max_train_steps == config.max_train_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_backend": "telepathy"}, "--attention_backend telepathy"),
        ({"report_to": "telepathy"}, "--report_to telepathy"),
        ({"adapter": AdapterConfig(nblocks=5)}, "32"),
        ({"resolution": 33}, "--resolution 33"),
        ({"sampler": SamplerConfig(scheduler="Telepathy")}, "Telepathy"),
        ({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
    ],
)
def test_settings_that_cannot_work_leave_nothing_behind(config, changes, message):
    with pytest.raises(UserError, match=message):
        train(replace(config, **changes))
    assert not Path(config.output_dir or "").exists()


def test_a_backend_that_a_model_passes_over_is_refused(tmp_path):
    """Stable Diffusion 3's processors call PyTorch's attention themselves."""
    config = TrainingConfig("photos", "dog", attention_backend="native")
    with pytest.raises(UserError, match="--attention_backend native: does nothing with Stable Diffusion 3"):
        set_up_networks(config, load_model(str(write_sd3(tmp_path / "base"))))


@pytest.mark.parametrize(("settings", "steps"), [(["--gradient_accumulation_steps", "2"], 2), ([], 3)])
def test_the_launchers_accumulation_is_the_runs(config, monkeypatch, tmp_path, settings, steps):
    path = tmp_path / "settings.yaml"
    given = {name: value for name, value in config.to_dict().items() if name != "gradient_accumulation_steps"}
    path.write_text(yaml.safe_dump(given))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(steps))
    result = train(parse(TrainingConfig, "", ["--config", str(path), *settings]))
    assert (result.steps, result.interrupted) == (4, False)
    assert read_yaml(result.adapter.parent / "settings.yaml")["gradient_accumulation_steps"] == steps
    with pytest.raises(UserError, match="--gradient_accumulation_steps 1: ACCELERATE_GRADIENT_ACCUMULATION_STEPS says"):
        train(replace(config, output_dir=f"{config.output_dir}-other"))
