"""What a training step would ask of a GPU with every method, counted without one.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json

Counted, not measured: operations that start a kernel in one forward and backward pass (PyTorch's own count: a product
is one, and so is fused attention), how often the program waits for the GPU, and bytes kept for the backward pass. The
optimizer is left out: it is the same for every method. Models have their real shapes, transformers few of their blocks;
nothing is computed (see `benchmarks.pretended_gpu`).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.bases import DTYPES, KLEIN_4B, SD15, SDXL
from benchmarks.measure import Records, file_to_write, table
from benchmarks.pretended_gpu import GPU, PretendedGPU, bytes_in_use
from eval.baselines import adapted_layers, inject_baseline
from eval.methods import matched
from gsoft_diffusion.adapters.injection import inject

# BOFT is not among them: PEFT makes its permutations from numbers, and there are none.
METHODS = {
    "floor": "frozen, biases train",
    "lora": "LoRA (PEFT)",
    "oft": "OFT v2 (PEFT)",
    "gsoft": "GSOFT",
    "double_gsoft": "Double GSOFT",
}


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    denoiser: makes it. inputs: makes its keyword arguments for a batch and a side of the latents. latents: that side.
    """

    title: str
    denoiser: Callable[[], Any]
    inputs: Callable[[int, int], dict[str, Tensor]]
    latents: int
    batch: int = 1
    checkpointing: bool = False
    text_encoder: bool = False
    dtype: str = "bfloat16"


def sd15() -> UNet2DConditionModel:
    return UNet2DConditionModel(**SD15)


def sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(**SDXL)


def flux1() -> FluxTransformer2DModel:
    """The published configuration, but 2 of 19 and 4 of 38 blocks."""
    return FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)


def flux2() -> Flux2Transformer2DModel:
    """FLUX.2 klein 4B's configuration, but 2 of 5 and 8 of 20 blocks."""
    return Flux2Transformer2DModel(**KLEIN_4B | {"num_layers": 2, "num_single_layers": 8})


