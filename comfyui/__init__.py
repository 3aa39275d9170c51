"""A node pack without nodes: with it, ComfyUI's own LoRA loaders read adapters of gsoft-diffusion. See README.md."""

from .weight_adapter import register

NODE_CLASS_MAPPINGS: dict[str, type] = {}

register()
