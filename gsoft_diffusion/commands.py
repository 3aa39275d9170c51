"""The three commands. Each finds mistakes in flags before it imports what takes seconds.

An installation has them as gsoft-train, gsoft-draw and gsoft-export. A checkout has them as scripts at its root, too.
"""

from __future__ import annotations

from typing import NoReturn

from gsoft_diffusion.config import ExportConfig, GenerationConfig, TrainingConfig
from gsoft_diffusion.config.command_line import command, parse, run


def train() -> NoReturn:
    """Train an adapter as the command line says, and leave the program: 0 if done, 130 if stopped, 2 on bad input."""
    run(_train)


def draw() -> NoReturn:
    """Draw pictures as the command line says, and leave the program: 0 if done, 130 if stopped, 2 on bad input."""
    run(_draw)


def export() -> NoReturn:
    """Export an adapter as the command line says, and leave the program: 0 if done, 130 if stopped, 2 on bad input."""
    run(_export)


def _train() -> int:
    config = parse(
        TrainingConfig,
        "Teach a text-to-image model a subject from a few photos, by orthogonal Group-and-Shuffle adapters (GSOFT).\n\n"
        f"{command('gsoft-train')} --instance_data_dir photos_of_my_dog --class_word dog",
    )
    from gsoft_diffusion.training.train import train

    return 130 if train(config).interrupted else 0


def _draw() -> int:
    config = parse(
        GenerationConfig,
        "Draw pictures with a trained adapter.\n\n"
        f'{command("gsoft-draw")} --adapter outputs/my_dog/adapter.safetensors --prompt "a sks dog on the beach"',
    )
    from gsoft_diffusion.sampling.drawing import draw

    draw(config)
    return 0


def _export() -> int:
    config = parse(
        ExportConfig,
        "Take an adapter to other tools: merged into a whole model, or approximated by a LoRA.\n\n"
        f"{command('gsoft-export')} --adapter outputs/my_dog/adapter.safetensors --format checkpoint",
    )
    from gsoft_diffusion.publish.export import export

    export(config)
    return 0
