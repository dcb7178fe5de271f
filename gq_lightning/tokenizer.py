"""ImageTokenizer: backbone + quantizer + losses + optimizer settings, one training loop and one evaluation for every method.

    images (B,3,H,W) --backbone.encode--> features (B,C,h,w) --quantizer--> latents (B,D,h,w) --backbone.decode--> images
                                                     tokenize |  ^ detokenize
                                                              v  |
                                                      tokens (B,h,w,n) int64

Training decodes the quantizer's relaxation. Validation, test and everything a user calls decode tokens alone.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gq_lightning.adversary import Adversary
from gq_lightning.backbones.base import Backbone, check_multiple
from gq_lightning.errors import UserError
from gq_lightning.losses import ReconstructionLoss
from gq_lightning.metrics import ReconstructionMetrics
from gq_lightning.optimization import Schedule, adamw, take_step
from gq_lightning.pretrained import Pretrained
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.report import collapse
from gq_lightning.windows import see_in_windows


@dataclass(frozen=True)
class Reconstruction:
    """What evaluation looks at; images are clamped to [-1, 1].

    Attributes:
        tokens: (B, h, w, n) int64.
        images: (B, 3, H, W), decoded from the tokens alone.
        gaussian: (B, 3, H, W), decoded from the posterior mean, or None where the quantizer has no posterior.
        bits: (B, h, w, n), divergence of each token in bits, or None likewise.
    """

    tokens: Tensor
    images: Tensor
    gaussian: Tensor | None
    bits: Tensor | None


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the step just made is one that the loggers write: `log` of a dozen values takes as long as a small model's optimizer."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


class ImageTokenizer(Pretrained, LightningModule):
    """Turns images into discrete tokens and back.

    Args:
        backbone: encoder and decoder.
        quantizer: features to tokens and back.
        loss: reconstruction loss; None for a tokenizer that is not to be trained.
        learning_rate: of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices and kernels. With 0 it is Adam.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: `constant`, or `cosine` down to 1 % of the learning rate at the last step.
        gradient_clip: largest norm of the gradients; None does not clip.
        accumulate: batches whose gradients make one step. `trainer.max_steps` counts steps, each with its generator update and,
            under an adversary, its discriminator update.
        adversary: discriminator and adversarial loss; None trains without.
    """

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
    ) -> None:
        super().__init__()
        if accumulate < 1 or (gradient_clip is not None and gradient_clip <= 0):
            raise UserError(f"model.accumulate: {accumulate} must be at least 1, model.gradient_clip: {gradient_clip} positive")
        # two optimizers, each with its own backward pass, are Lightning's manual optimization
        self.automatic_optimization = False
        self.backbone, self.loss, self.adversary = backbone, loss, adversary
        self.attach(quantizer)
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.metrics: ReconstructionMetrics | None = None
        # DistributedDataParallel of the whole must not wait for gradients of the discriminator, which has its own, see Adversary
        self._ddp_params_and_buffers_to_ignore = [name for name in self.state_dict() if name.startswith("adversary.")]

    # What a user calls

    @torch.no_grad()
    def encode(self, images: Tensor, deterministic: bool = False, tile: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of `downsampling`, to tokens (B, h, w, n) int64.

        A picture that the backbone cannot see at once is seen in overlapping windows: of the backbone's own `window`, or of
        `tile` pixels where memory is short. The tokens come in the picture's own grid all the same.

        Args:
            images: (B, 3, H, W).
            deterministic: process one image at a time, so that its tokens do not depend on the batch it is in. Otherwise the
                batch size may decide, by rounding, between two codewords that fit equally well.
            tile: side of the largest square seen at once, in pixels, a multiple of `downsampling`.

        Raises:
            UserError: the shape does not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(f"images must be floating point (B, 3, H, W) in [-1, 1], not {images.dtype} {tuple(images.shape)}")
        check_multiple(images.shape[2], images.shape[3], self.downsampling)
        if deterministic and len(images) > 1:
            return torch.cat([self.encode(image, tile=tile) for image in images.split(1)])
        features = see_in_windows(self.backbone.encode, images.to(self.device), self.downsampling, 1, self.window, tile)
        return self.quantizer.tokenize(features.movedim(1, -1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, tile: int | None = None) -> Tensor:
        """Tokens (B, h, w, n) int64 to images (B, 3, h * downsampling, w * downsampling) in [-1, 1]; `tile` as in `encode`."""
        if tokens.ndim != 4:
            raise UserError(f"tokens must be (B, h, w, {self.tokens_per_position}), not {tuple(tokens.shape)}")
        latents = self.quantizer.detokenize(tokens.to(self.device)).movedim(-1, 1)
        return see_in_windows(self.backbone.decode, latents, 1, self.downsampling, self.window, tile).clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Reconstruction:
        """Images (B, 3, H, W) in [-1, 1], of a size that the backbone sees at once, through tokens and through the posterior mean."""
        with torch.no_grad():
            features = self.backbone.encode(images).movedim(1, -1)
            tokens = self.quantizer.tokenize(features)
            diagnostics = self.quantizer(features).diagnostics
            mean = diagnostics.get("mean")
            gaussian = None if mean is None else self.backbone.decode(mean.movedim(-1, 1)).float().clamp(-1, 1)
            return Reconstruction(tokens, self.decode(tokens).float(), gaussian, diagnostics.get("bits"))

    @property
    def downsampling(self) -> int:
        """Pixels per position of the token grid, along one axis."""
        return self.backbone.downsampling

    @property
    def window(self) -> int | None:
        """The smallest picture (pixels) that `encode` accepts, where the backbone has one fixed size."""
        return self.backbone.window

    @property
    def codebook_size(self) -> int:
        """Tokens are in [0, codebook_size)."""
        return self.quantizer.codebook_size

    @property
    def tokens_per_position(self) -> int:
        """n of (B, h, w, n)."""
        return self.quantizer.tokens_per_position

    # Conversion

    def attach(self, quantizer: Quantizer) -> None:
        """Replaces the quantizer, by one of the same widths."""
        for name in ("encoder_channels", "latent_channels"):
            wanted, given = getattr(self.backbone, name), getattr(quantizer, name)
            if wanted != given:
                raise UserError(f"quantizer: its {name} are {given}, the backbone's are {wanted}: configure both alike")
        self.quantizer = quantizer

    def freeze_encoder(self) -> None:
        """From here on the encoder, and with it every token, stays as it is."""
        self.backbone.encoder.requires_grad_(False).eval()

    # Training and evaluation under Lightning's Trainer

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.loss is None:
            raise UserError("model.loss: null, but fit needs a loss")
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision: 16-mixed needs scaled gradients, which two optimizers do not share: use bf16-mixed")

    def on_train_start(self) -> None:
        if self.adversary is not None:
            # DistributedDataParallel of the discriminator is its own
            self.adversary.distribute(self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        assert self.loss is not None
        adversary, step = self.adversary, self.trainer.global_step
        features = self.backbone.encode(batch)
        quantized = self.quantizer(features.movedim(1, -1))
        reconstructions = self.backbone.decode(quantized.latents.movedim(-1, 1))
        reconstruction, parts = self.loss(reconstructions, batch)
        total = reconstruction + quantized.penalty
        if adversary is not None and adversary.judges(step):
            term, more = adversary.generator_loss(batch, reconstructions, reconstruction, self.backbone.last_layer)
            total, parts = total + term, parts | more
        complete = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        generator, *discriminator = zip(self._optimizers(), self._schedulers(), strict=True)
        with nullcontext() if complete else self._without_synchronisation():
            self.manual_backward(total / self.accumulate)
        norms = [take_step(*generator, self.gradient_clip, counted=True)] if complete else []
        if adversary is not None and adversary.learns(step):
            judgement, more = adversary.discriminator_loss(batch, reconstructions)
            # not manual_backward: that one prepares DDP of the generator for gradients which do not come
            (judgement / self.accumulate).backward()
            parts = parts | more
            if complete:
                norms.append(take_step(*discriminator[0], self.gradient_clip, counted=False))
        if complete and is_logging_step(self.trainer):
            parts = parts | {"reconstruction": reconstruction, "penalty": quantized.penalty}
            self.log_dict({"gradient_norm": norms[0]} | {f"loss/{name}": value for name, value in parts.items()})
            self.log("loss", total, prog_bar=True)
        return {"loss": total, "gradient_norms": norms, "diagnostics": quantized.diagnostics}

    def new_metrics(self, rfid: bool, gaussian_rfid: bool = True) -> ReconstructionMetrics:
        """Metrics that fit this tokenizer, on its device."""
        quantizer = self.quantizer
        tdc = getattr(quantizer, "tdc", None)
        return ReconstructionMetrics(
            codebook_size=quantizer.codebook_size,
            bits_per_position=quantizer.bits_per_position,
            tokens_per_position=quantizer.tokens_per_position,
            downsampling=self.downsampling,
            rfid=rfid,
            alpha=tdc.alpha if tdc is not None else 0.5,
            gaussian_rfid=gaussian_rfid,
        ).to(self.device)

    def _evaluation_start(self, rfid: bool) -> None:
        self.metrics = self.new_metrics(rfid)

    def _evaluation_step(self, batch: Tensor) -> None:
        result = self.reconstruct(batch)
        assert self.metrics is not None
        self.metrics.update(batch, result.images, result.tokens, result.gaussian, result.bits)

    def _evaluation_end(self, prefix: str) -> None:
        assert self.metrics is not None
        values, self.metrics = self.metrics.compute(), None
        # all ranks have computed the same values; sync_dist says so to Lightning
        self.log_dict({f"{prefix}/{name}": float(value) for name, value in values.items()}, sync_dist=True)
        # before its first step an encoder says the same of all images
        if not self.trainer.sanity_checking and (warning := collapse(values)) is not None:
            rank_zero_warn(warning)

    def on_validation_epoch_start(self) -> None:
        # rFID costs more than the rest of a validation: test and the end of fit take it
        self._evaluation_start(rfid=False)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        self._evaluation_end("val")

    def on_test_epoch_start(self) -> None:
        self._evaluation_start(rfid=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        self._evaluation_end("test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.encode(batch)

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers: Any = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _schedulers(self) -> Iterable[Any]:
        schedulers: Any = self.lr_schedulers()
        return schedulers if isinstance(schedulers, list) else [schedulers]

    def _without_synchronisation(self) -> AbstractContextManager[None]:
        # gradients of an incomplete step stay on their rank
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return block()

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches if self.schedule == "cosine" else math.inf
        if self.trainer.max_steps < 0:
            steps = steps / self.accumulate
        own = [parameter for name, parameter in self.named_parameters() if not name.startswith("adversary.")]
        optimizers = [adamw(own, self.learning_rate, self.betas, self.weight_decay, self.warmup_steps, self.schedule, steps)]
        if (adversary := self.adversary) is not None:
            rate = self.learning_rate if adversary.learning_rate is None else adversary.learning_rate
            steps = max(steps - adversary.start, 1)
            optimizers.append(adamw(adversary.parameters(), rate, adversary.betas, 0.0, self.warmup_steps, self.schedule, steps))
        return optimizers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a checkpoint alone suffices to make the tokenizer again; plain data, so that it loads with weights_only
        checkpoint["tokenizer"] = self.description()
