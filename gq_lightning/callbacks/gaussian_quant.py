"""The Gaussian Quant post-training hook (https://arxiv.org/abs/2512.06609): turns the Gaussian VAE into a VQ-VAE when fit ends.

fit ends -> freeze the encoder -> attach the random codebook; without further training
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.training.module import TokenizerTraining


class GaussianQuant(Callback):
    """Converts the tokenizer at the end of fit.

    Args:
        quantizer: quantizer to attach to the Gaussian VAE, GaussianQuantizer or TokenBridge; null keeps the one it was trained with.
    """

    def __init__(self, quantizer: Quantizer | None = None) -> None:
        self.quantizer = quantizer

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TokenizerTraining)
        convert(pl_module.tokenizer, self.quantizer)


def convert(tokenizer: ImageTokenizer, quantizer: Quantizer | None = None) -> None:
    """Freezes the encoder and attaches the quantizer, if one is given. No training is involved.

    An attached quantizer works on the posteriors of the one that the tokenizer was trained with.
    """
    tokenizer.freeze_encoder()
    if quantizer is not None:
        vae = tokenizer.quantizer
        tokenizer.attach(quantizer.to(tokenizer.device))
        if isinstance(vae, PosteriorQuantizer) and isinstance(quantizer, PosteriorQuantizer):
            tokenizer.attach(quantizer.with_posterior_of(vae))
    tokenizer.eval()


def another_codebook(trained: Quantizer, changes: dict[str, Any], source: str) -> Quantizer:
    """The Gaussian quantizer of the training with other arguments for its codebook; errors name the file `source`."""
    if "codebook" not in trained.init_args:
        raise UserError(f"{source}: a {type(trained).__name__} has no codebook to replace: leave out --{min(changes)}")
    if "codebook_size" in changes and trained.init_args.get("exact_divergence"):
        raise UserError(
            f"{source}: its divergence is exact only for the codebook size of its training: leave out --codebook_size, or train again"
        )
    try:
        return type(trained)(**trained.init_args | changes)
    except (UserError, ValueError) as error:
        raise UserError(f"{source}: this codebook does not fit: {error}") from error
