"""What it saves and costs to store frozen layers in eight bits or in main memory, beside diffusers' layerwise casting.

python -m benchmarks.frozen_storage --out benchmarks/results/frozen_storage.json

Four tables. Weights: of published configurations, without weights, in bfloat16, and in four bits by what a layer keeps
for a number. Held: bytes of a small Z-Image (960 wide, 4 + 8 blocks, 256 pixels, bfloat16) that a GPU would hold in a
training step, as weights and as what autograd keeps from the forward to the backward pass; diffusers' hooks are on the
same layers. Drift: how far the miniature's prediction moves, over noise, timesteps and prompts, relative to its size.
Rounding: how far normal weights of a size move, with our scale and without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ZImageTransformer2DModel,
)
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, UntypedStorage, nn

from benchmarks.bases import PUBLISHED
from benchmarks.measure import file_to_write, machine, table
from gsoft_diffusion import AdapterConfig, inject
from gsoft_diffusion.models.families import BaseModel, whole_view
from gsoft_diffusion.models.frozen_storage import FLOAT8, StoredLinear, store, stored_layers, stored_weights
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.quantization import quantizable, quantize

COUNTED = (
    "Stable Diffusion 1.5",
    "Stable Diffusion XL",
    "Stable Diffusion 3.5 medium",
    "FLUX.1 dev",
    "FLUX.2 klein 4B",
    "FLUX.2 dev",
    "Z-Image",
)


def casting(model: nn.Module) -> None:
    for layer in quantizable(model, True).values():
        apply_layerwise_casting(layer, FLOAT8, layer.weight.dtype, None, None)


WAYS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "plain": ("as they are", lambda model: None),
    "float8": ("--quantize_base float8", lambda model: store(model, True, float8=True, in_main_memory=False)),
    "casting": ("diffusers' layerwise casting", casting),
    "offload": ("--offload_layers", lambda model: store(model, True, float8=False, in_main_memory=True)),
    "both": ("both of ours", lambda model: store(model, True, float8=True, in_main_memory=True)),
}
DRIFT: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "float8": WAYS["float8"],
    "casting": WAYS["casting"],
    "nf4": ("--quantize_base nf4", lambda model: quantize(model, "nf4", "cpu", True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    out = parser.parse_args().out
    result: dict[str, Any] = {
        "machine": machine(),
        "weights": [{"model": name, **weights(name)} for name in COUNTED],
        "bytes_in_four_bits": bytes_in_four_bits(),
        "held": [
            {"way": way, "checkpointing": checkpointing, **held(way, checkpointing)}
            for checkpointing in (False, True)
            for way in WAYS
        ],
        "drift": [{"way": way, **drift(way)} for way in DRIFT],
        "rounding": [rounding(size) for size in (0.05, 0.02, 0.01, 0.005)],
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result))


def weights(name: str) -> dict[str, int]:
    """Numbers of a published model's denoiser, and of those its layers that no adapter uses have.

    `stored_unfused` is the latter with `--no_fused_attention`.
    """
    model, _ = PUBLISHED[name].networks()
    stored, unfused = (
        sum(layer.weight.numel() for layer in stored_layers(model, fused).values()) for fused in (True, False)
    )
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return {"numbers": numbers, "stored": stored, "stored_unfused": unfused}


def bytes_in_four_bits(side: int = 4096) -> float:
    """What nf4 keeps for one number of a layer, its scales included. side: of the layer that is measured."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(side, side, bias=False)])
    quantize(model, "nf4", "cpu", True)
    weight: Any = next(model.parameters())
    state = weight.quant_state
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(tensor.nbytes for tensor in (weight, *scales)) / side**2


def small_z_image() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=960, n_layers=8, n_heads=8, n_kv_heads=8, cap_feat_dim=64, axes_dims=[40, 40, 40], axes_lens=[1024, 64, 64]
    )
    return nn.Module.to(model, torch.bfloat16).requires_grad_(False)


