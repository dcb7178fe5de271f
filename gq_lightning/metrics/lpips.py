"""LPIPS (https://arxiv.org/abs/1801.03924), version 0.1, averaged over images, with the network that papers report."""

from typing import ClassVar, Final

from torch import Tensor

from gq_lightning import weights
from gq_lightning.metrics.base import ImageMetric, Number
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.weights.lpips import LPIPS as Network
from gq_lightning.weights.lpips import SMALLEST_SIDE, TRUNKS

NETWORK: Final = "alex"


class LPIPS(ImageMetric):
    """The distance of images on the scale 0..255. Raises UserError if its weights are missing and cannot be fetched."""

    numbers = (Number("lpips", "LPIPS", ".4f", "lower"),)
    smallest_side = SMALLEST_SIDE[NETWORK]
    protocol: ClassVar = {
        "lpips_network": NETWORK,
        "lpips_weights_sha256": weights.checksum(TRUNKS[NETWORK]),
        "lpips_note": f"images under {smallest_side} pixels are left out",
    }

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.network = Network(NETWORK)

    def of_each(self, images: Tensor, originals: Tensor) -> Tensor:
        return self.network(images / 127.5 - 1, originals / 127.5 - 1)
