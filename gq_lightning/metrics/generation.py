"""Metrics of generated pictures against a reference set: FID, sFID, Inception score, precision and recall, as in ADM's evaluation.

pictures --Inception--> Seen (pooled features, moments) --generation_metrics--> numbers
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from gq_lightning import weights
from gq_lightning.metrics import frechet
from gq_lightning.metrics.base import Number
from gq_lightning.weights.classifier import classifier

NEIGHBOURS, SPLITS = 3, 10
NUMBERS = (
    Number("gfid", "gFID", ".3f", "lower"),
    Number("sfid", "sFID", ".3f", "lower"),
    Number("inception_score", "Inception score", ".3f", "higher"),
    Number("precision", "precision", ".4f", "higher"),
    Number("recall", "recall", ".4f", "higher"),
)


@dataclass(frozen=True)
class Seen:
    """What Inception sees in a set of pictures.

    Attributes:
        pooled: features (N, 2048) float32 of the pictures; None if only moments are known.
        moments: mean and covariance of all pooled features, perhaps of more pictures.
        spatial: mean and covariance of the spatial features (2023); None if unknown.
    """

    pooled: Tensor | None
    moments: frechet.Moments
    spatial: frechet.Moments | None


def see(batches: Iterable[Tensor], device: torch.device, cached: bool = False) -> Seen | None:
    """What Inception sees in images (B, 3, H, W) on the scale 0..255; None for fewer than two images.

    Args:
        cached: use the cache of features (feature_cache.py), for a reference set.
    """
    every, total, products = [], torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for images in batches:
        pooled, spatial = frechet.spatial_features(images.to(device), cached)
        every.append(pooled.float().cpu())
        total, products = total.to(device) + spatial.sum(0), products.to(device) + spatial.T @ spatial
    features = torch.cat(every) if every else torch.zeros(0, frechet.FEATURES)
    if len(features) < 2:
        return None
    double = features.double()
    return Seen(features, frechet.moments(len(double), double.sum(0), double.T @ double), frechet.moments(len(double), total, products))


def generation_metrics(generated: Seen, reference: Seen, head: Tensor | None = None) -> dict[str, float]:
    """The metrics by name, without those that cannot be measured.

    Args:
        generated: with its pooled features.
        head: weights (1008, 2048) of Inception's classifier, for the Inception score.
    """
    assert generated.pooled is not None
    found = {"gfid": frechet.distance(generated.moments, reference.moments)}
    if generated.spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet.distance(generated.spatial, reference.spatial)
    if head is not None and len(generated.pooled) >= SPLITS:
        score = isc_features_to_metric(generated.pooled @ head.T, SPLITS)
        found |= {"inception_score": score[KEY_METRIC_ISC_MEAN], "inception_score_std": score[KEY_METRIC_ISC_STD]}
    if reference.pooled is not None and min(len(generated.pooled), len(reference.pooled)) > NEIGHBOURS:
        options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
        both = prc_features_to_metric(generated.pooled, reference.pooled, **options)
        found |= {"precision": both[KEY_METRIC_PRECISION], "recall": both[KEY_METRIC_RECALL]}
    return found


def head_of_inception() -> Tensor | None:
    """The weights for the Inception score; None if they cannot be fetched."""
    return classifier()


def protocol(found: Mapping[str, float], reference: Seen, head: Tensor | None) -> dict[str, Any]:
    """How the numbers are measured and why some are missing, for JSON."""
    missing = {}
    if "sfid" not in found:
        missing["sfid"] = "the reference has no spatial statistics"
    if "inception_score" not in found:
        needs = "Inception's classifier could not be fetched" if head is None else f"needs {SPLITS} pictures"
        missing["inception_score"] = needs
    if "precision" not in found:
        needs = "the reference has no pictures" if reference.pooled is None else f"needs more than {NEIGHBOURS} pictures on both sides"
        missing["precision and recall"] = needs
    return {
        "extractor": "torch-fidelity's Inception of 2015 (TensorFlow's bilinear resize to 299), pictures of 8 bits",
        "weights_sha256": weights.checksum("inception"),
        "gfid": f"Frechet distance of the {frechet.FEATURES} pooled features, unbiased covariances",
        "sfid": f"likewise of the first 7 channels of mixed_6/conv at 17 x 17 positions, {frechet.SPATIAL} numbers",
        "inception_score": f"{SPLITS} splits after a fixed shuffle, logits without bias; ADM has splits of 5000 in order",
        "precision_recall": f"improved precision and recall, k = {NEIGHBOURS}, pooled features",
        "note": f"with {frechet.FEATURES} pictures or fewer a covariance is singular; distances depend on the number of pictures: compare "
        "only values with the same reference and number",
        "left_out": missing,
        "versions": {package.replace("-", "_"): version(package) for package in ("torch", "torch-fidelity")},
    }
