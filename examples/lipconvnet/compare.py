"""Compare SOC with group-and-shuffle convolutions, paired and not: the paper's Tables 3 and 4 on small pictures.

    python -m examples.lipconvnet.compare --folder work --out results/lipconvnet

Trains every kind of network from every seed, which also deals the things out to the parts, and measures their steps by
turns. Writes `settings.json`, `step_seconds.json` and a file a run into `runs`, and `report.md` and `accuracy.png` from
them. Killed at any point, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.demo import processor
from examples.lipconvnet.flags import (
    add_picture_flags,
    add_training_flags,
    at_least,
    read_pictures,
    refuse_without_effect,
)
from examples.lipconvnet.network import PICTURE_SIZE, Convolutions, LipConvnet, check_fits
from examples.lipconvnet.pictures import Pictures
from examples.lipconvnet.report import RUNS, SETTINGS, STEPS, write_report
from examples.lipconvnet.scores import check_attack, score
from examples.lipconvnet.training import Run, Settings, make_optimizer, train, train_step
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import check_writable, locked, whole_file

GROUPS: tuple[tuple[int, int | None], ...] = ((4, None), (4, 1), (4, 2), (4, 4))
ROWS = (Convolutions(), *(Convolutions(groups, paired) for paired in (True, False) for groups in GROUPS))
CLASSES_OF_STEPS = 100  # of the networks whose steps are measured, as in CIFAR-100
NOT_SETTINGS = {"out", "folder", "seeds"}  # where things are, and which runs there are, but not what is in one


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lipconvnet.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_picture_flags(parser)
    add_training_flags(parser, epochs=10)
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="of each kind of network")
    parser.add_argument(
        "--step_repetitions", type=at_least(2), default=10, help="measured steps of each kind of network"
    )
    parser.add_argument("--out", type=expanded_path, required=True, help="folder of the results")
    args = parser.parse_args()
    refuse_without_effect(args, parser)
    compare(args)
    return 0


def compare(args: argparse.Namespace) -> None:
    """Do the runs of these seeds that have not been done yet, and write the report.

    args: what the flags say. Raises UserError if the folder holds results of other settings, if another process is at
    work on one of the seeds, or if something is missing.
    """
    check_writable(args.out, "--out")
    check_attack(args.attacked)
    for row in ROWS:
        check_fits(args.depth, args.width, row)
    settle(args)
    missing = [(seed, row) for seed in args.seeds for row in ROWS if not record_of(args.out, row, seed).exists()]
    with tqdm(total=len(missing) * args.epochs, unit="epoch", disable=not missing) as bar:
        for seed in sorted({seed for seed, _ in missing}):
            with _alone(args.out / "work" / str(seed), seed):
                pictures = read_pictures(args, seed)
                for row in [row for its_seed, row in missing if its_seed == seed]:
                    write_json(record_of(args.out, row, seed), _one_run(args, row, seed, pictures, bar))
                    checkpoint_of(args.out, row, seed).unlink()
    if not (args.out / STEPS).exists():
        write_json(args.out / STEPS, {"machine": machine(), "seconds": step_seconds(args)})
    print(write_report(args.out).read_text())


@contextmanager
def _alone(folder: Path, seed: int) -> Iterator[None]:
    """Inside the block no other process can begin with this seed. Raises UserError if one has."""
    try:
        with locked(folder):
            yield
    except BlockingIOError as error:
        raise UserError(f"--seeds {seed}: {error} is at work on it; wait for it, or give other seeds") from error


def _one_run(args: argparse.Namespace, row: Convolutions, seed: int, pictures: Pictures, bar: tqdm) -> dict[str, Any]:
    """Train and score one network; returns its record."""
    bar.set_description(f"{row.name}, seed {seed}")
    settings = Settings(row, args.depth, args.width, args.epochs, args.batch_size, args.learning_rate, seed)

    def progress(so_far: Run) -> None:
        bar.update()
        bar.set_postfix(validation=f"{so_far.history[-1]['validation_accuracy']:.3f}")

    trained = train(settings, pictures, checkpoint_of(args.out, row, seed), progress)
    network = trained.best_network()
    scores = {"test": score(network, pictures.test, args.attacked, args.attack_steps)}
    if pictures.familiar is not None:
        scores["familiar"] = score(network, pictures.familiar, 0, args.attack_steps)
    return {
        "name": row.name,
        **asdict(row),
        "seed": seed,
        "classes": pictures.classes,
        **parameters(network),
        "epoch": trained.best_epoch,
        "scores": {part: asdict(found) for part, found in scores.items()},
        "history": trained.history,
    }


def parameters(network: LipConvnet) -> dict[str, int]:
    """How many numbers are learned; and as the paper counts: whole kernels, of which half is free, and biases."""
    layers = network.orthogonal_layers()
    exponentials = [part for layer in layers for part in layer.exponentials()]
    kernels = sum(part.channels**2 // part.groups * part.kernel_size**2 for part in exponentials)
    biases = sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    return {
        "learned_numbers": sum(parameter.numel() for parameter in network.parameters()),
        "parameters_as_in_paper": kernels + biases,
    }


def step_seconds(args: argparse.Namespace) -> dict[str, list[float]]:
    """Processor seconds of a training step of each kind of network, one after the other, as often as asked for.

    The n-th numbers of all kinds were measured one right after the other. The processor's clock does not count what
    other programs do.
    """
    pictures = torch.rand(args.batch_size, 3, PICTURE_SIZE, PICTURE_SIZE)
    labels = torch.randint(CLASSES_OF_STEPS, (args.batch_size,))
    networks = {}
    for row in ROWS:
        network = LipConvnet(args.depth, args.width, CLASSES_OF_STEPS, row, torch.zeros(3), torch.ones(()))
        optimizer = make_optimizer(network, args.learning_rate)
        networks[row.name] = network, optimizer
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for repetition in range(args.step_repetitions + 1):
        for name, (network, optimizer) in networks.items():
            started = time.process_time()
            train_step(network, optimizer, pictures, labels)
            if repetition:  # the first is for warming up
                seconds[name].append(time.process_time() - started)
    return seconds


def checkpoint_of(out: Path, row: Convolutions, seed: int) -> Path:
    """Where a run that is not finished keeps its checkpoint."""
    return out / "work" / str(seed) / f"{row.slug}.pt"


def record_of(out: Path, row: Convolutions, seed: int) -> Path:
    """What a finished run found."""
    return out / RUNS / f"{row.slug}-{seed}.json"


def settle(args: argparse.Namespace) -> None:
    """Write down the settings, or raise UserError if the folder's results are of other ones."""
    path, settings = args.out / SETTINGS, {name: getattr(args, name) for name in vars(args) if name not in NOT_SETTINGS}
    if not path.exists():
        write_json(path, settings)
    try:
        theirs = json.loads(path.read_text())
        other = sorted(name for name in settings if theirs.get(name) != settings[name])
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has no settings of this program; give another --out") from error
    if other:
        raise UserError(f"{args.out} has results of other settings (--{', --'.join(other)}); give another --out")


def write_json(path: Path, content: Any) -> None:
    """Write the file, which takes its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    run(main)
