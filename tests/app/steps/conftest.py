"""What the steps work on, without a browser."""

from __future__ import annotations

import pytest

from gsoft_diffusion.app.steps.common import Page


@pytest.fixture
def page(workspace, jobs) -> Page:
    return Page(workspace, jobs)