def unet_inputs(text_width: int, pooled: int | None = None) -> Callable[[int, int], dict[str, Tensor]]:
    def inputs(batch: int, side: int) -> dict[str, Any]:
        given: dict[str, Any] = {
            "sample": torch.zeros(batch, 4, side, side),
            "timestep": torch.zeros(batch, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(batch, 77, text_width),
        }
        if pooled is not None:
            given["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(batch, pooled),
                "time_ids": torch.zeros(batch, 6),
            }
        return given

    return inputs


def flux_inputs(channels: int, text_width: int, axes: int, pooled: int | None) -> Callable[[int, int], dict[str, Any]]:
    """side: of the latents in the transformer's tokens."""

    def inputs(batch: int, side: int) -> dict[str, Any]:
        given = {
            "hidden_states": torch.zeros(batch, side * side, channels),
            "timestep": torch.zeros(batch),
            "encoder_hidden_states": torch.zeros(batch, 512, text_width),
            "img_ids": torch.zeros(side * side, axes),
            "txt_ids": torch.zeros(512, axes),
        }
        if pooled is not None:
            given |= {"pooled_projections": torch.zeros(batch, pooled), "guidance": torch.ones(batch)}
        return given

    return inputs


OF_SD15, OF_SDXL = unet_inputs(768), unet_inputs(2048, pooled=1280)
CASES = {
    "sd15": Case("Stable Diffusion 1.5", sd15, OF_SD15, 64),
    "sd15_float32": Case("the same, float32", sd15, OF_SD15, 64, dtype="float32"),
    "sd15_batch4": Case("the same, batch 4", sd15, OF_SD15, 64, batch=4),
    "sd15_checkpointing": Case("the same, gradient checkpointing", sd15, OF_SD15, 64, checkpointing=True),
    "sd15_text_encoder": Case("the same, text encoder as well", sd15, OF_SD15, 64, text_encoder=True),
    "sdxl": Case("Stable Diffusion XL", sdxl, OF_SDXL, 128),
    "flux1": Case("FLUX.1, 6 of 57 blocks", flux1, flux_inputs(64, 4096, 3, pooled=768), 64),
    "flux2": Case("FLUX.2 klein 4B, 10 of 25 blocks", flux2, flux_inputs(128, 7680, 4, pooled=None), 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the counts")
    args = parser.parse_args()
    records = Records(args.out, {})
    wanted = [
        (case, method) for case in args.cases for method in args.methods if not records.has(case=case, method=method)
    ]
    for case, method in tqdm(wanted, unit="count"):
        records.add(case=case, method=method, **count(CASES[case], method))
    print(report(records.records))


def count(case: Case, method: str) -> dict[str, Any]:
    """Kernels, waits and kept bytes of the second of two passes: in the first, some things are made for good."""
    gc.collect()
    with PretendedGPU(numbers=False) as gpu:
        torch.set_default_dtype(DTYPES[case.dtype])
        try:
            with GPU:
                denoiser, text_encoder = case.denoiser().requires_grad_(False).train(), None
                if case.text_encoder:
                    text_encoder = _text_encoder().requires_grad_(False)
                given = case.inputs(case.batch, case.latents)
                tokens = torch.zeros(case.batch, 77, dtype=torch.long)
        finally:
            torch.set_default_dtype(torch.float32)
        if case.checkpointing:
            denoiser.enable_gradient_checkpointing()
        parameters = _put_in(method, denoiser, [text_encoder] if text_encoder else [])
        before = bytes_in_use()
        for _ in range(2):
            gpu.reset()
            text = {} if text_encoder is None else {"encoder_hidden_states": text_encoder(tokens)[0]}
            loss = denoiser(**(given | text)).sample.float().square().mean()
            gc.collect()
            kept = bytes_in_use() - before
            loss.backward()
            del loss, text
            result = {
                "kernels": gpu.kernels.total(),
                "waits": gpu.waits.total(),
                "kept_bytes": kept,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "by_operation": dict(gpu.kernels.most_common()),
            }
            with torch.no_grad():
                for parameter in parameters:  # as an optimizer does
                    parameter.add_(0)
                    parameter.grad = None
    return result


def _text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


def _put_in(method: str, denoiser: nn.Module, text_encoders: list[nn.Module]) -> list[nn.Parameter]:
    """Put the method into the model; returns what it trains."""
    layers = adapted_layers(denoiser, text_encoders, bool(text_encoders))
    if method == "floor":
        biases = [layer.bias for layer in layers.values() if isinstance(layer.bias, nn.Parameter)]
        norms = [tensor for name, tensor in denoiser.named_parameters() if name.endswith("norm_k.weight")]
        parameters = biases or norms  # FLUX.2 has no biases
        for parameter in parameters:
            parameter.requires_grad_()
        return parameters
    config: Any = matched(method, "small", layers, bool(text_encoders))
    adapter: Any = (inject if "gsoft" in method else inject_baseline)(config, denoiser, text_encoders)
    return list(adapter.parameters())


def report(records: list[dict[str, Any]]) -> str:
    """Kernels of each method and case, over LoRA's; waits; kept bytes of Double GSOFT over LoRA's."""
    found = {(record["case"], record["method"]): record for record in records}
    rows = []
    for name, case in CASES.items():
        of_lora = found.get((name, "lora"))
        if of_lora is None:
            continue
        row = [case.title]
        for method in METHODS:
            record = found.get((name, method))
            row.append(f"{record['kernels']:,} ({record['kernels'] / of_lora['kernels']:.2f})" if record else "")
        ours = found.get((name, "double_gsoft"))
        row += [str(ours["waits"]), f"{ours['kept_bytes'] / of_lora['kept_bytes']:.2f}"] if ours else ["", ""]
        rows.append(row)
    header = ["", *METHODS.values(), "waits, Double GSOFT", "kept, Double GSOFT / LoRA"]
    return table(header, rows)


if __name__ == "__main__":
    main()
