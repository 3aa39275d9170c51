"""From the results of a comparison to tables, plots and a page with the pictures.

    python -m eval.report results/fronts

Reads `experiment.yaml`, `results.jsonl` and, if the experiment has pictures, the subjects' sheets. Writes
`report.html`, which holds everything and opens from disk, `report.md`, and its tables and plots as CSV and SVG.
"""

from __future__ import annotations

import argparse

from eval.experiment import Experiment
from eval.report.write import write_report
from eval.results import SETTINGS
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.settings import read_yaml


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=expanded_path, help="folder that eval.benchmark wrote to")
    args = parser.parse_args()
    for path in write_report(Experiment.from_dict(read_yaml(args.out / SETTINGS)), args.out):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
