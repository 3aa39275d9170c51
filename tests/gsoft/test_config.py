from __future__ import annotations

import json

import pytest

from gsoft import Config, ConfigError, RotationConfig


@pytest.mark.parametrize(
    "config",
    [
        Config(block_size=4),
        Config(nblocks=2, nfactors="dense", double=False, parametrization="exp", output_scale=False),
        Config(block_size=4, target_modules=["q", "v"], exclude_modules=r".*\.0\..*", modules_to_save=["head"]),
    ],
)
def test_goes_through_json_unchanged(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_names_in_any_collection(kind):
    assert Config(block_size=4, target_modules=kind(["q"])).target_modules == ("q",)


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({}, ("nblocks", "block_size"), "^nblocks, block_size: give exactly one of them"),
        ({"nblocks": 2, "block_size": 2}, ("nblocks", "block_size"), "give exactly one of them"),
        ({"nblocks": 0}, ("nblocks",), "^nblocks 0: must be 1 or more$"),
        ({"block_size": 1}, ("block_size",), r"^block_size 1: must be 2 or more \(a block of side 1 cannot rotate\)$"),
        ({"block_size": 2.0}, ("block_size",), "block_size 2.0: must be"),
        ({"block_size": 4, "nfactors": "all"}, ("nfactors",), '^nfactors all: must be 1 or more, or "dense"$'),
        (
            {"block_size": 4, "parametrization": "qr"},
            ("parametrization",),
            "parametrization qr: must be one of scaled_cayley, scaled_exp, cayley, exp",
        ),
        ({"block_size": 4, "double": 1}, ("double",), "must be True or False"),
        (
            {"block_size": 4, "target_modules": []},
            ("target_modules",),
            'name the layers to adapt, or give "all-linear"',
        ),
        (
            {"block_size": 4, "target_modules": [1]},
            ("target_modules",),
            "must be a list of names, or one regular expre",
        ),
        ({"block_size": 4, "exclude_modules": "["}, ("exclude_modules",), "not a regular expression"),
        ({"block_size": 4, "modules_to_save": "head"}, ("modules_to_save",), "'head': must be a list of names$"),
        ({"block_size": 4, "rank": 4}, ("rank",), "^rank: unknown setting; known: nblocks, "),
    ],
)
def test_what_cannot_be(settings, names, message):
    with pytest.raises(ConfigError, match=message) as error:
        Config.from_dict(settings)
    assert error.value.names == names


def test_pefts_default_is_no_name():
    assert Config(block_size=3, exclude_modules=None, modules_to_save=None) == Config(block_size=3)


def test_all_linear_in_any_case():
    assert Config(block_size=4, target_modules="All-Linear") == Config(block_size=4)


def test_a_config_is_a_rotation_config():
    assert isinstance(Config(block_size=4), RotationConfig)
