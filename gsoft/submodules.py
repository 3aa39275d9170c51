"""Modules registered under dotted paths."""

from __future__ import annotations

from torch import nn


def add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted path, with empty modules on the way.

    root: what it is put into. path: names from there, such as `unet.mid.to_q`. module: what is registered.
    """
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
