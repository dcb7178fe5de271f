"""PriorTraining: a LightningModule that trains a Prior."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from gq_lightning.construction import describe
from gq_lightning.errors import UserError
from gq_lightning.priors.counts import counted_bits_per_pixel, uniform_bits_per_pixel
from gq_lightning.priors.module import Prior
from gq_lightning.tokens.module import TokenSets
from gq_lightning.training.optimization import Schedule, adamw, as_asked_for, check_adamw, planned_steps, weights_to_go_on_with

Batch = tuple[Tensor, Tensor]


class PriorTraining(LightningModule):
    """Trains a Prior to predict the next symbol.

    Validation reports `bits_per_pixel`, which does not depend on the vocabulary, and the same for uniform tokens and for an order-0 model
    of their counts; `loss`, in nats per symbol; and `perplexity/1`, `perplexity/2` ... of the digits of a token.

    Args:
        prior: the transformer.
        learning_rate: of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: `constant`, or `cosine` down to 1 % of the learning rate at the last step.
        label_dropout: share of the training rows that are trained without their class, which guidance needs.
    """

    def __init__(
        self,
        prior: Prior,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
        schedule: Schedule = "cosine",
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_adamw("model", learning_rate, betas, weight_decay, warmup_steps)
        if not 0 <= label_dropout < 1:
            raise UserError(f"model.label_dropout {label_dropout}: give a share from 0 to below 1")
        self.prior, self.label_dropout = prior, label_dropout
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.baselines: dict[str, float] = {}
        self._sums = torch.zeros(0)

    def parts_to_compile(self) -> list[nn.Module]:
        """The modules that take most of the time of a step."""
        return [self.prior.body, self.prior.head]

    def setup(self, stage: str) -> None:
        data: TokenSets = self.trainer.datamodule  # type: ignore[attr-defined]
        training, held_out = data.training_set(), data.evaluation_set()
        self.baselines = {
            "bits_per_pixel_uniform": uniform_bits_per_pixel(held_out),
            "bits_per_pixel_counts": counted_bits_per_pixel(training, held_out),
        }

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step."""
        return self.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        as_asked_for(self.optimizers(), self.lr_schedulers())  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, labels = batch
        if self.label_dropout:
            labels = labels.masked_fill(torch.rand(labels.shape, device=labels.device) < self.label_dropout, -1)
        bits = self.prior(tokens, labels)
        loss = bits.mean() * math.log(2)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.trainer.global_step % every == 0:
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss is {float(loss)} at step {self.trainer.global_step}: lower model.learning_rate or set "
                    "trainer.gradient_clip_val, and resume from the last checkpoint with --ckpt_path last"
                )
            self.log("loss", loss, prog_bar=True)
            self.log("bits_per_pixel", self.prior.bits_per_pixel(bits.detach()))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(1 + self.prior.spelling.digits, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        bits = self.prior(*batch).double().unflatten(-1, (-1, self.prior.spelling.digits))
        self._sums += torch.cat([bits.new_tensor([len(bits)]), bits.sum(dim=(0, 1, 2))]).cpu()

    def on_validation_epoch_end(self) -> None:
        # all ranks have computed the same values; sync_dist tells Lightning so
        self.log_dict({f"val/{name}": value for name, value in self._measured().items()}, sync_dist=True)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The values that validation reports, for these batches of all ranks."""
        self.on_validation_epoch_start()
        for tokens, labels in batches:
            self.validation_step((tokens.to(self.device), labels.to(self.device)), 0)
        return self._measured()

    def _measured(self) -> dict[str, float]:
        of_ranks = torch.as_tensor(self.all_gather(self._sums.to(self.device))).view(-1, len(self._sums))
        pictures, *bits = of_ranks.sum(0).tolist()
        prior, tokens = self.prior, pictures * self.prior.positions * self.prior.grid[2]
        return {
            "bits_per_pixel": sum(bits) / (pictures * prior.positions * prior.downsampling**2),
            "loss": sum(bits) * math.log(2) / (tokens * len(bits)),
            **{f"perplexity/{digit}": 2 ** (total / tokens) for digit, total in enumerate(bits, 1)},
            **self.baselines,
        }

    def configure_optimizers(self) -> Any:
        steps = planned_steps(self.trainer, self.accumulate) if self.schedule == "cosine" else math.inf
        return adamw(self.parameters(), self.learning_rate, self.betas, self.weight_decay, self.warmup_steps, self.schedule, steps)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's own refuses a fused optimizer under `bf16-mixed`, for a gradient scaler that bfloat16 does not have."""
        if gradient_clip_val:
            clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
            clip(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["prior"] = describe(self.prior)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights_to_go_on_with(self.trainer, checkpoint)
        theirs, ours = (description["init_args"] for description in (checkpoint["prior"], describe(self.prior)))
        if different := sorted(name for name in ours if theirs.get(name) != ours[name]):
            raise UserError(f"the checkpoint's prior has other {', '.join(different)}: resume with its config and its token set")
