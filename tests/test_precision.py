"""What makes a step cheaper leaves the loss where it was: twenty steps on photographs beside the same in float32, plain."""

from collections.abc import Iterator
from functools import cache, partialmethod
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from small import small_training
from torch import Tensor, nn

from gq_lightning.callbacks import TDC, Acceleration, ExactResume
from gq_lightning.data import Photographs
from gq_lightning.training.module import TokenizerTraining

STEPS = 20


class Curve(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.types: set[torch.dtype] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"])
        self.types |= {value.dtype for value in vars(outputs["posterior"]).values()} | {outputs["loss"].dtype}
        self.types |= {value.dtype for value in pl_module.tokenizer.quantizer.tdc.buffers()}


@cache
def data() -> Photographs:
    return Photographs(image_size=32, batch_size=8, workers=0)


def train(
    backbone: str, acceleration: Acceleration | None = None, gradient_checkpointing: bool = False, **settings: Any
) -> tuple[Tensor, Curve]:
    training = small_training(backbone, learning_rate=2e-3)
    for module in training.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = gradient_checkpointing
    torch.manual_seed(1)
    curve = Curve()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), TDC(), curve, *([acceleration] if acceleration else [])],
        **settings,
    )
    trainer.fit(training, data())
    return torch.stack(curve.losses), curve


@cache
def plain(backbone: str) -> Tensor:
    losses, _ = train(backbone)
    assert losses[-5:].mean() < 0.8 * losses[:5].mean(), "it learns, so that there is something to be wrong"
    return losses


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_bfloat16(backbone: str) -> None:
    """Within 3 %, of which most is the rounding of single steps; divergences and multipliers are float32 throughout."""
    losses, curve = train(backbone, precision="bf16-mixed")
    assert curve.types == {torch.float32}
    torch.testing.assert_close(losses, plain(backbone), rtol=0.03, atol=0)
    assert not torch.equal(losses, plain(backbone))


@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_checkpointing(backbone: str) -> None:
    losses, _ = train(backbone, gradient_checkpointing=True)
    torch.testing.assert_close(losses, plain(backbone), rtol=1e-5, atol=0)


@pytest.mark.parametrize("chosen", [True, None])
def test_channels_last(chosen: bool | None) -> None:
    """Where it is chosen, and by default on a CPU; the noise of the posterior is the same."""
    layouts = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    with patch.object(
        TokenizerTraining, "on_train_start", lambda self: self.tokenizer.backbone.encoder.levels[0].register_forward_hook(watch)
    ):
        losses, _ = train("unet", Acceleration(channels_last=chosen))
    assert layouts and all(layouts), "activations follow the weights"
    torch.testing.assert_close(losses, plain("unet"), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the tracer looks at everything
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backbone", ["vit", pytest.param("unet", marks=pytest.mark.slow)])
def test_compiled(backbone: str, backend: str) -> None:
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend)):
        losses, _ = train(backbone, Acceleration(compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(losses, plain(backbone), rtol=1e-3, atol=0)


def test_compiled_names_stay() -> None:
    training = small_training("vit")
    before = list(training.state_dict())
    Acceleration(compile=True, channels_last=False).setup(None, training, "fit")  # type: ignore[arg-type]
    assert list(training.state_dict()) == before
