"""One training with transformers' Trainer: the validation part chooses the best step, the test part is reported."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from examples.language.methods import METHODS, Adapted
from examples.language.tasks import TASKS, Task, Texts, score
from gsoft_diffusion.config.settings import BELOW_2_TO_32, NOT_NEGATIVE, POSITIVE, Settings, check_rules
from gsoft_diffusion.foundation.errors import UserError, first_line, user_errors
from gsoft_diffusion.foundation.hub_access import why_unreachable

ROBERTA = "FacebookAI/roberta-base"
WARM_UP = 0.1  # of the steps; the rate falls to 0 in a straight line afterwards


def training_device() -> torch.device:
    """Where trainings compute: on a GPU of NVIDIA's or AMD's if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Run(Settings):
    """One training.

    task: what is learned: mnli, sst2, cola, qqp, qnli, rte, mrpc or stsb of GLUE from the hub; sentiment, rating, topic
      or acceptability from --data_dir.
    method: gsoft, double_gsoft, gsoft_dense, lora, oft, boft or full.
    model: encoder, a folder or a name on the hub.
    data_dir: folder that python -m examples.language.fetch has made.
    learning_rate: at its highest.
    max_steps: optimizer steps.
    evaluations: how often the validation part is answered, at distances that are equal but for one step, the last time
      at the end; the best of these steps is kept.
    batch_size: texts in a batch.
    max_length: tokens of a text; what is longer is cut.
    seed: of the head's first values, of dropout, and of the order of the texts.
    bf16: compute in bfloat16 where that is safe (autocast); what is learned stays float32.
    """

    task: str
    method: str = "gsoft"
    model: str = ROBERTA
    data_dir: str | None = None
    learning_rate: Annotated[float, POSITIVE] = 8e-4
    max_steps: Annotated[int, POSITIVE] = 6000
    evaluations: Annotated[int, POSITIVE] = 20
    batch_size: Annotated[int, POSITIVE] = 32
    max_length: Annotated[int, POSITIVE] = 128
    seed: Annotated[int, NOT_NEGATIVE, BELOW_2_TO_32] = 0  # NumPy takes no larger one
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)}: choose from {', '.join(known)}")
        check_rules(self)
        if self.evaluations > self.max_steps:
            raise UserError(f"--evaluations {self.evaluations}: must be --max_steps ({self.max_steps}) or less")


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    adapted: the model with what was learned, as it was at the best step. tokenizer: the model's. scores: JSON values:
    the validation part's score at each evaluation and at best, the test part's score and its answers.
    """

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    scores: dict[str, Any]


class DivergedError(UserError):
    """A training whose answers were no numbers whenever it was evaluated."""


def train(run: Run, parts: Mapping[str, Texts], *, progress: bool = True) -> Trained:
    """Train one method on one task.

    run: the settings. parts: the task's, as `read_task` gives them. progress: show a bar. Raises UserError if the model
    cannot be loaded or adapted, and its kind `DivergedError`.
    """
    task = TASKS[run.task]
    set_seed(run.seed)
    model, tokenizer = load_model(run.model, task)
    with user_errors():
        adapted = Adapted(model, run.method)
    data: dict[str, Any] = {name: encode(texts, task, tokenizer, run.max_length) for name, texts in parts.items()}
    best = Best()
    with tempfile.TemporaryDirectory() as folder:  # where it writes nothing
        trainer = Trainer(
            model=adapted,
            args=_arguments(run, folder, progress),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda prediction: {"score": task_score(task, prediction)},
            callbacks=[Evaluations(run.evaluations), best],
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)  # which prints every score
        trainer.train()
        if not best.step:
            raise DivergedError(f"--learning_rate {run.learning_rate:g}: the training diverged; give a lower one")
        best.restore(adapted)
        trainer.args.train_sampling_strategy = "sequential"  # the test part's answers in its order
        prediction: Any = trainer.predict(data["test"])
    scores = {
        "curve": best.curve,
        "best_step": best.step,
        "validation": best.score,
        "test": prediction.metrics["test_score"],
        "answers": [round(float(answer), 4) for answer in answers(task, prediction.predictions)],
        "truth": [round(float(label), 4) for label in prediction.label_ids],
    }
    return Trained(adapted, tokenizer, scores)


def load_model(name: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder with a new head for a task, and its tokenizer.

    name: a folder, or a name on the hub. task: decides the head, and the names of its classes. PyTorch's random numbers
    decide its values, also where the folder has a head. Raises UserError if there is no such model, or it is damaged.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if task.labels:
        head = {
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: number for number, label in enumerate(task.labels)},
        }
    why = None if Path(name).is_dir() else why_unreachable()
    try:
        with _without_loading_report():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **head
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"--model {name}: cannot be loaded ({why or first_line(error)}); without a network give the folder model/ "
            "that python -m examples.language.fetch makes"
        ) from error
    encoder = f"{model.base_model_prefix}."
    if unfit := sorted(key for key, *_ in found["mismatched_keys"] if key.startswith(encoder)):
        raise UserError(f"--model {name}: {unfit[0]} has another shape than its config.json says")
    # Not where a part of it is new anyway: the rest may be pretrained with the encoder, as in ModernBERT.
    if not any(key in found["missing_keys"] for key in model.state_dict() if not key.startswith(encoder)):
        _renew_head(model)
    return model, tokenizer


def _renew_head(model: PreTrainedModel) -> None:
    """Give a model the head of a new one: all but its encoder."""
    new = AutoModelForSequenceClassification.from_config(model.config)
    for name, child in new.named_children():
        if name != model.base_model_prefix:
            setattr(model, name, child.train(model.training))


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Of a new head transformers reports at length that the file does not have it."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def encode(texts: Texts, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Tokens and label of every text, the shortest first: so that batches need little padding.

    texts: a task's part. task: decides the labels' type. tokenizer: the model's. max_length: what is longer is cut.
    """
    encoded = tokenizer(*map(list, zip(*texts.texts, strict=True)), truncation=True, max_length=max_length)
    rows = [
        {name: encoded[name][place] for name in encoded} | {"labels": int(label) if task.labels else float(label)}
        for place, label in enumerate(texts.labels)
    ]
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def answers(task: Task, logits: NDArray[Any]) -> NDArray[Any]:
    """The classes by number, or the ratings, `(N,)`, that the logits `(N, C)` mean."""
    return logits.argmax(-1) if task.labels else logits.reshape(-1)


