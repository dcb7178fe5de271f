"""rFID: the Fréchet distance between the Inception features of the originals and of what is decoded from their tokens."""

from typing import ClassVar

import torch
from torch import Tensor

from gq_lightning import weights
from gq_lightning.metrics import frechet
from gq_lightning.metrics.base import Metric, Number
from gq_lightning.quantizers.base import Quantizer


class RFID(Metric):
    """Of two images or more, on the scale 0..255.

    Raises:
        UserError: Inception's weights are missing and cannot be fetched.
    """

    numbers = (Number("rfid", "rFID", ".3f", "lower", logarithmic=True),)
    of_images = True
    costly = True
    protocol: ClassVar = {
        "rfid_extractor": "torch-fidelity's Inception of 2015 (TensorFlow's bilinear resize to 299), images rounded to 8 bits",
        "rfid_features": frechet.FEATURES,
        "rfid_weights_sha256": weights.checksum("inception"),
        "rfid_note": f"left out for one image; of {frechet.FEATURES} images or fewer the covariance is singular and the distance depends "
        "on the number of images: compare it only with values from the same images",
    }
    count: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        weights.load("inception")  # missing weights are a matter of now, not of the first batch
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        for name in ("originals", "images"):
            self.add_state(f"{name}_sum", torch.zeros(frechet.FEATURES, dtype=torch.float64), dist_reduce_fx="sum")
            products = torch.zeros(frechet.FEATURES, frechet.FEATURES, dtype=torch.float64)
            self.add_state(f"{name}_products", products, dist_reduce_fx="sum")

    def update(self, images: Tensor, originals: Tensor) -> None:
        self.count = self.count + len(images)
        for name, batch in (("originals", originals), ("images", images)):
            # originals are cached: the images of the Gaussian posterior are compared with the same ones
            features = frechet.inception_features(batch, cached=name == "originals")
            setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + features.sum(dim=0))
            setattr(self, f"{name}_products", getattr(self, f"{name}_products") + features.T @ features)

    def compute(self) -> dict[str, float]:
        if (count := int(self.count)) < 2:
            return {}
        moments = ((count, getattr(self, f"{name}_sum"), getattr(self, f"{name}_products")) for name in ("originals", "images"))
        return {"rfid": frechet.frechet_distance(*moments)}
