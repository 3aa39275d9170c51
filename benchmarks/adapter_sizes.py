"""How large adapters of the published base models are: with the paper's 32 blocks, and by default.

python -m benchmarks.adapter_sizes --out benchmarks/results/adapter_sizes.json

Counted on the published configurations, without weights, with everything that trains by default: the denoiser's
attention and the CLIP text encoders.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.bases import PUBLISHED, Published
from benchmarks.measure import file_to_write
from gsoft_diffusion.adapters.injection import completed, find_attentions, find_clip_attentions, find_linears
from gsoft_diffusion.adapters.size import adapter_bytes
from gsoft_diffusion.config import AdapterConfig

PAPER = AdapterConfig(nblocks=32)  # the default until base models decided


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the sizes")
    args = parser.parse_args()
    found = {name: sizes(published) for name, published in PUBLISHED.items()}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


def sizes(published: Published) -> dict[str, Any]:
    """Of one base model: adapted layers, their widest side, the default, and bytes; as JSON values.

    published: its configuration.
    """
    denoiser, encoders = published.networks()
    text = find_clip_attentions(bool(encoders), encoders)
    separate = find_linears(find_attentions(denoiser, fused=False), text)
    linears = find_linears(find_attentions(denoiser), text)
    usual = completed(AdapterConfig(text_encoder=bool(encoders)), denoiser, encoders)
    return {
        "layers": len(linears),
        "separate_layers": len(separate),
        "widest": max(max(linear.in_features, linear.out_features) for linear in linears.values()),
        "default": {"nblocks": usual.nblocks, "block_size": usual.block_size},
        "bytes": {
            "paper": adapter_bytes(PAPER, linears),
            "paper_separate": adapter_bytes(PAPER, separate),
            "default": adapter_bytes(usual, linears),
        },
    }


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The sizes as a table in Markdown, a line each.

    found: by base model, as `sizes` gives them.
    """
    lines = ["| base model | adapted layers | widest | `--nblocks 32` | by default | |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        count, before = f"{one['layers']}", f"{one['bytes']['paper'] / 1e6:,.0f} MB"
        if one["separate_layers"] < one["layers"]:
            count += f", of them {one['layers'] - one['separate_layers']} slices"
            before += f" ({one['bytes']['paper_separate'] / 1e6:,.0f} MB without slices)"
        usual = next(f"`--{setting} {value}`" for setting, value in one["default"].items() if value)
        after = f"{one['bytes']['default'] / 1e6:,.0f} MB"
        lines.append(f"| {name} | {count} | {one['widest']} | {before} | {after} | {usual} |")
    return lines


if __name__ == "__main__":
    main()
