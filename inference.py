"""Draw pictures with an adapter that train_dreambooth_gsoft.py wrote.

python inference.py --adapter outputs/my_dog/adapter.safetensors --prompt "a sks dog on the beach"
"""

from gsoft_diffusion.config import GenerationConfig
from gsoft_diffusion.config.command_line import parse, run


def main() -> int:
    config = parse(GenerationConfig, __doc__)
    from gsoft_diffusion.sampling.generation import draw  # after mistakes in flags are found: it takes seconds

    draw(config)
    return 0


if __name__ == "__main__":
    run(main)
