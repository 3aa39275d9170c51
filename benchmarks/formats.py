"""What each way out of the project costs and loses: file sizes, and how much of the change of the weights is lost.

python -m benchmarks.formats --out benchmarks/results/formats.json

Stable Diffusion 1.5's real configuration with random weights, an adapter with random angles. `lost` is
`‖exported − (W' − W)‖ / ‖W' − W‖` over all adapted layers, at the strengths at which a program may use the file. The
node pack's is its own mathematics on the adapter's file; a LoRA and full differences are multiplied by the strength,
as programs do; a whole model has one strength.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.bases import load_base
from benchmarks.measure import file_to_write, machine
from gsoft_diffusion import AdapterConfig, AdapterStack, BaseModelIdentity, fingerprint, inject, save_adapter
from gsoft_diffusion.foundation.tensor_stream import TensorStream
from gsoft_diffusion.publish.layer_names import module_path
from gsoft_diffusion.publish.low_rank import LoraLayer, approximate, by_module, kohya_tensors

STRENGTHS = (0.5, 1.0, 1.5)
RANKS = (16, 64, 128)
CONFIG = AdapterConfig(nblocks=32, parametrization="cayley")
ANGLE = 0.01  # standard deviation of the learned numbers
HALF = torch.float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder) / "adapter.safetensors")
    args.out.write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n", encoding="utf-8")
    for row in result["formats"]:
        lost = ", ".join(f"{100 * share:.2g}% at {strength}" for strength, share in row["lost"].items())
        print(f"{row['format']:30} {row['bytes'] / 1e6:8.1f} MB; loses {lost}")


@torch.no_grad()
def measure(file: Path) -> dict[str, Any]:
    """Everything, as JSON values.

    file: where the adapter is written meanwhile.
    """
    unet, text_encoder, _ = load_base("sd15", torch.float32)
    write_adapter(file, unet, text_encoder)
    stack, tensors, pack = AdapterStack(unet, [text_encoder]), load_file(file), node_pack()
    for strength in STRENGTHS:
        stack.load(str(strength), file)
    linears = stack.layers([str(STRENGTHS[0])])
    composed = zip(*(stack.composed({str(strength): strength}) for strength in STRENGTHS), strict=True)
    lost: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    changes: dict[float, list[float]] = defaultdict(list)
    loras: list[LoraLayer] = []
    for at_strengths in tqdm(composed, total=len(linears), unit="layer"):
        name, weight, _ = at_strengths[0]
        rotated = {strength: one[2] for strength, one in zip(STRENGTHS, at_strengths, strict=True)}
        full = (rotated[1.0] - weight).to(HALF).float()
        largest = approximate(name, weight, rotated[1.0], max(RANKS), HALF)
        loras.append(largest)
        layer, _ = pack.find_layer(module_path(name), tensors)
        for strength, wanted in rotated.items():
            change = wanted - weight
            changes[strength].append(change.norm().item())

            def add(kind: str, exported: Tensor, strength: float = strength, change: Tensor = change) -> None:
                lost[kind][strength].append((exported - change).norm().item())

            add("adapter, by the node pack", pack.rotated_weight(weight, layer, strength) - weight)
            add("diff", strength * full)
            for rank in RANKS:
                lora = largest.truncated(rank)
                add(f"kohya_lora, rank {rank}", strength * (lora.up.float() @ lora.down.float()))
            if strength == 1:
                add("checkpoint", wanted.to(HALF).float() - weight)
    sizes = {"adapter, by the node pack": file.stat().st_size, "checkpoint": whole_model(unet, text_encoder)}
    sizes["diff"] = size_of({f"{name}.diff": linear.weight for name, linear in linears.items()})
    for rank in RANKS:
        truncated = [layer.truncated(rank) for layer in loras]
        sizes[f"kohya_lora, rank {rank}"] = size_of(
            kohya_tensors(by_module(truncated, linears), lambda path: (path.replace(".", "_"), 0))
        )
    norms = [linear.weight.norm().item() for linear in linears.values()]
    return {
        "adapter": CONFIG.to_dict(),
        "angle": ANGLE,
        "change": math.hypot(*changes[1.0]) / math.hypot(*norms),
        "formats": [
            {
                "format": kind,
                "bytes": sizes[kind],
                "lost": {str(at): math.hypot(*shares) / math.hypot(*changes[at]) for at, shares in by_strength.items()},
            }
            for kind, by_strength in lost.items()
        ],
    }


def write_adapter(file: Path, unet: Any, text_encoder: Any) -> None:
    """An adapter with random angles and scales."""
    identity = BaseModelIdentity("sd15", fingerprint(unet, [text_encoder]))
    adapter = inject(CONFIG, unet, [text_encoder])
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.add_(ANGLE * torch.randn(parameter.shape, generator=generator))
    save_adapter(file, adapter, base_model=identity, training={}, prompts={})
    adapter.remove()


def node_pack() -> ModuleType:
    """The mathematics of the node pack for ComfyUI, which is no package of ours."""
    path = Path(__file__).resolve().parent.parent / "comfyui" / "rotation.py"
    spec = importlib.util.spec_from_file_location("gsoft_rotation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of a file with these tensors in half precision."""
    return TensorStream({name: tuple(tensor.shape) for name, tensor in tensors.items()}, HALF, {}).size


def whole_model(unet: Any, text_encoder: Any) -> int:
    """Bytes of the whole model in half precision, with Stable Diffusion 1.5's VAE."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    return size_of(
        unet.state_dict() | {f"text.{n}": t for n, t in text_encoder.state_dict().items()} | vae.state_dict()
    )


if __name__ == "__main__":
    main()
