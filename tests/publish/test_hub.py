"""Publishing, against a local server that answers like the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_stand_in import TOKEN, StandIn, stand_in
from PIL import Image
from tiny_models import tiny_text_encoder, tiny_unet

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.adapters.file import save_adapter
from gsoft_diffusion.adapters.identity import fingerprint
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.publish.hub import HubRepository, make_package

ADAPTER = "adapter.safetensors"


@pytest.fixture
def hub(monkeypatch) -> StandIn:
    with stand_in() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        yield server


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run's folder, on a base model in a private folder, with files that are nobody else's business."""
    folder = tmp_path / "outputs" / "dog"
    (folder / "validation").mkdir(parents=True)
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    base = BaseModelIdentity("tiny", fingerprint(unet, [text_encoder]))
    adapter = inject(AdapterConfig(nblocks=4), unet, [text_encoder])
    save_adapter(folder / ADAPTER, adapter, base_model=base, training={"seed": 1}, prompts={"instance_prompt": "a dog"})
    sheet = "validation/step-000004.png"
    Image.new("RGB", (8, 8)).save(folder / sheet)
    Image.new("RGB", (8, 8)).save(folder / "validation" / "step-000002.png")
    (folder / "README.md").write_text("---\ntags: [dreambooth]\n---\n# a card")
    (folder / "settings.yaml").write_text("instance_data_dir: /home/ann/photos")
    return folder


def test_what_is_published(hub, run):
    address = HubRepository("dog", TOKEN).publish(run, ADAPTER)
    assert address == f"{hub.address}/ann/dog"
    (files,) = hub.repositories.values()
    assert set(files) - {".gitattributes"} == {"README.md", ADAPTER, "validation/step-000004.png"}
    assert files["README.md"] == (run / "README.md").read_bytes()
    assert not any(b"/home/ann" in content for content in files.values())


def test_the_published_adapter_is_the_same(run):
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    package, _ = make_package(run, ADAPTER)
    _, file = load_adapter(package / ADAPTER, unet, [text_encoder])
    assert file.base_model.name == "tiny"
    assert (package / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_what_someone_has_put_into_the_package_stays_and_is_not_published(hub, run):
    package, _ = make_package(run, ADAPTER)
    (package / "notes.txt").write_text("mine")
    (run / "validation" / "step-000004.png").rename(run / "validation" / "step-000008.png")
    HubRepository("dog", TOKEN).publish(run, ADAPTER)
    (files,) = hub.repositories.values()
    assert set(files) - {".gitattributes"} == {"README.md", ADAPTER, "validation/step-000008.png"}
    assert (package / "notes.txt").read_text() == "mine"
    assert [path.name for path in (package / "validation").iterdir()] == ["step-000008.png"]


def test_again_into_the_same_repository(hub, run):
    HubRepository("dog", TOKEN).publish(run, ADAPTER)
    assert HubRepository("ann/dog", TOKEN).publish(run, ADAPTER) == f"{hub.address}/ann/dog"
    assert len(hub.repositories) == 1


@pytest.mark.parametrize(
    ("name", "token", "broken"),
    [("dog", "hf_wrong", ""), ("two words", TOKEN, ""), ("dog", TOKEN, "/create"), ("", TOKEN, "")],
)
def test_a_repository_that_cannot_be_made(hub, name, token, broken):
    hub.broken = {broken} if broken else set()
    with pytest.raises(UserError, match=f"--hub_model_id {name}: cannot be created .*--hub_token"):
        HubRepository(name, token)


def test_no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--hub_model_id dog: cannot be created"):
        HubRepository("dog", TOKEN)


@pytest.mark.parametrize("broken", ["/preupload/main", "/commit/main"])
def test_an_upload_that_fails_says_how_to_try_again(hub, run, broken):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    repository = HubRepository("dog", TOKEN)
    hub.broken = {broken}
    with pytest.raises(UserError, match=r"the result is in .*dog, but .* hf upload ann/dog .*dog/hub$"):
        repository.publish(run, ADAPTER)
    assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()
    hub.broken = set()
    repository.publish(run, ADAPTER)
    assert ADAPTER in hub.repositories["ann/dog"]
