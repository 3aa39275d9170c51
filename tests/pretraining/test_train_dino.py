"""The miniature DINO's training, for a few steps on random scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTModel

from gsoft_diffusion.scoring.encoders import load_dino
from pretraining import train_dino
from pretraining.train_dino import PROTOTYPES, crops, crowding, distillation_loss


def test_crops_are_pictures_of_the_asked_size_and_repeat():
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    a, b = (crops(pixels, 32, 0.1, 0.4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (4, 3, 32, 32)
    assert torch.equal(a, b)
    assert not torch.equal(a, crops(pixels, 32, 0.1, 0.4, torch.Generator().manual_seed(2)))


def test_loss_is_the_cross_entropy_with_the_other_large_crop():
    sure = torch.full((1, PROTOTYPES), -1.0)
    sure[0, 0] = 1.0
    unsure = torch.zeros(1, PROTOTYPES)
    center = torch.zeros(PROTOTYPES)
    same = distillation_loss([sure, sure], [sure, sure], center)
    assert same.item() == pytest.approx(0, abs=1e-4)
    assert distillation_loss([unsure, unsure], [sure, sure], center).item() == pytest.approx(math.log(PROTOTYPES))
    # a student that is right about its own crop only gets no credit for it
    alone = distillation_loss([sure, unsure], [sure, unsure], center)
    assert alone.item() > math.log(PROTOTYPES) / 2


def test_centering_takes_away_what_is_always_said():
    said = [torch.zeros(4, PROTOTYPES) + torch.arange(PROTOTYPES)]
    center = train_dino.Center()
    for _ in range(200):
        center.update(said)
    torch.testing.assert_close(center.value, said[0][0], rtol=1e-5, atol=1e-4)


def test_crowding_is_minus_the_mean_log_distance_to_the_nearest_direction():
    # on the unit circle at 0, 60 and 180 degrees: nearest at chords 1, 1 and 2·sin(60°) = √3; lengths do not count
    corners = torch.tensor([[3.0, 0.0], [0.5, math.sqrt(0.75)], [-2.0, 0.0]])
    assert crowding(corners).item() == pytest.approx(-math.log(3) / 6, abs=1e-5)
    corners.requires_grad_()
    crowding(corners).backward()
    assert (corners.grad[1] @ torch.tensor([-math.sqrt(0.75), 0.5])).abs() > 0  # pushed along the circle


def test_pairs_show_one_thing_and_never_the_scenes_held_back():
    scenes = np.zeros((40, 64, 64, 3), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None, None]
    things = [str(number % 3) for number in range(40)]
    one, other = train_dino.Pairs(scenes, things).draw(500, np.random.default_rng(0))
    numbers, others = (((pictures[:, 0, 0, 0] + 1) * 127.5).round().int() for pictures in (one, other))
    assert set(numbers.tolist()) == set(others.tolist()) == set(range(20, 40))
    assert (numbers % 3 == others % 3).all()
    assert (numbers != others).any()


@pytest.mark.slow
def test_a_stopped_training_goes_on_exactly(tmp_path):
    scenes = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    things = ["owl", "cup"] * 8
    train_dino.train(scenes, things, 6, tmp_path / "whole.pt", tmp_path / "whole", batch=2)
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert state["images"] == 6

    class StopError(Exception):
        pass

    class Stopping(train_dino.Checkpoint):
        def save_when_due(self, images):
            if images == 4 and not (tmp_path / "stopped").exists():
                self.save(images)
                (tmp_path / "stopped").touch()
                raise StopError

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_dino, "Checkpoint", Stopping)
        with pytest.raises(StopError):
            train_dino.train(scenes, things, 6, tmp_path / "parts.pt", tmp_path / "parts", batch=2)
        train_dino.train(scenes, things, 6, tmp_path / "parts.pt", tmp_path / "parts", batch=2)
    whole, parts = (ViTModel.from_pretrained(tmp_path / name, add_pooling_layer=False) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    encoder = load_dino(str(tmp_path / "whole"))
    assert encoder.identity.miniature
    assert encoder.embed_images([Image.new("RGB", (80, 64))]).shape == (1, 128)
    assert 1e6 < sum(parameter.numel() for parameter in whole.parameters()) < 1.5e6
