"""TokenizerTraining: an ImageTokenizer, its losses and its optimizers, with one training loop and one evaluation for all methods.

Training decodes the quantizer's relaxation. Validation, test and prediction use tokens only.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from gq_lightning.backbones.base import Backbone
from gq_lightning.errors import UserError
from gq_lightning.lightning_internals import is_fitting, log_by_step, log_complete_steps
from gq_lightning.losses.adversary import Adversary
from gq_lightning.losses.reconstruction import ReconstructionLoss
from gq_lightning.metrics import ReconstructionMetrics, numbers
from gq_lightning.metrics.codebook import collapse
from gq_lightning.quantizers.base import Quantized, Quantizer
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.training.optimization import (
    Schedule,
    adamw,
    as_asked_for,
    check_adamw,
    planned_steps,
    take_step,
    weights_to_go_on_with,
)

Trained = Literal["all", "decoder"]


def is_logging_step(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the loggers write the step just completed. Logging a dozen values takes as long as a small model's optimizer step."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(pl_module.step_complete) and every > 0 and trainer.global_step % every == 0


def last_step(trainer: Trainer) -> int:
    """The loggers' number of the last optimizer step; like Lightning, they count from 0."""
    return max(trainer.global_step - 1, 0)


class TokenizerTraining(LightningModule):
    """Trains an ImageTokenizer.

    Args:
        backbone: encoder and decoder.
        quantizer: features to tokens and back.
        loss: reconstruction loss; None if the tokenizer is not trained.
        learning_rate: of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices and kernels. With 0 it is Adam.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: `constant`, or `cosine` down to 1 % of the learning rate at the last step.
        gradient_clip: largest norm of the gradients; None does not clip.
        accumulate: batches per optimizer step; the remaining batches at the end of an epoch also make a step. `trainer.max_steps`,
            checkpoints, schedules and the loggers count steps, each of which updates the generator and, with an adversary, the
            discriminator. `trainer.val_check_interval` counts batches.
        adversary: discriminator and adversarial loss; None trains without them.
        train: `all`, or the `decoder` alone, which keeps the encoder, the quantizer and so all tokens. The decoder then sees the latents of
            tokens, as a receiver does, instead of the relaxation.

    A resumed training uses the current settings for learning rate, betas, weight decay, the length and shape of the schedule,
    accumulation, adversary and averaged weights. It takes weights, moments, multipliers and progress from the checkpoint.

    Attributes:
        step_complete: whether the last batch completed a step.
    """

    step_complete = False

    def __init__(
        self,
        backbone: Backbone,
        quantizer: Quantizer,
        loss: ReconstructionLoss | None = None,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        gradient_clip: float | None = None,
        accumulate: int = 1,
        adversary: Adversary | None = None,
        train: Trained = "all",
    ) -> None:
        super().__init__()
        if accumulate < 1 or (gradient_clip is not None and gradient_clip <= 0):
            raise UserError(f"model.accumulate: {accumulate} must be at least 1, model.gradient_clip: {gradient_clip} positive")
        check_adamw("model", learning_rate, betas, weight_decay, warmup_steps)
        if adversary is not None:
            check_adamw("model.adversary", adversary.learning_rate or 0.0, adversary.betas)
        # two optimizers with separate backward passes need Lightning's manual optimization
        self.automatic_optimization = False
        if train not in get_args(Trained):
            raise UserError(f"model.train: {train!r} is neither 'all' nor 'decoder'")
        self.tokenizer = ImageTokenizer(backbone, quantizer)
        self.decoder_alone = train == "decoder"
        if self.decoder_alone:
            self.tokenizer.eval().requires_grad_(False)
            backbone.decoder.train().requires_grad_(True)
        self.loss, self.adversary = loss, adversary
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.metrics: ReconstructionMetrics | None = None
        # the module's DistributedDataParallel must not wait for gradients of the discriminator, which has its own (see Adversary)
        self._ddp_params_and_buffers_to_ignore = [name for name in self.state_dict() if name.startswith("adversary.")]

    def parts_to_compile(self) -> list[nn.Module]:
        """The modules that take most of the time of a step."""
        return [self.tokenizer.backbone.encoder, self.tokenizer.backbone.decoder]

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.loss is None:
            raise UserError("model.loss: null: fit needs a loss, so configure one")
        if not any(parameter.requires_grad for parameter in self.tokenizer.parameters()):
            raise UserError(
                "the tokenizer is frozen, as from_pretrained returns it: call tokenizer.train().requires_grad_(True), "
                "then TokenizerTraining(tokenizer.backbone, tokenizer.quantizer, loss), or give it train='decoder' to keep the tokens"
            )
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision: 16-mixed needs scaled gradients, which two optimizers cannot share: use bf16-mixed")

    def on_train_start(self) -> None:
        if self.decoder_alone and not self.tokenizer.has_tokens_of_another:
            self.tokenizer.keep_tokens()
        for optimizer, scheduler in self._learners():
            as_asked_for(optimizer, scheduler)
        log_complete_steps(self.trainer, lambda: self.step_complete)
        if self.adversary is not None:
            self.adversary.distribute(self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        assert self.loss is not None
        adversary, step = self.adversary, self.trainer.global_step
        quantized = self._quantized(batch)
        reconstructions = self.tokenizer.backbone.decode(quantized.latents.movedim(-1, 1))
        reconstruction, parts = self.loss(reconstructions, batch)
        total = reconstruction + quantized.penalty
        if adversary is not None and adversary.judges(step):
            term, more = adversary.generator_loss(batch, reconstructions, reconstruction, self.tokenizer.backbone.last_layer)
            total, parts = total + term, parts | more
        self.step_complete = complete = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        generator, *discriminator = self._learners()
        # the gradients of an incomplete step need no reduction
        unsynchronised = nullcontext if complete else getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with unsynchronised():
            self.manual_backward(total / self.accumulate)
        norms = [take_step(*generator, self.gradient_clip, counted=True)] if complete else []
        if adversary is not None and adversary.learns(step):
            judgement, more = adversary.discriminator_loss(batch, reconstructions)
            # not manual_backward, which would prepare the generator's DDP for gradients that never come
            (judgement / self.accumulate).backward()
            parts = parts | more
            if complete:
                norms.append(take_step(*discriminator[0], self.gradient_clip, counted=False))
        if is_logging_step(self.trainer, self):
            parts = parts | {"reconstruction": reconstruction, "penalty": quantized.penalty}
            self.log_dict({"gradient_norm": norms[0]} | {f"loss/{name}": value for name, value in parts.items()})
            self.log("loss", total, prog_bar=True)
        log_by_step(self.trainer)
        return {"loss": total, "gradient_norms": norms, "posterior": quantized.posterior}

    def _quantized(self, images: Tensor) -> Quantized:
        backbone, quantizer = self.tokenizer.backbone, self.tokenizer.quantizer
        if not self.decoder_alone:
            return quantizer(backbone.encode(images).movedim(1, -1))
        with torch.no_grad():
            latents = quantizer.detokenize(quantizer.tokenize(backbone.encode(images).movedim(1, -1)))
        return Quantized(latents, latents.new_zeros(()))

    def on_validation_epoch_start(self) -> None:
        # the costly metrics take longer than the rest of a validation, so only test and the end of fit compute them
        self.metrics = ReconstructionMetrics(self.tokenizer.quantizer, costly=self.trainer.testing).to(self.device)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        result = self.tokenizer.reconstruct(batch)
        assert self.metrics is not None
        self.metrics.update(batch, result.images, result.tokens, result.gaussian, result.bits)

    def on_validation_epoch_end(self) -> None:
        assert self.metrics is not None
        values, self.metrics = self.metrics.compute(), None
        prefix = "test" if self.trainer.testing else "val"
        if not values:  # on all ranks alike
            raise UserError("none of the evaluation set's pictures can be read (see the warnings): repair them, or evaluate others")
        # all ranks have computed the same values; sync_dist tells Lightning so
        constant = [name for name in values if is_fitting(self.trainer) and numbers()[name].constant]
        self.log_dict({f"{prefix}/{name}": float(value) for name, value in values.items() if name not in constant}, sync_dist=True)
        self.log_dict({f"{prefix}/{name}": float(values[name]) for name in constant}, sync_dist=True, logger=False)
        # an untrained encoder gives nearly the same tokens for all images
        if not self.trainer.sanity_checking and (warning := collapse(values)) is not None:
            rank_zero_warn(warning)

    on_test_epoch_start, test_step, on_test_epoch_end = on_validation_epoch_start, validation_step, on_validation_epoch_end

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.tokenizer.encode(batch)

    def _learners(self) -> list[tuple[LightningOptimizer, Any]]:
        """Optimizer and schedule of the generator and, with an adversary, of the discriminator."""
        both: list[Any] = [self.optimizers(), self.lr_schedulers()]
        return list(zip(*(each if isinstance(each, list) else [each] for each in both), strict=True))

    def configure_optimizers(self) -> Any:
        steps = planned_steps(self.trainer, self.accumulate) if self.schedule == "cosine" else math.inf
        own = [parameter for name, parameter in self.named_parameters() if not name.startswith("adversary.")]
        optimizers = [adamw(own, self.learning_rate, self.betas, self.weight_decay, self.warmup_steps, self.schedule, steps)]
        if (adversary := self.adversary) is not None:
            rate = self.learning_rate if adversary.learning_rate is None else adversary.learning_rate
            steps = max(steps - adversary.start, 1)
            optimizers.append(adamw(adversary.parameters(), rate, adversary.betas, 0.0, self.warmup_steps, self.schedule, steps))
        return optimizers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        weights_to_go_on_with(self.trainer, checkpoint)
        if self.decoder_alone and (kept := checkpoint.get("tokenizer", {}).get("tokens_of")):
            self.tokenizer.tokens_of = (kept[0], kept[1])
        # only the tokenizer must match the checkpoint; an adversary may be added or removed
        for states in ("state_dict", "current_model_state"):
            if (state := checkpoint.get(states)) is not None:
                kept = {name: value for name, value in state.items() if name in own or not name.startswith("adversary.")}
                checkpoint[states] = {name: value for name, value in own.items() if name.startswith("adversary.")} | kept
                _check_fit(checkpoint[states], own)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # lets a checkpoint alone rebuild the tokenizer; plain data, so that it loads with weights_only
        checkpoint["tokenizer"] = self.tokenizer.description()


def _check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises UserError unless a checkpoint's state has the names and shapes of the model."""
    for name in sorted(state.keys() | own.keys()):
        theirs, ours = (f"one of shape {tuple(part[name].shape)}" if name in part else "" for part in (state, own))
        if theirs != ours:
            told = f"the checkpoint has {theirs or 'none'}, the model {ours or 'none'}"
            raise UserError(f"--ckpt_path: {name}: {told}: give model.backbone, model.quantizer and model.loss of the run that wrote it")
