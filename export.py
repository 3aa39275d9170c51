"""Take an adapter to other tools: merged into a whole model, or approximated by a LoRA.

python export.py --adapter outputs/my_dog/adapter.safetensors --format checkpoint
"""

from gsoft_diffusion.config import ExportConfig
from gsoft_diffusion.export import export
from gsoft_diffusion.options import parse, run


def main() -> int:
    export(parse(ExportConfig, __doc__))
    return 0


if __name__ == "__main__":
    run(main)