def task_score(task: Task, prediction: Any) -> float:
    """The score, in percent, of logits `(N, C)` against labels `(N,)`; NaN if a logit is no number.

    task: decides which score. prediction: transformers' `EvalPrediction` or `PredictionOutput`.
    """
    if not np.isfinite(prediction.predictions).all():
        return float("nan")
    return score(task.metric, answers(task, prediction.predictions), prediction.label_ids)


class Evaluations(TrainerCallback):
    """Has the validation part answered a number of times, evenly spread over the steps, the last time at the end."""

    def __init__(self, times: int) -> None:
        """times: at most the number of steps."""
        self.times = times

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        after, before = (step * self.times // state.max_steps for step in (state.global_step, state.global_step - 1))
        control.should_evaluate = after > before


class Best(TrainerCallback):
    """Keeps what is learned as it was at the step with the best score, the earliest of equal ones."""

    def __init__(self) -> None:
        self.step, self.score = 0, float("-inf")
        self.curve: list[tuple[int, float]] = []
        self._values: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        score = given["metrics"]["eval_score"]
        self.curve.append((state.global_step, score))
        if score > self.score:
            self.step, self.score = state.global_step, score
            self._values = {name: tensor.detach().clone() for name, tensor in _learned(given["model"]).items()}

    @torch.no_grad()
    def restore(self, model: torch.nn.Module) -> None:
        """Put the best values back into the model."""
        for name, parameter in _learned(model).items():
            parameter.copy_(self._values[name])


def _learned(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class OneDevice(TrainingArguments):
    """For one GPU where there are several: the Trainer would copy the model to all, and multiply the batch."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def _arguments(run: Run, folder: str, progress: bool) -> TrainingArguments:
    return OneDevice(
        output_dir=folder,
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=2 * run.batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARM_UP,
        weight_decay=0.0,
        bf16=run.bf16,
        use_cpu=training_device().type == "cpu",
        seed=run.seed,
        eval_strategy="no",  # see `Evaluations`
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not progress,
        label_names=["labels"],
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=training_device().type == "cuda",
    )
