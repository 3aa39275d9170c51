from __future__ import annotations

import json

import pytest

from gsoft_diffusion import AdapterConfig, UserError


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(nblocks=64),
        AdapterConfig(block_size=32, nfactors="dense", double=False),
        AdapterConfig(nblocks=1, nfactors=3, parametrization="exp", output_scale=False, text_encoder=False),
    ],
)
def test_round_trip_through_json(config):
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nblocks": 4, "block_size": 4}, "exactly one"),
        ({"nblocks": 0}, "--nblocks 0: must be 1 or more"),
        ({"block_size": 1}, "--block_size 1: must be 2 or more.*cannot rotate"),
        ({"nblocks": 4, "nfactors": 0}, "--nfactors 0"),
        ({"nblocks": 4, "nfactors": "sparse"}, "nfactors.*sparse"),
        ({"nblocks": 4, "parametrization": "qr"}, "parametrization.*qr"),
        ({"nblocks": "4"}, "nblocks.*'4' is not a whole number"),
        ({"nblocks": True}, "nblocks.*True is not a whole number"),
        ({"nblocks": 4.0}, "nblocks.*4.0 is not a whole number"),
        ({"nblocks": 4, "double": 1}, "double.*true or false"),
        ({"nblocks": 4, "rank": 8}, "unknown setting rank"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AdapterConfig.from_dict(settings)


@pytest.mark.parametrize("settings", [{"nblocks": 4, "parametrization": "qr"}, {"nblocks": 4, "nfactors": 0}])
def test_mistakes_in_python_are_refused(settings):
    with pytest.raises(UserError):
        AdapterConfig(**settings)
