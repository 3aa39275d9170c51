"""A denoiser call while sampling: the base model, the adapter merged, beside the model, and as it was published.

python -m benchmarks.sampling --base sd15 --latents 64 --out benchmarks/results/sampling_sd15_64.json

Every repetition times one call of the UNet, for a picture with guidance (two in a batch), in each state. The rotated
weights are made before, and the time that takes is given by itself: it is paid once for all pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bases import BASES, DTYPES, load_base
from benchmarks.measure import CLOCKS, Records, median, table
from benchmarks.published import PublishedAdapter
from benchmarks.step import turned
from eval.methods import matched
from gsoft_diffusion.adapters.injection import find_attentions, find_linears, inject
from gsoft_diffusion.config.command_line import expanded_path

STATES = {
    "base": "base model",
    "merged": "merged",
    "unmerged": "beside the model",
    "published": "as published: solved for and rotated in every call",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="sd15")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 for sd15, float32 for mini, unless given")
    parser.add_argument("--latents", type=int, help="side of the latents; 64 for sd15, 16 for mini, unless given")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where other programs run at the same time")
    parser.add_argument("--out", type=expanded_path, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    dtype = args.dtype or {"sd15": "bfloat16", "mini": "float32"}[args.base]
    side = args.latents or {"sd15": 64, "mini": 16}[args.base]
    records = Records(args.out, {"base": args.base, "dtype": dtype, "latents": side, "clock": args.clock})
    wanted = [i for i in range(args.repetitions) if not records.has(repetition=i)]
    if wanted:
        measure(args.base, DTYPES[dtype], side, wanted, records, CLOCKS[args.clock])
    print(report(records.records))


@torch.inference_mode()
def measure(
    base: str, dtype: torch.dtype, side: int, repetitions: list[int], records: Records, clock: Callable[[], float]
) -> None:
    unet, text_encoder, length = load_base(base, dtype)
    layers = find_linears(find_attentions(unet), {})
    text = text_encoder(torch.zeros(2, length, dtype=torch.long))[0]
    latents = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    config: Any = matched("double_gsoft", "small", layers, text_encoder=False)

    def call() -> float:
        started = clock()
        unet(latents, torch.tensor(500), encoder_hidden_states=text)
        return clock() - started

    call()
    for repetition in tqdm(repetitions):
        seconds = {"base": min(call(), call())}
        with torch.inference_mode(False):
            published = PublishedAdapter(config, unet, [])
        seconds["published"] = min(call(), call())
        published.remove()
        with torch.inference_mode(False):
            adapter = inject(config, unet)
            turned(list(adapter.parameters()))
        first = call()  # makes what is kept
        seconds["unmerged"] = min(call(), call())
        started = clock()
        adapter.merge()
        merging = clock() - started
        seconds["merged"] = min(call(), call())
        adapter.remove()
        records.add(repetition=repetition, seconds=seconds, merging=merging, first_unmerged=first)


def report(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            title,
            f"{median(record['seconds'][state] for record in records):.3f}",
            f"{median(record['seconds'][state] / record['seconds']['base'] for record in records):.3f}",
        ]
        for state, title in STATES.items()
    ]
    making = median(record["first_unmerged"] - record["seconds"]["unmerged"] for record in records)
    return (
        f"{table(['', 'call, s', '/ base'], rows)}\n\n{len(records)} repetitions. Making the rotated weights, once: "
        f"{making:.2f} s beside the model; {median(record['merging'] for record in records):.2f} s merged."
    )


if __name__ == "__main__":
    sys.exit(main())
