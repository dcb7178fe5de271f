import functools
import json
import math
from pathlib import Path
from unittest.mock import Mock, patch

import numpy
import pytest
import pytorch_msssim
import scipy.linalg
import torch
from processes import on_ranks
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from gq_lightning.errors import UserError
from gq_lightning.metrics import METRICS, ReconstructionMetrics, frechet, numbers, psnr, reconstruction
from gq_lightning.metrics.codebook import collapse, expected_usage
from gq_lightning.metrics.lpips import LPIPS
from gq_lightning.metrics.ms_ssim import fitting_levels, ms_ssim
from gq_lightning.metrics.ssim import ssim
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer
from gq_lightning.weights import feature_cache, inception
from gq_lightning.weights.lpips import LPIPS as Network


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path)  # not the user's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 8 + 1, size // 8 + 1, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def noisy(images, strength=0.1, seed=1):
    return images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(count, codebook_size=256, grid=8, per_position=2, seed=2):
    return torch.randint(0, codebook_size, (count, grid, grid, per_position), generator=torch.Generator().manual_seed(seed))


def new(codebook_size=256, per_position=2, posterior=False, lpips=False, rfid=False, **options):
    geometry = {"codebook_size": codebook_size, "tokens_per_position": per_position, "tdc": None}
    geometry["bits_per_position"] = per_position * math.log2(codebook_size)
    quantizer = Mock(spec=PosteriorQuantizer if posterior else Quantizer, **geometry)
    with patch.object(reconstruction, "METRICS", [metric for metric in METRICS if lpips or metric is not LPIPS]):
        return ReconstructionMetrics(quantizer, costly=rfid, **options)


def update(metrics, images, reconstructions, tokens, gaussian=None, bits=None):
    metrics.update(images, reconstructions, tokens, gaussian, bits)


def cheap_features(images, cached=False):
    """Stands in for the Inception where only the bookkeeping is tested."""
    small = nn.functional.adaptive_avg_pool2d(images.round(), (26, 27)).flatten(1)  # 2106 numbers
    return small[:, :2048].double() / 255


@pytest.fixture
def cheap_rfid(monkeypatch):
    monkeypatch.setattr(inception, "inception_features", cheap_features)


def distance(*both):
    return frechet.distance(*(frechet.moments(*of_one) for of_one in both))


def on_255(images):
    return (images.clamp(-1, 1) + 1) * 127.5


def channels_last(images):
    return on_255(images).permute(0, 2, 3, 1).double().numpy()


def test_psnr_is_the_mean_over_images_of_clamped_ones():
    images = pictures(3)
    candidates = torch.cat([noisy(images[:1], 0.5), noisy(images[1:], 0.05)])
    assert candidates.abs().max() > 1
    metrics = new()
    update(metrics, images, candidates, random_tokens(3))
    expected = [
        peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(channels_last(images), channels_last(candidates), strict=True)
    ]
    by_hand = [
        10 * math.log10(255**2 / numpy.mean((a - b) ** 2)) for a, b in zip(channels_last(images), channels_last(candidates), strict=True)
    ]
    assert expected == pytest.approx(by_hand)
    assert metrics.compute()["psnr"] == pytest.approx(numpy.mean(expected), abs=1e-4)


def test_ssim_agrees_with_two_other_implementations():
    images = pictures(3, 50)
    candidates = noisy(images, 0.2)
    result = ssim(on_255(candidates), on_255(images))
    reference = pytorch_msssim.ssim(on_255(candidates), on_255(images), data_range=255, size_average=False)
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": -1}
    expected = [structural_similarity(a, b, **options) for a, b in zip(channels_last(candidates), channels_last(images), strict=True)]
    assert result.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [161, 176, 203])
def test_ms_ssim_agrees_with_pytorch_msssim(size):
    images = pictures(2, size)
    candidates = torch.cat([noisy(images[:1], 0.3), noisy(images[1:], 0.05)])
    assert fitting_levels(size) == 5
    result = ms_ssim(on_255(candidates), on_255(images), levels=5)
    reference = pytorch_msssim.ms_ssim(on_255(candidates), on_255(images), data_range=255, size_average=False)
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