def held(way: str, checkpointing: bool, make: Callable[[], ZImageTransformer2DModel] = small_z_image) -> dict[str, int]:
    """Bytes of the weights that a GPU would hold, and of what autograd keeps from the forward to the backward pass."""
    model = make().train()
    inject(AdapterConfig(nblocks=32, text_encoder=False), model)
    WAYS[way][1](model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    saved: dict[int, UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # kept, so that no other gets its place
        return tensor

    picture = torch.zeros(model.config.in_channels, 1, 32, 32, dtype=torch.bfloat16)
    caption = torch.zeros(32, model.config.cap_feat_dim, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model([picture], torch.zeros(1), [caption]).sample[0].float().square().mean()
    assert loss.requires_grad
    offloaded = way in ("offload", "both")
    on_gpu = [*model.parameters(), *([] if offloaded else stored_weights(model))]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*on_gpu, *stored_weights(model))}
    return {
        "weights": sum(tensor.nbytes for tensor in on_gpu),
        "kept": sum(each.nbytes() for key, each in saved.items() if key not in known),
    }


@torch.no_grad()
def drift(way: str, base: str = "data/mini_base", samples: int = 32) -> dict[str, float]:
    """Relative distance of predictions and of the layers' weights from those of the base, root mean square."""
    exact, changed = load_model(base), load_model(base)
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), changed.denoiser)  # says which layers are adapted
    DRIFT[way][1](changed.denoiser)
    difference = _predictions(changed, samples) - _predictions(exact, samples)
    adapter.remove()
    return {"prediction": (difference.norm() / _predictions(exact, samples).norm()).item()}


def rounding(size: float) -> dict[str, float]:
    """Relative distance, root mean square, of a normal matrix in eight bits from what it was. size: its deviation."""
    linear = nn.Linear(1024, 1024, bias=False).requires_grad_(False)
    nn.init.normal_(linear.weight, std=size, generator=torch.Generator().manual_seed(0))
    layer = StoredLinear(linear, float8=True, in_main_memory=False)
    assert layer.scale is not None
    kept = {"scaled": layer.weight.float() * layer.scale, "plain": linear.weight.to(FLOAT8).float()}
    errors = {name: (weight - linear.weight).norm() / linear.weight.norm() for name, weight in kept.items()}
    return {"size": size} | {name: error.item() for name, error in errors.items()}


def _predictions(model: BaseModel, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(samples, *model.latent_shape(model.resolution), generator=generator)
    timesteps = torch.randint(0, 1000, (samples,), generator=generator)
    conditioning = model.encode_prompts(["a photo of a poodle", "a blue car on the beach"] * (samples // 2))
    views = whole_view(model.resolution, model.resolution).repeat(samples, 1)
    return model.predict(latents, timesteps, conditioning, views)


def report(result: dict[str, Any]) -> str:
    """The four tables."""
    of_models = [
        [
            row["model"],
            f"{2 * row['numbers'] / 1e9:.1f}",
            f"{(2 * row['numbers'] - row['stored']) / 1e9:.1f}",
            *(
                f"{(2 * row['numbers'] - (2 - result['bytes_in_four_bits']) * row[which]) / 1e9:.1f}"
                for which in ("stored", "stored_unfused")
            ),
            f"{2 * (row['numbers'] - row['stored']) / 1e9:.1f}",
        ]
        for row in result["weights"]
    ]
    of_steps = [
        [WAYS[row["way"]][0], "yes" if row["checkpointing"] else "no"]
        + [f"{row[name] / 2**20:,.0f}" for name in ("weights", "kept")]
        for row in result["held"]
    ]
    of_drift = [[DRIFT[row["way"]][0], f"{100 * row['prediction']:.2g} %"] for row in result["drift"]]
    of_rounding = [[f"{row[name]:.3g}" for name in ("size", "scaled", "plain")] for row in result["rounding"]]
    return "\n\n".join(
        [
            table(
                ["denoiser, GB", "bfloat16", "float8", "nf4", "nf4 --no_fused_attention", "--offload_layers"], of_models
            ),
            table(
                ["layers that no adapter uses", "checkpointing", "weights, MiB", "kept for the backward pass"], of_steps
            ),
            table(["", "drift of the prediction"], of_drift),
            table(["weights' deviation", "error, --quantize_base float8", "layerwise casting"], of_rounding),
        ]
    )


if __name__ == "__main__":
    main()
