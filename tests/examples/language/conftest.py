from __future__ import annotations

from pathlib import Path

import pytest
from tiny_language import write_encoder, write_tasks


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """The tiny encoder. Read only."""
    return write_encoder(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """The tiny tasks. Read only."""
    return write_tasks(tmp_path_factory.mktemp("language_data"))