def test_ms_ssim_levels_are_those_that_fit():
    sides = {16: 0, 20: 0, 21: 2, 32: 2, 40: 2, 41: 3, 64: 3, 81: 4, 128: 4, 160: 4, 161: 5, 256: 5, 1024: 5}
    assert {side: fitting_levels(side) for side in sides} == sides
    # the smallest picture of each level still has a place for the window, and a similarity between 0 and 1
    for side in (21, 41, 81):
        images = on_255(pictures(1, side))
        value = ms_ssim(on_255(noisy(pictures(1, side), 0.3)), images, fitting_levels(side)).item()
        assert 0 < value < 1
        assert ms_ssim(images, images, fitting_levels(side)).item() == pytest.approx(1)


def test_two_levels_of_ms_ssim_by_hand():
    images, candidates = on_255(pictures(2, 32)), on_255(noisy(pictures(2, 32), 0.3))
    weights = numpy.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    window = pytorch_msssim.ssim.__globals__["_fspecial_gauss_1d"](11, 1.5).repeat(3, 1, 1, 1)
    terms = pytorch_msssim.ssim.__globals__["_ssim"]
    _, contrast = terms(candidates, images, 255, window, size_average=False)
    pool = nn.functional.avg_pool2d
    last, _ = terms(pool(candidates, 2), pool(images, 2), 255, window, size_average=False)
    expected = (contrast ** weights[0] * last ** weights[1]).mean(dim=1)
    torch.testing.assert_close(ms_ssim(candidates, images, 2), expected, rtol=1e-4, atol=1e-4)


def test_identical_images_give_finite_numbers_for_json():
    images = pictures(2)
    metrics = new(lpips=True)
    update(metrics, images, images, random_tokens(2))
    result = metrics.compute()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["psnr"] == psnr.CAP
    assert result["ssim"] == pytest.approx(1)
    assert result["ms_ssim"] == pytest.approx(1)
    assert result["lpips"] == 0


def test_lpips_is_the_mean_distance_of_clamped_images():
    images = pictures(3)
    candidates = noisy(images, 0.5)
    metrics = new(lpips=True)
    update(metrics, images, candidates, random_tokens(3))
    expected = Network("alex")(candidates.clamp(-1, 1), images).mean().item()
    assert metrics.compute()["lpips"] == pytest.approx(expected, rel=1e-4)


def moments(features):
    features = torch.from_numpy(features)
    return len(features), features.sum(dim=0), features.T @ features


@pytest.mark.parametrize("counts", [(300, 200), (20, 12)], ids=["full rank", "singular"])
def test_frechet_distance_against_scipy(counts):
    generator = numpy.random.default_rng(0)
    mix = generator.standard_normal((40, 40))
    first = generator.standard_normal((counts[0], 40)) @ mix
    second = generator.standard_normal((counts[1], 40)) @ mix.T + 0.5
    covariances = numpy.cov(first, rowvar=False), numpy.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum() + numpy.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-4)
    assert distance(moments(first), moments(first)) == pytest.approx(0, abs=1e-6 * expected)


def test_frechet_distance_of_two_lines_by_hand():
    # variances 1 and 9, means 0 and 2: 2^2 + (3 - 1)^2
    first, second = numpy.array([[-1.0], [1.0], [0.0]]), numpy.array([[-1.0], [5.0], [2.0]])
    assert distance(moments(first), moments(second)) == pytest.approx(8)
    assert math.isnan(distance(moments(first), moments(second * math.nan)))


def test_rfid_against_numpy_on_the_same_features(monkeypatch):
    images, candidates = pictures(3), noisy(pictures(3), 0.3)
    seen, real = [], inception.inception_features
    monkeypatch.setattr(inception, "inception_features", lambda batch, cached=False: seen.append(real(batch)) or seen[-1])
    metrics = new(rfid=True)
    for part in (slice(0, 2), slice(2, 3)):
        update(metrics, images[part], candidates[part], random_tokens(3)[part])
    a, b = (torch.cat(features).numpy() for features in (seen[0::2], seen[1::2]))
    assert a.shape == (3, 2048)
    assert (a >= 0).all()
    assert a.mean() > 0.1
    # few images: tr (C1 C2)^(1/2) from the eigenvalues of a small matrix with the same spectrum
    centred = [(x - x.mean(axis=0)) / math.sqrt(2) for x in (a, b)]
    cross = centred[0] @ centred[1].T
    trace = numpy.sqrt(numpy.linalg.eigvalsh(cross @ cross.T).clip(0)).sum()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * trace
    assert metrics.compute()["rfid"] == pytest.approx(expected, rel=1e-3)
    assert "2048 images or fewer" in metrics.protocol()["rfid_note"]


