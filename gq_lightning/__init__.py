"""gq_lightning: images to discrete tokens by Gaussian Quant, https://arxiv.org/abs/2512.06609."""

from gq_lightning.errors import UserError
from gq_lightning.tokenizer import ImageTokenizer

__version__ = "0.1.0"
__all__ = ["ImageTokenizer", "UserError", "__version__"]
