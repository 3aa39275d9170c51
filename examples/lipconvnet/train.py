"""Train one LipConvnet and score it.

    python -m examples.lipconvnet.train --folder work --groups 4,- --out outputs/lipconvnet
    python -m examples.lipconvnet.train --data cifar100 --folder cifar --depth 15 --width 32 --out outputs/cifar100

Writes `checkpoint.pt` after every epoch, from which the same command goes on; in the end `scores.json`, and
`network.pt2`, a program of plain convolutions that `torch.export.load` runs without this repository.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import gsoft
from examples.lipconvnet.flags import (
    add_picture_flags,
    add_training_flags,
    at_least,
    groups,
    read_pictures,
    refuse_without_effect,
)
from examples.lipconvnet.network import PICTURE_SIZE, Convolutions, LipConvnet, check_fits
from examples.lipconvnet.scores import check_attack, score
from examples.lipconvnet.training import Run, Settings, train
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.files import check_writable, whole_file


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lipconvnet.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_picture_flags(parser)
    add_training_flags(parser, epochs=200)
    parser.add_argument("--groups", type=groups, default=(4, None), help="a,b or a,- of GSConv2d (4,-), or soc")
    parser.add_argument("--not_paired", action="store_true", help="shuffle channels one by one, not in pairs")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", type=expanded_path, required=True, help="folder of the checkpoint and the results")
    args = parser.parse_args()
    refuse_without_effect(args, parser)
    check_writable(args.out, "--out")
    check_attack(args.attacked)
    convolutions = Convolutions(args.groups, not args.not_paired)
    check_fits(args.depth, args.width, convolutions)
    pictures = read_pictures(args, args.seed)
    settings = Settings(
        convolutions, args.depth, args.width, args.epochs, args.batch_size, args.learning_rate, args.seed
    )
    with tqdm(total=args.epochs, unit="epoch") as bar:

        def progress(so_far: Run) -> None:
            bar.update(len(so_far.history) - bar.n)
            bar.set_postfix(validation=f"{so_far.history[-1]['validation_accuracy']:.3f}")

        trained = train(settings, pictures, args.out / "checkpoint.pt", progress)
    network = trained.best_network()
    scores = score(network, pictures.test, args.attacked, args.attack_steps)
    record = {"epoch": trained.best_epoch, "test": asdict(scores), "history": trained.history}
    with whole_file(args.out / "scores.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    export(network, args.out / "network.pt2")
    attacked = f", under attack {scores.attacked_accuracy:.1%} of {scores.attacked}" if scores.attacked else ""
    print(
        f"{convolutions.name}: accuracy {scores.accuracy:.1%}, certified {scores.certified:.1%}{attacked}; "
        f"epoch {trained.best_epoch + 1}; {args.out / 'network.pt2'}"
    )
    return 0


def export(network: LipConvnet, path: Path) -> None:
    """Write the network as a program of PyTorch's own operations, for any number of pictures."""
    example = torch.zeros(2, 3, PICTURE_SIZE, PICTURE_SIZE)
    program = torch.export.export(
        gsoft.plain_copy(network), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    with whole_file(path) as file:
        torch.export.save(program, file)


if __name__ == "__main__":
    run(main)
