"""What rotating slices of fused matrices costs, against layers of their own with the same weights.

    python -m benchmarks.fused --out benchmarks/results/fused.json

One single-stream block of FLUX.2 klein 4B, with its matrices as published and taken apart, each frozen and adapted.
Counted as in `benchmarks.kernels`, in bfloat16 with a picture of 1024 pixels and 512 tokens of text: kernels of a
forward and a backward pass, waits for the GPU, and bytes kept between the passes. Measured on this processor: seconds
of both passes, in float32 with 256 tokens, by the processor's clock.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from torch import Tensor, nn

import gsoft.adapter
from benchmarks.measure import Records, file_to_write, median, table
from benchmarks.pretended_gpu import GPU, PretendedGPU, bytes_in_use
from gsoft import Adapter, RotationConfig
from gsoft.linear_slice import AnyLinear
from gsoft_diffusion.models.attention_layers import PROJECTIONS, attention_layers

WIDTH, HEADS = 3072, 24
TOKENS, FEW_TOKENS = 4096 + 512, 256
REPETITIONS = 5
CONFIG = RotationConfig(block_size=64)
KINDS = {"slices": "fused, slices rotated", "separate": "taken apart, layers rotated"}
ROOM = {True: "rotated weights", False: "no room for them: rotated activations"}


class Separate(nn.Module):
    """The attention and feed-forward layer of a block with a layer for each slice and each rest of its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.inward = nn.Linear(WIDTH, 6 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outward = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, attn: Any, x: Tensor) -> Tensor:
        query, key, value = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        attended = dispatch_attention_fn(attn.norm_q(query), attn.norm_k(key), value).flatten(2)
        return self.to_out(attended) + self.outward(attn.mlp_act_fn(self.inward(x)))


class Taken(nn.Module):
    """A block's attention, whose matrices are those of `Separate`."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.separate = Separate()
        self.attn = attn
        self.attn.to_qkv_mlp_proj = self.attn.to_out = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.separate(self.attn, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the counts")
    args = parser.parse_args()
    records = Records(args.out, {"tokens": TOKENS, "few_tokens": FEW_TOKENS, "block_size": CONFIG.block_size})
    for kind in KINDS:
        for adapted, room in ((False, True), (True, True), (True, False)):
            key = {"kind": kind, "adapted": adapted, "room": room}
            if not records.has(**key):
                with enough_room(room):
                    records.add(**key, **count(kind, adapted), seconds=measure(kind, adapted))
    print(report(records.records))


@contextmanager
def enough_room(room: bool) -> Iterator[None]:
    """Inside the block adapters keep rotated weights, or have no room for any."""
    usual = gsoft.adapter.KEPT_WEIGHT_BYTES
    gsoft.adapter.KEPT_WEIGHT_BYTES = usual if room else 0
    try:
        yield
    finally:
        gsoft.adapter.KEPT_WEIGHT_BYTES = usual


def block(kind: str, adapted: bool) -> tuple[nn.Module, Adapter | None]:
    """The block's attention and feed-forward layer, frozen, and the adapter in it."""
    made: Any = Flux2SingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS).attn
    layers: dict[str, AnyLinear] = attention_layers(made)
    if kind == "separate":
        made = Taken(made)
        layers = {name: getattr(made.separate, name) for name in PROJECTIONS}
    made.requires_grad_(False)
    if not adapted:
        return made, None
    adapter = Adapter(CONFIG, {f"block.{name}": layer for name, layer in layers.items()}, [made])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01)
    adapter.attach()
    return made, adapter


def passes(made: nn.Module, adapter: Adapter | None, tokens: int) -> Iterator[None]:
    """A forward pass, then after the pause a backward pass and what an optimizer does."""
    x = torch.zeros(1, tokens, WIDTH, requires_grad=True)
    loss = made(x).sum()
    yield
    loss.backward()
    with torch.no_grad():
        for parameter in adapter.parameters() if adapter else ():
            parameter.add_(0)
            parameter.grad = None


def count(kind: str, adapted: bool) -> dict[str, int]:
    """Kernels, waits and kept bytes of the second of two passes."""
    gc.collect()
    with PretendedGPU(numbers=False) as gpu:
        torch.set_default_dtype(torch.bfloat16)
        try:
            with GPU:
                made, adapter = block(kind, adapted)
                before = bytes_in_use()
                for _ in range(2):
                    gpu.reset()
                    running = passes(made, adapter, TOKENS)
                    next(running)
                    gc.collect()
                    kept = bytes_in_use() - before
                    next(running, None)
        finally:
            torch.set_default_dtype(torch.float32)
        return {"kernels": gpu.kernels.total(), "waits": gpu.waits.total(), "kept_bytes": kept}


def measure(kind: str, adapted: bool) -> list[float]:
    """Seconds of the processor for both passes, of each repetition after a first."""
    torch.manual_seed(0)
    made, adapter = block(kind, adapted)
    seconds = []
    for _ in range(1 + REPETITIONS):
        started = time.process_time()
        for _ in passes(made, adapter, FEW_TOKENS):
            pass
        seconds.append(time.process_time() - started)
    return seconds[1:]


def report(records: list[dict[str, Any]]) -> str:
    """All counts and times, in a table."""
    rows = [
        [
            (KINDS[one["kind"]] + ", " + ROOM[one["room"]])
            if one["adapted"]
            else KINDS[one["kind"]].replace("rotated", "frozen"),
            f"{one['kernels']}",
            f"{one['waits']}",
            f"{one['kept_bytes'] / 1e6:,.0f} MB",
            f"{median(one['seconds']):.2f} s",
        ]
        for one in sorted(records, key=lambda one: (one["adapted"], not one["room"]))
    ]
    return table(["one block", "kernels", "waits", "kept", "processor"], rows)


if __name__ == "__main__":
    main()
