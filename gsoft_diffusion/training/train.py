"""Training an adapter from settings."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from torch.distributed import DistError

from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.adapter import recorded_settings
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.memory import keep_freed_memory, running_out_explained
from gsoft_diffusion.models.loading import DTYPES, load_model
from gsoft_diffusion.publish.hub import HubRepository
from gsoft_diffusion.training import checkpoints
from gsoft_diffusion.training.accelerator import make_accelerator
from gsoft_diffusion.training.best import Best, failed_validations, no_longer_improves
from gsoft_diffusion.training.preparation import with_model_defaults
from gsoft_diffusion.training.run import Run, TrainingResult
from gsoft_diffusion.training.signals import no_drawing_yet, quiet_writers, readers_may_leave
from gsoft_diffusion.training.subjects import instance_photos
from gsoft_diffusion.training.trainable import MakeAdapter


@readers_may_leave()
@running_out_explained(
    "use a smaller --train_batch_size, --sample_batch_size (for pictures) or --resolution, --gradient_checkpointing or "
    "--cpu_offload; --num_validation_images 0 draws none"
)
def train(config: TrainingConfig, make_adapter: MakeAdapter = inject) -> TrainingResult:
    """Train an adapter on the photos and write it to the output folder, with its settings and validation pictures.

    config: the settings; what they leave open is filled in, from each other and by the model.
    make_adapter: puts what is trained into the denoiser and the text encoders; another than `inject` trains another
    method, in everything else the same way.

    SIGINT and SIGTERM end the run after the current step, with adapter and checkpoint saved. Raises UserError for
    anything that the user can put right, a loss that is not finite included.
    """
    config, token = replace(config.resolved(), hub_token=None), config.hub_token  # so that it cannot get anywhere
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    folder = checkpoints.output_folder(config) if accelerator.is_main_process else nullcontext()
    with folder, quiet_writers(), no_drawing_yet():
        checkpoint = checkpoints.checkpoint_to_resume(config, accelerator.print)
        instance = instance_photos(config, accelerator.print)
        repository = None
        if config.push_to_hub and accelerator.is_main_process:
            name = config.hub_model_id or Path(config.output_dir or "").resolve().name
            repository = HubRepository(name, token)
        model = load_model(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            base_config=config.base_config,
            dtype=DTYPES[config.mixed_precision],
            device=accelerator.device,
            cpu_offload=config.cpu_offload,
            offload_layers=config.offload_layers,
            quantize_base=config.quantize_base,
            fused_attention=config.adapter.fused_attention,
        )
        config = with_model_defaults(config, model)
        for note in config.notes():
            accelerator.print(f"note: {note}")
        state = checkpoints.read_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            before, now = TrainingConfig.from_dict(recorded_settings(state["settings"])), checkpoints.recorded(config)
            settings = (checkpoints.recorded(before).to_dict(), now.to_dict())
            checkpoints.check_unchanged(config, checkpoint, *settings, accelerator.print)
            best = state.get("best")
            over = no_longer_improves(config, best and Best.from_dict(best), failed_validations(state, config))
            checkpoints.check_goes_further(config, state["step"], over)
        try:
            run = Run(config, accelerator, model, instance, make_adapter)
            if checkpoint and state:
                run.resume(checkpoint, state)
            result = run.execute()
            if repository and not result.interrupted:
                accelerator.print(f"published: {repository.publish(run.outputs.folder, checkpoints.ADAPTER)}")
            return result
        except RuntimeError as error:
            if accelerator.num_processes > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
                raise UserError(
                    f"another of this run's {accelerator.num_processes} processes has ended, see its message; "
                    f"checkpoints are intact, go on by --resume_from_checkpoint latest ({first_line(error)})"
                ) from error
            raise
        finally:
            with suppress(Exception):  # of a tracker's last lines
                accelerator.end_training()
