"""Faster steps that compute the same: compiled backbones, and convolutions in the layout that tensor cores read."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gq_lightning.training.module import TokenizerTraining


class Acceleration(Callback):
    """Options of a training; neither is kept in a checkpoint or a tokenizer's folder, and their names stay as they are.

    Args:
        compile: compile encoder and decoder by torch.compile. The first step takes minutes; what follows is a fused graph.
        channels_last: keep the weights of convolutions, and with them their activations, in channels-last layout. For UNets on GPUs
            in half precision.
    """

    def __init__(self, compile: bool = False, channels_last: bool = False) -> None:
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, TokenizerTraining)
        if stage != "fit":
            return
        for part in (pl_module.tokenizer.backbone.encoder, pl_module.tokenizer.backbone.decoder):
            if self.channels_last:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.compile:
                part.compile()  # in place: parameters keep their names
