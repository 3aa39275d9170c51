"""Train one method on one task.

    python -m examples.language.train --task cola --method gsoft --output_dir outputs/cola
    python -m examples.language.train --task sentiment --model outputs/language/model --data_dir outputs/language \
        --learning_rate 2e-3 --max_steps 200 --max_length 32 --output_dir outputs/sentiment

The second needs no network but `python -m examples.language.fetch`. Into the folder go `result.json` and, of GSOFT's
methods, `adapter.safetensors` with rotations and head. The other methods are there to be compared with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from examples.language import adapter
from examples.language.tasks import TASKS, read_task
from examples.language.training import Run, train
from gsoft_diffusion.config.command_line import add_flags, expanded_path, run
from gsoft_diffusion.foundation.files import new_places


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Run)
    parser.add_argument("--output_dir", type=expanded_path, required=True, help="folder to make")
    flags = vars(parser.parse_args())
    out: Path = flags.pop("output_dir")
    if "task" not in flags:
        parser.error("give --task")
    settings = Run.from_dict(flags, "options")
    with new_places("--output_dir", out) as (unfinished,):
        parts = read_task(settings.task, settings.data_dir)
        trained = train(settings, parts)
        unfinished.mkdir()
        if trained.adapted.adapter is not None:
            adapter.save(trained, settings, unfinished / "adapter.safetensors")
        result = {"run": settings.to_dict(), "learned": trained.adapted.learned, **trained.scores}
        (unfinished / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    for path in trained.adapted.dead:
        print(f"left out: {path}, on which the output does not depend")
    scores, metric = trained.scores, TASKS[settings.task].metric
    print(f"{trained.adapted.learned:,} numbers learned beside the head; best after {scores['best_step']} steps")
    print(f"{metric}: {scores['validation']:.1f} % on the validation part, {scores['test']:.1f} % on the test part")
    print(out)
    return 0


if __name__ == "__main__":
    run(main)
