"""What each format costs and loses, on a tiny model."""

from __future__ import annotations

from tiny_models import tiny_text_encoder, tiny_unet

from benchmarks import formats
from gsoft_diffusion import AdapterConfig


def test_what_formats_lose(tmp_path, monkeypatch):
    """Full rank loses what float16 rounds, and only the adapter follows the strength."""
    monkeypatch.setattr(formats, "load_base", lambda name, dtype: (tiny_unet(), tiny_text_encoder(), 12))
    monkeypatch.setattr(formats, "CONFIG", AdapterConfig(nblocks=4))
    monkeypatch.setattr(formats, "RANKS", (2, 64))
    monkeypatch.setattr(formats, "ANGLE", 0.1)
    result = formats.measure(tmp_path / "adapter.safetensors")
    lost = {row["format"]: row["lost"] for row in result["formats"]}
    assert max(lost["adapter, by the node pack"].values()) < 1e-5
    assert lost["diff"]["1.0"] < 1e-3 < 1e-2 < lost["diff"]["0.5"]
    assert lost["kohya_lora, rank 64"]["1.0"] < 1e-3 < 0.1 < lost["kohya_lora, rank 2"]["1.0"]
    assert lost["checkpoint"].keys() == {"1.0"}
    assert all(row["bytes"] > 1000 for row in result["formats"])
