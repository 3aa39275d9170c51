"""Teach a text-to-image model a subject from a few photos, with orthogonal Group-and-Shuffle adapters (GSOFT).

python train_dreambooth_gsoft.py --instance_data_dir photos_of_my_dog --class_word dog
"""

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.command_line import parse, run


def main() -> int:
    config = parse(TrainingConfig, __doc__)
    from gsoft_diffusion.training.train import train  # after mistakes in flags are found: it takes seconds

    result = train(config)
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    run(main)
