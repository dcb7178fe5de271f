"""rFID: the Fréchet distance between the Inception features of the originals and of the images decoded from their tokens."""

from typing import ClassVar

import torch
from torch import Tensor

from gq_lightning import weights
from gq_lightning.metrics import frechet
from gq_lightning.metrics.base import Metric, Number
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.weights import inception


class RFID(Metric):
    """rFID of at least two images on the scale 0..255. Raises UserError if Inception's weights are missing and cannot be fetched."""

    numbers = (Number("rfid", "rFID", ".3f", "lower", logarithmic=True),)
    of_images = True
    costly = True
    protocol: ClassVar = {
        "rfid_extractor": "torch-fidelity's Inception of 2015 (TensorFlow's bilinear resize to 299), images rounded to 8 bits",
        "rfid_features": inception.FEATURES,
        "rfid_weights_sha256": weights.checksum("inception"),
        "rfid_note": f"left out for one image; of {inception.FEATURES} images or fewer the covariance is singular and the distance depends "
        "on the number of images: compare it only with values from the same images",
    }
    count: Tensor
    sums: Tensor
    products: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        weights.load("inception")  # report missing weights now, not at the first batch
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        # for the originals and for the images: sum of the features, and sum of their outer products
        sizes = (2, inception.FEATURES, inception.FEATURES)
        self.add_state("sums", torch.zeros(sizes[:2], dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(sizes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, originals: Tensor) -> None:
        # the originals are the same for tokens and Gaussian posterior, and for every tokenizer, so they are cached
        features = torch.stack([inception.inception_features(originals, cached=True), inception.inception_features(images)])
        self.count, self.sums = self.count + len(images), self.sums + features.sum(dim=1)
        self.products = torch.baddbmm(self.products, features.mT, features)  # 64 MiB: not through an intermediate result

    def compute(self) -> dict[str, float]:
        if self.count < 2:
            return {}
        both = [frechet.moments(int(self.count), *of_one) for of_one in zip(self.sums, self.products, strict=True)]
        return {"rfid": frechet.distance(*both)}
