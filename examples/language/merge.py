"""Merge an adapter into its base model: a plain folder of transformers, which needs nothing of this project.

    python -m examples.language.merge --adapter outputs/sentiment/adapter.safetensors --output_dir outputs/merged

`transformers.pipeline("text-classification", "outputs/merged")` runs it.
"""

from __future__ import annotations

import argparse

from examples.language.adapter import merge
from gsoft_diffusion.config.command_line import expanded_path, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=expanded_path, required=True, help="file that examples.language.train made")
    parser.add_argument("--model", help="base model, a folder or a name on the hub (default: what the file names)")
    parser.add_argument("--output_dir", type=expanded_path, required=True, help="folder to make")
    flags = parser.parse_args()
    merge(flags.adapter, flags.output_dir, flags.model)
    print(flags.output_dir)
    return 0


if __name__ == "__main__":
    run(main)
