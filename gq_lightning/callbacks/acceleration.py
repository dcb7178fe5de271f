"""Faster steps that compute the same: compiled networks, and convolutions in the layout that tensor cores read."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Acceleration(Callback):
    """Options of a training; neither is kept in a checkpoint or a tokenizer's folder, and their names stay as they are.

    Args:
        compile: compile encoder and decoder, or a prior's transformers, by torch.compile. The first step takes minutes; what follows is a
            fused graph.
        channels_last: keep the weights of convolutions, and with them their activations, in channels-last layout. For UNets on GPUs
            in half precision.
    """

    def __init__(self, compile: bool = False, channels_last: bool = False) -> None:
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for part in pl_module.parts_to_compile():  # type: ignore[operator]
            if self.channels_last:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.compile:
                part.compile()  # in place: parameters keep their names
