from __future__ import annotations

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch

from examples.lipconvnet.pictures import Part, augmented, cifar_pictures, deal_out, world_pictures
from gsoft_diffusion.foundation.errors import UserError
from pretraining.sprites import Sprite


class TestWorld:
    def test_what_training_shows_is_not_in_the_test_and_half_of_validation_is_new(self, things, monkeypatch):
        shown: list[tuple[int, set[str]]] = []

        def draw(world, classes, count, rng):
            assert all(sprites for _, sprites in classes)
            shown.append((count, {sprite.code for _, sprites in classes for sprite in sprites}))
            return Part(torch.full((count, 3, 32, 32), len(shown)), torch.zeros(count))

        monkeypatch.setattr("examples.lipconvnet.pictures._draw", draw)
        found = world_pictures(things, 0, 30, 11)

        def things_of(pictures: torch.Tensor) -> set[str]:
            return set().union(*(shown[number - 1][1] for number in pictures.unique().tolist()))

        training, test = things_of(found.training.pictures), things_of(found.test.pictures)
        new, known = (things_of(found.validation.pictures[part]) for part in (slice(5), slice(5, None)))
        assert not training & test
        assert not training & new
        assert not test & new
        assert known == things_of(found.familiar.pictures) == training
        assert (len(found.training), len(found.validation), len(found.test), len(found.familiar)) == (30, 11, 11, 11)
        assert len(found.classes) == 10

    def test_scenes_are_drawn_by_turns_and_again_the_same(self, things):
        found = world_pictures(things, 0, 20, 10)
        assert found.training.pictures.shape == (20, 3, 32, 32)
        assert found.training.pictures.dtype == torch.uint8
        assert found.training.labels.tolist() == [*range(10), *range(10)]
        assert (len(found.validation), len(found.test), len(found.familiar)) == (10, 10, 10)
        assert torch.equal(world_pictures(things, 0, 20, 10).test.pictures, found.test.pictures)
        assert not torch.equal(world_pictures(things, 1, 20, 10).test.pictures, found.test.pictures)
        mean, scale = found.mean_and_scale()
        assert mean.shape == (3,)
        pixels = found.training.pictures.float() / 255
        torch.testing.assert_close(((pixels - mean[:, None, None]) / scale).square().mean(), torch.tensor(1.0))

    def test_a_folder_without_things(self, tmp_path):
        with pytest.raises(
            UserError, match=r"^--folder: .* has no picture of .*npm install --prefix .*fluent-emoji-3d"
        ):
            world_pictures(tmp_path, 0, 10, 10)


@pytest.mark.parametrize(("count", "parts"), [(4, (2, 1, 1)), (7, (5, 1, 1)), (8, (4, 2, 2))])
def test_a_fourth_is_held_out_for_each_part(count, parts):
    things = [Sprite(str(number), None) for number in range(count)]
    dealt = deal_out(things, np.random.default_rng(0))
    assert tuple(map(len, dealt)) == parts
    assert sorted(thing.code for part in dealt for thing in part) == [str(number) for number in range(count)]


class TestCifar:
    def test_reads_it_by_torchvision(self, tmp_path, monkeypatch):
        from torchvision.datasets import CIFAR100

        rng = np.random.default_rng(0)
        content = {
            "train": {"data": rng.integers(0, 256, (60, 3072), np.uint8), "fine_labels": [i % 3 for i in range(60)]},
            "test": {"data": rng.integers(0, 256, (9, 3072), np.uint8), "fine_labels": [i % 3 for i in range(9)]},
            "meta": {"fine_label_names": ["apple", "bear", "clock"]},
        }
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        sums = {}
        for name, value in content.items():
            (folder / name).write_bytes(pickle.dumps(value))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
        monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
        monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
        monkeypatch.setattr("examples.lipconvnet.pictures.VALIDATION_OF_CIFAR", 20)
        found = cifar_pictures(tmp_path, 0)
        assert (len(found.training), len(found.validation), len(found.test)) == (40, 20, 9)
        assert found.classes == ("apple", "bear", "clock")
        assert found.familiar is None
        assert np.array_equal(found.test.pictures.flatten(1).numpy(), content["test"]["data"])
        both = torch.cat([found.training.pictures, found.validation.pictures]).flatten(1).numpy()
        assert sorted(map(bytes, both)) == sorted(map(bytes, content["train"]["data"]))

    def test_without_torchvision(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(UserError, match=r"^--data cifar100 needs torchvision, which cannot be imported here"):
            cifar_pictures(tmp_path, 0)

    def test_without_a_network(self, tmp_path, monkeypatch):
        from torchvision.datasets import CIFAR100

        def no_network(self):
            raise OSError("no route to host")

        monkeypatch.setattr(CIFAR100, "download", no_network)
        with pytest.raises(UserError, match=f"^--data cifar100: is not available in {tmp_path}: no route to host"):
            cifar_pictures(tmp_path, 0)


def test_crops_are_parts_of_the_picture_with_its_border():
    pictures = torch.arange(1, 1 + 3 * 32 * 32).reshape(1, 3, 32, 32).expand(64, -1, -1, -1)
    found = augmented(pictures, torch.Generator().manual_seed(0))
    assert found.shape == pictures.shape
    padded = torch.nn.functional.pad(pictures[0], (4, 4, 4, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    everywhere = torch.cat([windows, windows.flip(-1)])
    which = [torch.nonzero((everywhere == crop).flatten(1).all(1)).flatten().tolist() for crop in found]
    assert all(len(places) == 1 for places in which)
    assert len({places[0] for places in which}) > 40
    assert 16 < sum(places[0] >= 81 for places in which) < 48
