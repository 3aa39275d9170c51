"""Modules registered under dotted paths."""

from __future__ import annotations

from torch import nn


def add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted path, with empty modules on the way.

    root: what it is put into. path: names from there, such as `unet.mid.to_q`. module: what is registered.
    """
    *parents, leaf = path.split(".")
    for name in parents:
        children = dict(root.named_children())
        if name not in children:
            children[name] = nn.Module()
            setattr(root, name, children[name])
        root = children[name]
    setattr(root, leaf, module)  # add_module refuses what is called like a method, such as `start` or `type`
