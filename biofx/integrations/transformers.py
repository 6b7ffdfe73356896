"""The `Trainer` of transformers trains a transformed model."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from biofx.integrations import attach_all, detach_all


class BiofxCallback(TrainerCallback):
    """Attach the transformed models in a model to the optimizer of each `train()`; detach them at its end.

    Example:
        >>> import biofx, tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from biofx.integrations.transformers import BiofxCallback
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), "rejuvenate")
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> trainer = Trainer(bio, arguments, callbacks=[BiofxCallback()])
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach."""
        attach_all(kwargs["model"], [kwargs["optimizer"]])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        detach_all(kwargs["model"])