def test_inception_sees_images_rounded_to_whole_numbers():
    images = on_255(pictures(1))
    features = inception.inception_features(images)
    assert features.dtype == torch.float64
    assert torch.equal(inception.inception_features(images.round()), features)


def test_the_faster_inception_is_torch_fidelity_s(monkeypatch):
    """Folding and layout change the last digits: features by less than 1e-5 of the largest, the distance by less than 1e-3."""
    pairs = [on_255(pictures(4)), on_255(noisy(pictures(4), 0.3))]
    fast = [inception.inception_features(images) for images in pairs]
    monkeypatch.setattr(inception, "faster", lambda extractor: extractor)
    monkeypatch.setattr(inception, "_extractor", functools.cache(inception._extractor.__wrapped__))
    plain = [inception.inception_features(images) for images in pairs]
    for ours, theirs in zip(fast, plain, strict=True):
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    distances = [distance(*(moments(features.numpy()) for features in both)) for both in (fast, plain)]
    assert distances[0] == pytest.approx(distances[1], abs=1e-3)


def test_rfid_is_left_out_for_one_image(cheap_rfid):
    metrics = new(rfid=True)
    update(metrics, pictures(1), noisy(pictures(1)), random_tokens(1))
    assert "rfid" not in metrics.compute()
    assert "left out" in metrics.protocol()["rfid_note"]


