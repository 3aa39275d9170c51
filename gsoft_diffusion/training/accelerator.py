"""accelerate, as a run sets it up."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.launcher import check_launched, process_count
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.training.tracking import wanted_trackers


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's driver of devices, precision, accumulation and trackers, as the settings say.

    Prints a note for what has no effect here. Raises UserError for a device or precision that there is not, for a
    tracker that is not known, and where the launcher contradicts the settings.
    """
    check_launched(config.to_dict())
    process_count()  # refuses one that accelerate would wait for peers with
    folder = Path(config.output_dir or ".")
    trackers = wanted_trackers(config)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
            kwargs_handlers=[
                # The base is in half precision as it is and the adapter in float32; sampling runs without it too.
                AutocastKwargs(enabled=False),
                # While one process draws class images or validates, the others wait.
                InitProcessGroupKwargs(timeout=timedelta(days=1)),
                # The last layers of some families' text encoders have no say, so their parameters get no gradient.
                # Buffers are the frozen base's, and need not be sent again in every step.
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            ],
        )
    except (ValueError, RuntimeError) as error:  # a precision the device does not have, a device that there is not
        raise UserError(
            f"--mixed_precision {config.mixed_precision}, or a variable ACCELERATE_…: {first_line(error)}"
        ) from error
    found = {str(tracker) for tracker in accelerator.log_with}
    for name in trackers:
        if name not in ("all", *found):
            accelerator.print(f"note: {name} is not installed (pip install {name}), so nothing is reported to it")
    if "all" in trackers and not found:
        accelerator.print("note: no tracker is installed, so nothing is reported; tensorboard is one")
    if config.cpu_offload and accelerator.device.type == "cpu":
        accelerator.print("note: --cpu_offload has no effect: all of the model is in main memory anyway")
    if config.mixed_precision == "no" and accelerator.device.type == "cuda":
        accelerator.print(
            "note: this run computes in float32; --mixed_precision bf16 (fp16 on older GPUs) is faster and takes about "
            "half the memory"
        )
    return accelerator
