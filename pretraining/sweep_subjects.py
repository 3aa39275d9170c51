"""Which steps, rate and guidance suit a base? Every setting is tried on subjects that no picture shows.

    python -m pretraining.sweep_subjects --work <work folder> --base <pipeline folder> \\
        --subjects <work folder>/tuning --out <folder>

For each subject and rate one training, whose checkpoints are drawn with each guidance as `check_subjects` does. The
text encoder's rate is a fixed share of the rate. Measurements lie in `<out>/sweep.json`, what is in it already is not
done again; the table of means over the subjects is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.pick_checkpoint import adapters_of
from eval.subjects import read_subjects
from gsoft_diffusion.config.command_line import run
from gsoft_diffusion.scoring.encoders import load_dino
from pretraining.check_subjects import (
    draw_places,
    drawn,
    measure,
    measurements,
    read_albums,
    runs_parser,
    train_on,
    write_measurements,
)
from pretraining.train_judge import load_judge

TEXT_SHARE = 0.02  # of the rate, for the text encoder
SETTINGS = ("learning_rate", "step", "guidance_scale")
FIGURES = ("likeness", "recognised", "place", "copies")


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The mean figures of each setting over its subjects, in order of the settings."""
    settings = sorted({tuple(row[name] for name in SETTINGS) for row in rows})
    found = []
    for setting in settings:
        of_setting = [row for row in rows if tuple(row[name] for name in SETTINGS) == setting]
        figures = {name: float(np.mean([row[name] for row in of_setting])) for name in FIGURES}
        found.append(dict(zip(SETTINGS, setting, strict=True)) | figures | {"subjects": len(of_setting)})
    return found


def table(rows: Sequence[dict[str, float]]) -> str:
    """The means in Markdown."""
    lines = [
        "| rate | steps | guidance | likeness | recognised | place right | copies |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['learning_rate']:.0e} | {row['step']:.0f} | {row['guidance_scale']:g} | {row['likeness']:.2f} "
            f"| {row['recognised']:.0%} | {row['place']:.0%} | {row['copies']:.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = runs_parser(__doc__)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--steps", type=int, default=800, help="of each training")
    parser.add_argument("--checkpointing_steps", type=int, default=200, help="steps between two checkpoints")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[2, 3, 4])
    args = parser.parse_args()
    path = args.out / "sweep.json"
    content = measurements(path, args.base, {"steps": args.steps})
    rows: list[dict[str, Any]] = content["rows"]
    done = {(row["subject"], *(row[name] for name in SETTINGS)) for row in rows}
    dino, judge = load_dino(str(args.dino)), load_judge(args.work / "judge.safetensors")
    subjects = read_subjects(args.subjects)
    albums = read_albums(subjects, dino, judge)
    for subject in subjects:
        for rate in args.learning_rates:
            folder = args.out / subject.name / f"{rate:g}"
            values = {
                "learning_rate": rate,
                "text_encoder_lr": rate * TEXT_SHARE,
                "max_train_steps": args.steps,
                "checkpointing_steps": args.checkpointing_steps,
            }
            train_on(subject, args.base, values, folder)
            for step, adapter in sorted(adapters_of(folder).items()):
                for guidance in args.guidance_scales:
                    if (subject.name, rate, step, guidance) in done:
                        continue
                    images = folder / f"images-{step}-{guidance:g}"
                    draw_places(adapter, args.base, guidance, images)
                    pictures = drawn(images)["adapter"]
                    row: dict[str, Any] = {"subject": subject.name}
                    row |= dict(zip(SETTINGS, (rate, step, guidance), strict=True))
                    row |= measure(subject.name, albums, pictures, dino, judge)
                    rows.append(row)
                    write_measurements(path, content)
    print(table(means(rows)))
    return 0


if __name__ == "__main__":
    run(main)
