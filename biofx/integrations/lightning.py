"""Lightning trains a transformed model, or a module that contains one."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel

from biofx.integrations import attach_all, detach_all
from biofx.model.synapses import Synapses
from biofx.training.wrappers import parameter_ids


class BiofxCallback(Callback):
    """Attach the transformed models in a `LightningModule` to the optimizers of each `fit`; detach them at its end.

    What rules keep (counters, gains) is part of the module's state, so checkpoints and `ckpt_path` resume bit for bit.
    If a callback averages weights, counters and gains are copied into the average: means of them are meaningless.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from biofx.integrations.lightning import BiofxCallback
        >>> trainer = Trainer(callbacks=[BiofxCallback()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come first: before a learning rate is looked for, and before averages take the place of weights."""
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach again if an optimizer got other parameters, such as those that `BackboneFinetuning` unfreezes."""
        if self._held != [*map(parameter_ids, trainer.optimizers)]:
            self._attach(trainer, pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        attach_all(pl_module, trainer.optimizers)
        self._held = [*map(parameter_ids, trainer.optimizers)]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        detach_all(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy counters and gains into averages, which take the place of weights now."""
        _keep(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy counters and gains into averages once more: they take the place of weights for good."""
        _keep(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy counters and gains into averages, which the checkpoint holds."""
        _keep(trainer, pl_module)


@torch.no_grad()
def _keep(trainer: Trainer, model: nn.Module) -> None:
    averages = [x for each in trainer.callbacks for x in vars(each).values() if isinstance(x, AveragedModel)]
    for average in averages:
        for own, other in zip(model.modules(), average.module.modules(), strict=True):
            if isinstance(own, Synapses) and isinstance(other, Synapses):
                for key in own.users:
                    getattr(other, key).copy_(getattr(own, key))
