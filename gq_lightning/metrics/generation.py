"""Metrics of generated pictures against a reference set: FID, sFID, Inception score, precision and recall, as in ADM's evaluation.

pictures --Inception--> Seen (pooled features, moments) --generation_metrics--> numbers
"""

from collections.abc import Iterable
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
from gq_lightning.weights import inception
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
    """What Inception sees in images (B, 3, H, W) on the scale 0..255; None for fewer than two images. `cached` uses the cache of features
    (feature_cache.py), for a reference set."""
    every, total, products = [], torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for images in batches:
        pooled, spatial = inception.spatial_features(images.to(device), cached)
        every.append(pooled.float().cpu())
        total, products = total.to(device) + spatial.sum(0), products.to(device) + spatial.T @ spatial
    features = torch.cat(every) if every else torch.zeros(0, inception.FEATURES)
    if len(features) < 2:
        return None
    double = features.double()
    return Seen(features, frechet.moments(len(double), double.sum(0), double.T @ double), frechet.moments(len(double), total, products))


def generation_metrics(generated: Seen, reference: Seen) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics by name, and why some cannot be measured. `generated` has its pooled features."""
    assert generated.pooled is not None
    found, left_out = {"gfid": frechet.distance(generated.moments, reference.moments)}, {}
    if generated.spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet.distance(generated.spatial, reference.spatial)
    else:
        left_out["sfid"] = "the reference has no spatial statistics"
    if (head := classifier()) is None:
        left_out["inception_score"] = "Inception's classifier could not be fetched"
    elif len(generated.pooled) < SPLITS:
        left_out["inception_score"] = f"needs {SPLITS} pictures"
    else:
        score = isc_features_to_metric(generated.pooled @ head.T, SPLITS)
        found |= {"inception_score": score[KEY_METRIC_ISC_MEAN], "inception_score_std": score[KEY_METRIC_ISC_STD]}
    if reference.pooled is None:
        left_out["precision and recall"] = "the reference has no pictures"
    elif min(len(generated.pooled), len(reference.pooled)) <= NEIGHBOURS:
        left_out["precision and recall"] = f"needs more than {NEIGHBOURS} pictures on both sides"
    else:
        options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
        both = prc_features_to_metric(generated.pooled, reference.pooled, **options)
        found |= {"precision": both[KEY_METRIC_PRECISION], "recall": both[KEY_METRIC_RECALL]}
    return found, left_out


def protocol(left_out: dict[str, str]) -> dict[str, Any]:
    """How the numbers are measured, for JSON."""
    return {
        "extractor": "torch-fidelity's Inception of 2015 (TensorFlow's bilinear resize to 299), pictures of 8 bits",
        "weights_sha256": weights.checksum("inception"),
        "gfid": f"Frechet distance of the {inception.FEATURES} pooled features, unbiased covariances",
        "sfid": f"likewise of the first 7 channels of mixed_6/conv at 17 x 17 positions, {inception.SPATIAL} numbers",
        "inception_score": f"{SPLITS} splits after a fixed shuffle, logits without bias; ADM has splits of 5000 in order",
        "precision_recall": f"improved precision and recall, k = {NEIGHBOURS}, pooled features",
        "note": f"with {inception.FEATURES} pictures or fewer a covariance is singular; distances depend on the number of pictures: "
        "compare only values with the same reference and number",
        "left_out": left_out,
        "versions": {package.replace("-", "_"): version(package) for package in ("torch", "torch-fidelity")},
    }
