"""ImageTokenizer: backbone + quantizer + losses + optimizer settings, one training loop and one evaluation for every method.

    images (B,3,H,W) --backbone.encode--> features (B,C,h,w) --quantizer--> latents (B,D,h,w) --backbone.decode--> images
                                                     tokenize |  ^ detokenize
                                                              v  |
                                                      tokens (B,h,w,n) int64

Training decodes the quantizer's relaxation. Validation, test and everything a user calls decode tokens alone.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from gq_lightning import hub
from gq_lightning.backbones.base import Backbone, check_multiple
from gq_lightning.construction import build, describe
from gq_lightning.errors import UserError
from gq_lightning.losses import ReconstructionLoss
from gq_lightning.metrics import ReconstructionMetrics
from gq_lightning.optimization import Schedule, adamw
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.windows import apply_in_windows

WINDOWS_PER_BATCH = 16


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


class ImageTokenizer(LightningModule):
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
    ) -> None:
        super().__init__()
        self.backbone, self.loss = backbone, loss
        self.attach(quantizer)
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.metrics: ReconstructionMetrics | None = None

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
        features = self._in_windows(self.backbone.encode, images.to(self.device), tile, self.downsampling, 1)
        return self.quantizer.tokenize(features.movedim(1, -1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, tile: int | None = None) -> Tensor:
        """Tokens (B, h, w, n) int64 to images (B, 3, h * downsampling, w * downsampling) in [-1, 1]; `tile` as in `encode`."""
        if tokens.ndim != 4:
            raise UserError(f"tokens must be (B, h, w, {self.tokens_per_position}), not {tuple(tokens.shape)}")
        latents = self.quantizer.detokenize(tokens.to(self.device)).movedim(-1, 1)
        return self._in_windows(self.backbone.decode, latents, tile, 1, self.downsampling).clamp(-1, 1)

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

    def _in_windows(self, function: Any, x: Tensor, tile: int | None, scale_in: int, scale_out: int) -> Tensor:
        d = self.downsampling
        if tile is not None and (tile < 4 * d or tile % d):
            raise UserError(f"tile: {tile} is not a multiple of {d} of at least {4 * d} pixels")
        side = self.window or tile
        height, width = (length // scale_in for length in x.shape[-2:])
        if side is None or (self.window is None and max(height, width) * d <= side):
            return function(x)
        if self.window and min(height, width) * d < side:
            raise UserError(f"pictures of {height * d}x{width * d} are smaller than the backbone's {side} pixels: pad them first")
        window = tuple(min(side // d, length) * scale_in for length in (height, width))
        # a quarter of a window in common hides the seams
        overlap = min(side // d // 4, min(height, width) - 1) * scale_in
        return apply_in_windows(function, x, (window[0], window[1]), overlap, scale_in, scale_out, WINDOWS_PER_BATCH)

    # Conversion, saving and loading

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

    def description(self) -> dict[str, Any]:
        """What `construction.build` needs to make this tokenizer again, without what only training needs."""
        parts = {name: describe(getattr(self, name)) for name in ("backbone", "quantizer")}
        return {"class_path": "gq_lightning.ImageTokenizer", "init_args": parts}

    def _weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("loss.")}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description and the weights: tokens are only worth something together with the tokenizer of this fingerprint."""
        # 1 and 1.0 are the same argument
        description = json.loads(json.dumps(self.description()), parse_int=float)
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
        for name, tensor in sorted(self._weights().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, from which `from_pretrained` makes an equal tokenizer."""
        facts = {
            "bits_per_pixel": self.quantizer.bits_per_position / self.downsampling**2,
            "codebook_size": self.codebook_size,
            "tokens_per_position": self.tokens_per_position,
            "downsampling": self.downsampling,
            "fingerprint": self.fingerprint,
        }
        if isinstance(codebook := getattr(self.quantizer, "codebook_fingerprint", None), Tensor):
            facts["codebook"] = {"recipe": self.quantizer.recipe, "sha256": bytes(codebook.tolist()).hex()}
        hub.write_folder(folder, self.description(), self._weights(), facts)

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> Self:
        """A tokenizer from a folder or from `owner/repository` on the hub, in eval mode and frozen.

        Args:
            name: folder or repository.
            download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of huggingface_hub.

        Raises:
            UserError: a file is missing, damaged or changed.
        """
        folder = hub.locate(name, **download)
        description, state = hub.read_folder(folder)
        return cls.from_description(description, state, source=str(folder / hub.CONFIG))

    @classmethod
    def from_description(cls, description: dict[str, Any], state: Mapping[str, Tensor], source: str) -> Self:
        """A tokenizer from what `description` gave and its weights; `source` is the file named in errors."""
        tokenizer = build(cls, description, source)
        try:
            tokenizer.load_state_dict(state)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(f"{source}: its weights do not fit the tokenizer it describes: {' '.join(lines[1:2])}") from error
        return tokenizer.eval().requires_grad_(False)

    def push_to_hub(self, repository: str, folder: str | Path, token: str | None = None, private: bool | None = None) -> str:
        """Saves to `folder` and uploads it as `owner/repository`; returns the commit's address."""
        self.save_pretrained(folder)
        return hub.upload(folder, repository, token, private)

    # Training and evaluation under Lightning's Trainer

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        if self.loss is None:
            raise UserError("model.loss: null, but fit needs a loss")
        features = self.backbone.encode(batch)
        quantized = self.quantizer(features.movedim(1, -1))
        reconstructions = self.backbone.decode(quantized.latents.movedim(-1, 1))
        reconstruction, parts = self.loss(reconstructions, batch)
        total = reconstruction + quantized.penalty
        self.log("loss", total, prog_bar=True)
        self.log_dict({f"loss/{name}": value for name, value in parts.items()})
        self.log_dict({"loss/reconstruction": reconstruction, "loss/penalty": quantized.penalty})
        return {"loss": total, "diagnostics": quantized.diagnostics}

    def new_metrics(self, rfid: bool) -> ReconstructionMetrics:
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
        ).to(self.device)

    def _evaluation_start(self, rfid: bool) -> None:
        self.metrics = self.new_metrics(rfid)

    def _evaluation_step(self, batch: Tensor) -> None:
        result = self.reconstruct(batch)
        assert self.metrics is not None
        self.metrics.update(batch, result.images, result.tokens, result.gaussian, result.bits)

    def _evaluation_end(self, prefix: str) -> None:
        assert self.metrics is not None
        # all ranks have computed the same values; sync_dist says so to Lightning
        self.log_dict({f"{prefix}/{name}": float(value) for name, value in self.metrics.compute().items()}, sync_dist=True)
        self.metrics = None

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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches if self.schedule == "cosine" else math.inf
        return adamw(self, self.learning_rate, self.betas, self.weight_decay, self.warmup_steps, self.schedule, steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a checkpoint alone suffices to make the tokenizer again; plain data, so that it loads with weights_only
        checkpoint["tokenizer"] = self.description()
