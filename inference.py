"""Draw pictures with an adapter that train_dreambooth_gsoft.py wrote.

python inference.py --adapter outputs/my_dog/adapter.safetensors --prompt "a sks dog on the beach"
"""

from gsoft_diffusion.config import GenerationConfig
from gsoft_diffusion.generation import draw
from gsoft_diffusion.options import parse, run


def main() -> int:
    draw(parse(GenerationConfig, __doc__))
    return 0


if __name__ == "__main__":
    run(main)
