"""Publishing at the end of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, stand_in

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.training.train import train


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        yield server


def test_the_result_is_published_and_the_token_kept_nowhere(config, hub, capfd):
    config = replace(config, push_to_hub=True, hub_token=TOKEN, checkpointing_steps=2, report_to="tensorboard")
    folder = train(config).adapter.parent
    assert {"README.md", "adapter.safetensors"} <= hub.repositories["ann/dog"].keys()
    assert f"published: {hub.address}/ann/dog" in capfd.readouterr().out
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    train(replace(config, hub_token=TOKEN, resume_from_checkpoint="latest", max_train_steps=5, hub_model_id="cat"))
    assert set(hub.repositories) == {"ann/dog", "ann/cat"}


def test_what_keeps_from_publishing_is_said_before_the_training(config, hub):
    with pytest.raises(UserError, match="--hub_model_id dog: cannot be created"):
        train(replace(config, push_to_hub=True, hub_token="hf_wrong"))
    assert not Path(config.output_dir or "").exists()


def test_an_upload_that_fails_leaves_the_result(config, hub):
    hub.broken = {"/commit/main"}
    with pytest.raises(UserError, match=r"to try again: hf upload ann/dog"):
        train(replace(config, push_to_hub=True, hub_token=TOKEN))
    assert read_adapter(Path(config.output_dir or "") / "adapter.safetensors").training["step"] == 4
