"""A CPU build of PyTorch beside a torchvision from PyPI, and every other combination left alone."""

from __future__ import annotations

import pytest

from gsoft_diffusion.foundation.torchvision_builds import mismatched


@pytest.mark.parametrize(
    ("torch", "torchvision", "expected"),
    [
        ("2.13.0+cpu", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cpu", False),
        ("2.13.0", "0.28.0", False),
        ("2.13.0+cu130", "0.28.0+cu130", False),
        ("2.13.0+cpu", None, False),
        (None, "0.28.0", False),
    ],
)
def test_only_a_cpu_build_beside_another_is_mismatched(torch, torchvision, expected):
    assert mismatched(torch, torchvision) is expected


def test_torchvision_can_be_imported():
    import torchvision  # noqa: F401
