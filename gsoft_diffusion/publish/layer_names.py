"""What other tools call the layers of an adapter."""

from __future__ import annotations

import re


def module_path(name: str) -> str:
    """Where a layer of the adapter (see `Adapter`) is in a diffusers pipeline.

    In text encoders by the names of transformers before 5.6, which every tool's loader understands.
    """
    if name.startswith("text_encoder"):
        return re.sub(r"^(\w+)\.layers\.(\d+)", r"\1.text_model.encoder.layers.\2.self_attn", name)
    return re.sub(r"\.to_out$", ".to_out.0", name)
