"""The adversarial loss by itself, and the training across its start."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from small import CONFIGS, run_ranks, small_training
from torch.utils.data import DataLoader

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.cli.main import main
from gq_lightning.losses.adversary import Adversary
from gq_lightning.losses.discriminator import ActNorm, PatchDiscriminator
from gq_lightning.quantizers import FiniteScalarQuantizer
from gq_lightning.training.module import TokenizerTraining


def adversary(**arguments: Any) -> Adversary:
    torch.manual_seed(1)
    return Adversary(PatchDiscriminator(8, 2), **arguments)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_when_it_works() -> None:
    plan = adversary(start=5, warmup=3)
    assert [plan.learns(step) for step in (4, 5, 8)] == [False, True, True]
    assert [plan.judges(step) for step in (4, 7, 8)] == [False, False, True]


def test_hinge_loss() -> None:
    loss = adversary()
    real, fake = images(3), images(3, seed=1)
    value, parts = loss.discriminator_loss(real, fake)
    logits = loss.discriminator(real), loss.discriminator(fake)
    expected = ((1 - logits[0]).clamp(min=0).mean() + (1 + logits[1]).clamp(min=0).mean()) / 2
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(parts["logits_real"], logits[0].mean().detach())
    torch.testing.assert_close(parts["logits_fake"], logits[1].mean().detach())


@pytest.mark.parametrize("bound", [1e4, 0.5])
def test_adaptive_weight(bound: float) -> None:
    """Both losses pull equally at the last layer, up to the bound."""
    loss = adversary(weight=0.75, max_adaptive_weight=bound)
    layer = torch.nn.Conv2d(3, 3, 1)
    reconstructions = layer(images(2))
    reconstruction = (reconstructions - images(2)).square().sum()
    term, parts = loss.generator_loss(images(2), reconstructions, reconstruction, layer.weight)
    logits = loss.discriminator(layer(images(2)))
    gradients = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0].norm() for value in (reconstruction, -logits.mean())]
    expected = min(float(gradients[0] / (gradients[1] + 1e-4)), bound)
    assert parts["adaptive_weight"].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(term, -0.75 * expected * logits.mean(), rtol=1e-4, atol=1e-6)
    term.backward()
    assert layer.weight.grad is not None
    assert all(parameter.grad is None for parameter in loss.discriminator.parameters()), "the generator's step leaves the judge alone"
    assert all(parameter.requires_grad for parameter in loss.discriminator.parameters())


def published_actnorm(network: PatchDiscriminator, real: torch.Tensor) -> list[torch.Tensor]:
    """Location and scale of each ActNorm after a first pass of these images, with the kernels of the network."""
    layers = [layer for layer in network.network if isinstance(layer, torch.nn.Conv2d)]
    x = F.leaky_relu(F.conv2d(real, layers[0].weight, layers[0].bias, 2, 1), 0.2)
    values = []
    for layer in layers[1:-1]:
        x = F.conv2d(x, layer.weight, layer.bias, layer.stride, 1)
        channels = x.transpose(0, 1).flatten(1)
        location = -channels.mean(dim=1).view(1, -1, 1, 1)
        scale = (1 / (channels.std(dim=1, unbiased=True) + 1e-6)).view(1, -1, 1, 1)
        values += [location, scale]
        x = F.leaky_relu(scale * (x + location), 0.2)
    return [value.detach() for value in values]


def actnorm(network: PatchDiscriminator) -> list[torch.Tensor]:
    return [getattr(layer, name).detach() for layer in network.network if isinstance(layer, ActNorm) for name in ("location", "scale")]


@pytest.mark.parametrize("first", ["discriminator", "generator"])
def test_real_images_alone_set_actnorm(first: str) -> None:
    loss, layer = adversary(), torch.nn.Conv2d(3, 3, 1)
    real, reconstructions = images(2), layer(images(2, seed=1)) * 3 + 1
    expected = published_actnorm(loss.discriminator, real)
    if first == "discriminator":
        loss.discriminator_loss(real, reconstructions)
    else:
        loss.generator_loss(real, reconstructions, reconstructions.square().sum(), layer.weight)
    assert len(actnorm(loss.discriminator)) == len(expected) == 4
    torch.testing.assert_close(actnorm(loss.discriminator), expected)
    loss.discriminator_loss(images(2, seed=3), reconstructions)
    torch.testing.assert_close(actnorm(loss.discriminator), expected)


def test_training_sets_actnorm_by_the_real_images_of_its_first_batch(tmp_path: Path) -> None:
    """Here the generator is the first to see the discriminator, which hardly learns."""
    training = small_training("vit", adversary=adversary(start=0, warmup=0, learning_rate=1e-12))
    expected = published_actnorm(training.adversary.discriminator, images(12)[:2])  # type: ignore[union-attr]
    fit(tmp_path, 3, training)
    torch.testing.assert_close(actnorm(training.adversary.discriminator), expected)  # type: ignore[union-attr]


def test_both_networks_have_the_published_betas() -> None:
    training = small_training("vit", adversary=adversary())
    training.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, max_steps=1, enable_progress_bar=False)
    optimizers = [entry["optimizer"] for entry in training.configure_optimizers()]
    assert [group["betas"] for optimizer in optimizers for group in optimizer.param_groups] == [(0.9, 0.999)] * sum(
        len(optimizer.param_groups) for optimizer in optimizers
    )
    assert len(optimizers) == 2


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="start -1"):
        adversary(start=-1)
    with pytest.raises(UserError, match="weight 0"):
        adversary(weight=0.0)
    with pytest.raises(UserError, match="accumulate: 0"):
        small_training("vit", accumulate=0)


class Watch(pl.Callback):
    """What happened at each batch."""

    def __init__(self) -> None:
        self.batches, self.judge = 0, list[torch.Tensor]()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.batches += 1
        self.judge.append(next(pl_module.adversary.parameters()).detach().clone())  # type: ignore[union-attr, operator]


def fit(
    folder: Path,
    steps: int,
    training: TokenizerTraining,
    *callbacks: pl.Callback,
    batch_size: int = 2,
    resume: Path | None = None,
    **settings: Any,
) -> pl.Trainer:
    """A training on twelve images, with a checkpoint at every step."""
    keep = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=[keep, *callbacks], log_every_n_steps=1, **quiet, **settings
    )
    loader = DataLoader(images(12), batch_size=batch_size)  # type: ignore[arg-type]
    trainer.fit(training, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_a_run_across_the_start(backbone: str, precision: Any, tmp_path: Path) -> None:
    training = small_training(backbone, adversary=adversary(start=3, warmup=2), learning_rate=1e-3, gradient_clip=100.0)
    watch = Watch()
    trainer = fit(tmp_path, 8, training, watch, precision=precision)
    assert trainer.global_step == watch.batches == 8, "a step is a batch, however many optimizers"
    before = next(adversary().parameters())
    changed = [not torch.equal(after, previous) for previous, after in zip([before, *watch.judge], watch.judge, strict=False)]
    assert changed == [False] * 3 + [True] * 5, "it rests until its start and learns from then on"
    assert {"loss/adaptive_weight", "loss/logits_real", "loss/logits_fake"} <= trainer.callback_metrics.keys()
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert any(name.startswith("adversary.discriminator.") for name in checkpoint["state_dict"])
    assert [state["last_epoch"] for state in checkpoint["lr_schedulers"]] == [8, 5]
    training.tokenizer.save_pretrained(tmp_path / "tokenizer")
    exported = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert not [name for name in exported.state_dict() if "adversary" in name]
    assert torch.equal(exported.encode(images(2)), training.tokenizer.eval().encode(images(2)))


def test_nothing_is_computed_before_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = small_training("vit", adversary=adversary(start=4))
    monkeypatch.setattr(PatchDiscriminator, "forward", lambda *_: pytest.fail("the discriminator worked before its start"))
    assert fit(tmp_path, 4, training).global_step == 4


def test_resuming_in_the_middle(tmp_path: Path) -> None:
    """Twelve steps at once, or six and six more with everything restored: the same generator and the same discriminator."""

    def training() -> TokenizerTraining:
        torch.manual_seed(0)
        quantizer = FiniteScalarQuantizer(16)  # it draws no noise
        return small_training("vit", quantizer, adversary=adversary(start=1, warmup=1), learning_rate=1e-3, warmup_steps=8)

    whole = training()
    fit(tmp_path / "whole", 12, whole)
    # an epoch has six batches: this one is cut off at its end, while the learning rate still rises
    fit(tmp_path / "parts", 12, first := training(), limit_train_batches=6, max_epochs=1)
    assert not torch.equal(first.tokenizer.backbone.last_layer, whole.tokenizer.backbone.last_layer)
    resumed = training()
    assert fit(tmp_path / "parts", 12, resumed, resume=tmp_path / "parts/last.ckpt").global_step == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_accumulated_batches_make_the_step_of_the_whole(tmp_path: Path) -> None:
    def trained(batch_size: int, accumulate: int) -> TokenizerTraining:
        torch.manual_seed(0)
        training = small_training("vit", FiniteScalarQuantizer(16), accumulate=accumulate, learning_rate=1e-3)
        trainer = fit(tmp_path / str(accumulate), 3, training, batch_size=batch_size)
        assert trainer.global_step == 3
        return training

    whole, parts = trained(4, 1), trained(2, 2)
    torch.testing.assert_close(whole.tokenizer.backbone.last_layer, parts.tokenizer.backbone.last_layer, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "instead"), [("gradient_clip_val=2", "model.gradient_clip"), ("accumulate_grad_batches=4", "model.accumulate")]
)
def test_the_trainers_own_settings_are_refused(key: str, instead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIGS / "demo.yaml"), f"--trainer.{key}", f"--runs={tmp_path}"]) == 2
    assert f"use {instead}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Each optimizer's gradients are averaged over the ranks: generators and discriminators stay equal; none is reported unused."""
    configs = ("base.yaml", "backbone/vit_small.yaml", "data/photographs.yaml", "scale/smoke.yaml", "machine/cpu.yaml")
    arguments = [
        *(text for file in configs for text in ("--config", str(CONFIGS / file))),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"),
        *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
        *("--model.adversary.discriminator.width=8", "--model.adversary.discriminator.layers=2"),
        *("--model.adversary.start=2", "--model.adversary.warmup=1", "--export.rfid=false", "--trainer.enable_progress_bar=false"),
        *("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=6", "--trainer.val_check_interval=6"),
        *(f"--runs={tmp_path}", "--name=two", "--threads=1"),
    ]
    first, second = run_ranks(tmp_path, arguments, "two")
    assert {"adversary.discriminator.network.0.weight", "tokenizer.backbone.encoder.linear_in.weight"} <= first.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert json.loads((tmp_path / "two/metrics.json").read_text())["steps"] == 6
