from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.folder import copies, read_folder
from gsoft_diffusion.training.circumstances import circumstances


def test_a_photo_that_has_gone_meanwhile_is_named(config, photos, tmp_path):
    """Class images may take an hour, between the reading of the photos and their sums."""
    folder = shutil.copytree(photos, tmp_path / "own")
    read = read_folder(folder, "--instance_data_dir", "a photo of a sks dog").photos
    dataset, identity = SimpleNamespace(streams=[read]), SimpleNamespace(fingerprint="00")
    assert set(circumstances(config, dataset, identity, 1)) > {f"own/{photo.path.name}" for photo in read}
    read[0].path.unlink()
    for look in (lambda: circumstances(config, dataset, identity, 1), lambda: list(copies(read))):
        with pytest.raises(UserError, match=r"0\.png: cannot be read \(No such file or directory\)"):
            look()
