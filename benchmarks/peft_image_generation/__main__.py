"""Run an experiment of ours in PEFT's image generation comparison, by PEFT's own program.

    python -m benchmarks.peft_image_generation --peft ../peft double_gsoft/flux2-klein-default

Needs what PEFT's comparison needs: a GPU, Python 3.12 or newer, a checkout of huggingface/peft that is installed
(`pip install -e ../peft`), and `pip install -r ../peft/method_comparison/image-gen/requirements.txt`. Training, scores
and the result's file are PEFT's, and so is its folder: `results/` of the comparison on PEFT's branch `main`, else
`temporary_results/`. Only the method is ours.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from benchmarks.peft_image_generation.method import CONFIG_NAME, GSOFTConfig, GSOFTModel, get_gsoft_model
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.errors import UserError, first_line

EXPERIMENTS = Path(__file__).parent / "experiments"
COMPARISON = Path("method_comparison") / "image-gen"


def experiment_names() -> list[str]:
    """All experiments, by the names that PEFT gives to results."""
    return sorted(path.parent.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob(CONFIG_NAME))


def peft_program(checkout: Path) -> ModuleType:
    """PEFT's `run.py`, with our method in the place of PEFT's.

    checkout: a folder with huggingface/peft. Raises UserError if the program is not there, or does not start here.
    """
    folder = checkout / COMPARISON
    if not (folder / "run.py").is_file():
        raise UserError(f"--peft {checkout}: has no {COMPARISON / 'run.py'}; give a checkout of huggingface/peft")
    sys.path.insert(0, str(folder.resolve()))
    try:
        program, utilities = import_module("run"), import_module("utils")
    except (ImportError, RuntimeError) as error:  # no GPU is one of the latter
        raise UserError(f"PEFT's comparison does not start: {first_line(error)}") from error
    program.PeftConfig, program.PeftModel = GSOFTConfig, GSOFTModel  # type: ignore[attr-defined]
    utilities.get_peft_model = get_gsoft_model  # type: ignore[attr-defined]
    program.print_verbose = lambda *words: print(*words, file=sys.stderr)  # type: ignore[attr-defined]
    return program


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiment", choices=experiment_names(), help="which of them: %(choices)s", metavar="EXPERIMENT"
    )
    parser.add_argument("--peft", type=expanded_path, required=True, help="checkout of huggingface/peft")
    parser.add_argument("--clean", action="store_true", help="delete the adapter afterwards, but keep the result")
    args = parser.parse_args()
    peft_program(args.peft).main(
        path_experiment=str(EXPERIMENTS / args.experiment),
        experiment_name=args.experiment,
        clean=args.clean,
        bucket_name=None,
    )
    return 0


if __name__ == "__main__":
    run(main)