def test_usage_perplexity_and_rate_by_hand():
    tokens = torch.tensor([0, 0, 0, 0, 1, 1, 5, 7]).reshape(1, 2, 2, 2)
    metrics = new(codebook_size=10)
    update(metrics, pictures(1, 16), pictures(1, 16), tokens)
    result = metrics.compute()
    assert result["codebook_usage"] == pytest.approx(0.4)
    assert result["codebook_usage_expected"] == pytest.approx(expected_usage(10, 8))
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert result["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert result["bits_per_pixel"] == pytest.approx(8 * math.log2(10) / 256)
    assert (result["images"], result["tokens"]) == (1, 8)
    assert isinstance(result["images"], int)


def test_bits_by_hand():
    bits = torch.tensor([7.4, 7.5, 8.0, 8.5, 8.6, 9.0, 8.0, 8.0]).reshape(1, 2, 2, 2)
    metrics = new()
    update(metrics, pictures(1, 16), pictures(1, 16), random_tokens(1, grid=2), bits=bits)
    result = metrics.compute()
    assert result["bits_min"] == pytest.approx(7.4)
    assert result["bits_max"] == pytest.approx(9.0)
    assert result["bits_mean"] == pytest.approx(bits.double().mean().item())
    assert result["bits_std"] == pytest.approx(bits.double().std(correction=0).item())
    assert result["share_within_alpha"] == 5 / 8


def test_the_gaussian_images_are_measured_beside_and_only_when_given(cheap_rfid):
    images, tokens = pictures(3), random_tokens(3)
    metrics = new(posterior=True, lpips=True, rfid=True)
    update(metrics, images, noisy(images, 0.3), tokens, gaussian=noisy(images, 0.05))
    result = metrics.compute()
    alone = new(lpips=True, rfid=True)
    update(alone, images, noisy(images, 0.05), tokens)
    expected = alone.compute()
    without = new(posterior=True, lpips=True, rfid=True, gaussian_costly=False)
    update(without, images, noisy(images, 0.3), tokens, gaussian=noisy(images, 0.05))
    assert without.compute() == {name: value for name, value in result.items() if name != "gaussian_rfid"}
    names = ("psnr", "ssim", "ms_ssim", "lpips", "rfid")
    assert {name: result[f"gaussian_{name}"] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-6)
    assert result["gaussian_psnr"] > result["psnr"] + 6
    assert result["gaussian_rfid"] < result["rfid"]
    assert not [name for name in expected if name.startswith(("gaussian", "bits_m", "bits_s", "share"))]


def test_small_images_leave_out_what_is_undefined_and_say_so():
    metrics = new(lpips=True)
    update(metrics, pictures(2, 16), noisy(pictures(2, 16)), random_tokens(2, grid=2))
    result, protocol = metrics.compute(), metrics.protocol()
    assert {"psnr", "ssim"} <= set(result)
    assert not {"ms_ssim", "lpips"} & set(result)
    assert "none under 21" in protocol["ms_ssim"]
    assert "under 31 pixels" in protocol["lpips_note"]


def test_protocol_is_json_and_says_what_was_done():
    protocol = json.loads(json.dumps(new(lpips=True, rfid=True).protocol()))
    assert len(protocol["lpips_weights_sha256"]) == len(protocol["rfid_weights_sha256"]) == 64
    assert set(protocol["versions"]) == {"torch", "torchvision", "torchmetrics", "torch_fidelity", "lpips"}
    assert "rfid_features" not in new().protocol()


def test_it_lives_in_a_module_without_a_trace_in_its_state():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.metrics = new(lpips=True)

    holder = Holder()
    update(holder.metrics, pictures(2), noisy(pictures(2)), random_tokens(2))
    assert sorted(holder.state_dict()) == ["layer.bias", "layer.weight"]
    assert sum(1 for _ in holder.metrics.parameters()) == 0
    Holder().load_state_dict(holder.state_dict(), strict=True)


def test_batches_in_and_out_of_inference_mode_add_up():
    images, tokens = pictures(4), random_tokens(4)
    metrics, whole = new(lpips=True), new(lpips=True)
    with torch.inference_mode():
        update(metrics, images[:1], noisy(images)[:1], tokens[:1])
    update(metrics, images[1:], noisy(images)[1:], tokens[1:])
    update(whole, images, noisy(images), tokens)
    assert metrics.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_networks_are_built_once():
    update(new(lpips=True, rfid=True), pictures(1), pictures(1), random_tokens(1))
    before = inception._extractor.cache_info().misses
    update(new(lpips=True, rfid=True), pictures(1), pictures(1), random_tokens(1))
    assert inception._extractor.cache_info().misses == before
    state = torch.get_rng_state()
    inception._extractor.cache_clear()
    inception._extractor(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_input_is_told():
    with pytest.raises(UserError, match="tokens from 3 to 256"):
        update(new(), pictures(1), pictures(1), torch.tensor([3, 256]).reshape(1, 1, 1, 2))


def test_a_codebook_too_large_for_a_histogram_is_told():
    metrics = new(codebook_size=2**32, per_position=1)
    update(metrics, pictures(1), pictures(1), random_tokens(1, 2**32, per_position=1))
    result = metrics.compute()
    assert result["bits_per_pixel"] == pytest.approx(0.5)
    assert "codebook_usage" not in result
    assert "codewords" in metrics.protocol()["codebook_note"]
    assert collapse(result) is None, "what is not known does not warn"


def test_autocast_of_the_training_changes_no_metric():
    images, tokens = pictures(2), random_tokens(2)
    plain, mixed = new(posterior=True, lpips=True), new(posterior=True, lpips=True)
    update(plain, images, noisy(images), tokens, noisy(images, 0.05))
    with torch.autocast("cpu", torch.bfloat16):
        update(mixed, images, noisy(images), tokens, noisy(images, 0.05))
    assert mixed.compute() == plain.compute()


def test_what_is_computed_is_what_is_announced(cheap_rfid):
    images, tokens = pictures(2), random_tokens(2)
    metrics = new(posterior=True, lpips=True, rfid=True)
    update(metrics, images, noisy(images), tokens, noisy(images, 0.05), torch.full(tokens.shape, 8.0))
    assert metrics.compute().keys() == numbers().keys()
    for name, value in metrics.compute().items():
        assert numbers()[name].show(float(value)), "a mean over seeds is a float"


def measure(parts):
    """The metrics of five images in the given batches, and how they were measured."""
    images, tokens = pictures(5), random_tokens(5)
    bits = 8 + torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    metrics = new(posterior=True, lpips=True, rfid=True)
    for part in (slice(*part) for part in parts):
        update(metrics, images[part], noisy(images, 0.2)[part], tokens[part], noisy(images, 0.1)[part], bits[part])
    return metrics.compute(), metrics.protocol()


def one_of_two(folder, rank, ranks):
    inception.inception_features = cheap_features
    Path(folder, f"{rank}.json").write_text(json.dumps(measure([[(0, 3)], [(3, 4), (4, 5)]][rank])))


@pytest.mark.slow  # tests/test_distributed.py evaluates on two ranks too
def test_two_processes_with_uneven_batches_give_what_one_gives(tmp_path, cheap_rfid):
    on_ranks(__file__, "one_of_two", tmp_path, 2)
    expected, protocol = measure([(0, 5)])
    for rank in range(2):
        result, said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == pytest.approx(expected, rel=1e-5)
        assert said == protocol
