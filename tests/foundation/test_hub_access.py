"""A hub that does not answer is asked once, for a few seconds, whoever wants something of it."""

from __future__ import annotations

import os
import time

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import is_offline_mode
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook
from tiny_eval import write_clip, write_dino

from gsoft_diffusion import UserError
from gsoft_diffusion.foundation.hub_access import PATIENCE, stay_offline, why_unreachable
from gsoft_diffusion.models.loading import fetch_model, load_model
from gsoft_diffusion.publish.hub import HubRepository
from gsoft_diffusion.scoring import encoders
from gsoft_diffusion.scoring.encoders import load_clip, load_encoders


class Network:
    """What the hub's client meets instead of a network; `asked` are its requests with their timeouts."""

    def __init__(self, status: int | None) -> None:
        self.status = status
        self.asked: list[tuple[str, str, dict[str, float]]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append((request.method, request.url.path, request.extensions["timeout"]))
        if self.status is None:
            raise httpx2.ConnectTimeout("nobody is there")
        return httpx2.Response(self.status)


@pytest.fixture
def network(monkeypatch):
    """Makes a network where the hub answers with a status, None for not at all. Nobody waits in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} seconds"))

    def make(status: int | None) -> Network:
        made = Network(status)

        def client() -> httpx2.Client:
            hooks = {"request": [hf_request_event_hook]}  # of the client's own factory: offline, nothing is sent
            return httpx2.Client(transport=httpx2.MockTransport(made), event_hooks=hooks)

        huggingface_hub.set_client_factory(client)
        return made

    yield make
    huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize("status", [None, 503])
def test_a_silent_hub_is_asked_once_for_a_few_seconds(network, status):
    met = network(status)
    assert ("nobody is there" if status is None else "answers 503") in (why_unreachable() or "")
    assert why_unreachable()
    assert [method for method, _, _ in met.asked] == ["HEAD"]
    assert set(met.asked[0][2].values()) == {PATIENCE}
    assert PATIENCE <= 5
    assert is_offline_mode()


@pytest.mark.parametrize("status", [200, 302, 404, 501])
def test_a_hub_that_answers_is_asked_once_too(network, status):
    met = network(status)
    assert why_unreachable() is None
    assert why_unreachable() is None
    assert len(met.asked) == 1
    assert not is_offline_mode()


def test_who_is_offline_by_choice_asks_nobody(network, monkeypatch):
    met = network(None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert why_unreachable() == "HF_HUB_OFFLINE is set"
    assert met.asked == []


def test_encoders_are_settled_by_one_attempt(network, tmp_path, monkeypatch, capsys):
    write_clip(tmp_path / "clip")
    write_dino(tmp_path / "dino")
    monkeypatch.setattr(encoders, "MINI_CLIP", str(tmp_path / "clip"))
    monkeypatch.setattr(encoders, "MINI_DINO", str(tmp_path / "dino"))
    met = network(None)
    found = load_encoders()
    assert found.names == {"clip": str(tmp_path / "clip"), "dino": str(tmp_path / "dino")}
    assert len(met.asked) == 1
    said = capsys.readouterr().err
    assert said.count("nobody is there") == 2
    assert said.count("scoring with the bundled") == 2


def test_an_encoder_by_name_says_why_it_cannot_be_had(network):
    met = network(None)
    with pytest.raises(UserError, match=r"CLIP ViT-B-32/openai: .*does not answer: nobody is there"):
        load_clip("ViT-B-32/openai")
    assert len(met.asked) == 1


@pytest.mark.parametrize("get", [load_model, fetch_model])
def test_a_base_model_costs_one_attempt(network, get):
    met = network(None)
    with pytest.raises(UserError, match=r"someone/model from the hub \(.*nobody is there, and it is not in the cache"):
        get("someone/model")
    assert len(met.asked) == 1


def test_publishing_costs_one_attempt_before_the_training(network):
    met = network(None)
    with pytest.raises(UserError, match=r"--hub_model_id dog: .*nobody is there\); check the network"):
        HubRepository("dog", "token")
    assert [method for method, _, _ in met.asked] == ["HEAD"]


def test_staying_offline_is_for_the_processes_that_are_started_too(network, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    stay_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
