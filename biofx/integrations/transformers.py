"""The `Trainer` of transformers trains a transformed model."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from biofx.base.errors import LifecycleError
from biofx.integrations import attach_all, detach_all

FILE = "biofx.pt"  # in the folder of a checkpoint


class BiofxCallback(TrainerCallback, ExportableState):
    """Attach the transformed models in a model to the optimizer of each `train()`; detach them at its end.

    Checkpoints of a model of transformers hold what `save_pretrained` writes, which is the folded model. So the
    callback writes what is trained next to it, and `train(resume_from_checkpoint=…)` continues bit for bit. The trainer
    does not tell callbacks the folder: name one that was moved in `TrainingArguments(resume_from_checkpoint=…)` too.

    Raises:
        ArgumentError: at `train`, if no module of the model was made by `biofx.transform`.
        LifecycleError: if no such file is found for the checkpoint from which training resumes.

    Example:
        >>> from biofx.integrations.transformers import BiofxCallback
        >>> callbacks = [BiofxCallback()]  # an argument of `transformers.Trainer`
    """

    run, output_dir = "", ""

    def state(self) -> dict[str, Any]:
        """What the trainer's own file in a checkpoint says of it: the run and the place that wrote it."""
        return {"args": {}, "attributes": {"run": self.run, "output_dir": self.output_dir}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load what was saved, if training resumes, and attach."""
        if state.global_step and _is_folded_in_checkpoints(kwargs["model"]):
            _load(kwargs["model"], self._resumed_from(args, state))
        self.run, self.output_dir = uuid.uuid4().hex, str(Path(str(args.output_dir)).absolute())
        _notes(state).setdefault(type(self).__name__, self.state())  # older checkpoints have none
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

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder of the checkpoint that the trainer has just loaded."""
        noted = self._noted(state)
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folders = [Path(str(args.output_dir)) / name, Path(noted.get("output_dir", "")) / name]
        folders += [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
        for folder in folders:
            file = folder / TRAINER_STATE_NAME
            is_checkpoint = file.exists() and (folder / FILE).exists()
            if is_checkpoint and self._noted(TrainerState.load_from_json(str(file))) == noted:  # not of another run
                return folder
        looked = ", ".join(dict.fromkeys(map(str, folders)))
        raise LifecycleError(
            f"the {FILE} of the checkpoint is not in {looked}, so what rules kept is lost; if the checkpoint is "
            "elsewhere, name its folder in TrainingArguments(resume_from_checkpoint=…) as well; it has to be written "
            "with this callback"
        )

    def _noted(self, state: TrainerState) -> dict[str, str]:
        """What the file of a trainer says of the run that wrote it."""
        noted = _notes(state).get(type(self).__name__, {})
        return dict((noted[-1] if isinstance(noted, list) else noted).get("attributes", {}))


def _notes(state: TrainerState) -> dict[str, Any]:
    notes: Any = state.stateful_callbacks  # whose annotation is that of the argument
    return notes  # type: ignore[no-any-return]


def _is_folded_in_checkpoints(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained")


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _load(model: nn.Module, folder: Path) -> None:
    path = folder / FILE
    if not path.exists():
        raise LifecycleError(
            f"{folder} has no {FILE}, so what rules kept is lost; write checkpoints with this callback"
        )
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
