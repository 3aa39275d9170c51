"""Take an adapter to other tools: merged into a whole model, or approximated by a LoRA.

python export.py --adapter outputs/my_dog/adapter.safetensors --format checkpoint
"""

from gsoft_diffusion.config import ExportConfig
from gsoft_diffusion.config.command_line import parse, run


def main() -> int:
    config = parse(ExportConfig, __doc__)
    from gsoft_diffusion.publish.export import export  # after mistakes in flags are found: it takes seconds

    export(config)
    return 0


if __name__ == "__main__":
    run(main)
