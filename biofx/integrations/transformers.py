"""The `Trainer` of transformers trains a transformed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from biofx.base.errors import LifecycleError
from biofx.integrations import attach_all, detach_all

FILE = "biofx.pt"  # in the folder of a checkpoint


class BiofxCallback(TrainerCallback):
    """Attach the transformed models in a model to the optimizer of each `train()`; detach them at its end.

    Checkpoints of a model of transformers hold what `save_pretrained` writes, which is the folded model. So the
    callback writes what is trained next to it, and `train(resume_from_checkpoint=…)` continues bit for bit from a
    folder that is where the trainer wrote it.

    Raises:
        ArgumentError: at `train`, if no module of the model was made by `biofx.transform`.
        LifecycleError: if there is no such file in the checkpoint from which training resumes.

    Example:
        >>> from biofx.integrations.transformers import BiofxCallback
        >>> callbacks = [BiofxCallback()]  # an argument of `transformers.Trainer`
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load what was saved, if training resumes, and attach."""
        if state.global_step and _is_folded_in_checkpoints(kwargs["model"]):
            _load(kwargs["model"], _folder(args, state))
        attach_all(kwargs["model"], [kwargs["optimizer"]])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the transformed model next to the folded one."""
        if state.is_world_process_zero and _is_folded_in_checkpoints(kwargs["model"]):
            torch.save(kwargs["model"].state_dict(), _folder(args, state) / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach, and load what belongs to the best weights, if the trainer loaded those."""
        detach_all(kwargs["model"])
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and _is_folded_in_checkpoints(kwargs["model"]):
            _load(kwargs["model"], Path(best))


def _is_folded_in_checkpoints(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained")


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _load(model: nn.Module, folder: Path) -> None:
    path = folder / FILE
    if not path.exists():
        raise LifecycleError(
            f"{folder} has no {FILE}, so what rules kept is lost; resume from a checkpoint in output_dir that was "
            "written with this callback"
        )
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
