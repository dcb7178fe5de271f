import math

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Normal, kl_divergence

from bounds import deviation_lower_bound, deviation_probability, deviation_upper_bound
from gq_lightning.metrics.codebook import expected_usage
from gq_lightning.quantizers.gaussian import kl_bits


def test_kl_bits_agrees_with_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    log_variance = 4 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, torch.exp(log_variance / 2)), Normal(0.0, 1.0)) / math.log(2)
    torch.testing.assert_close(kl_bits(mean, log_variance), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl_bits(mean.float(), log_variance.float()), expected.float(), rtol=1e-5, atol=1e-5)


def test_kl_bits_by_hand():
    # mean 1, variance 1: mu^2 / 2 nats
    assert kl_bits(torch.tensor(1.0), torch.tensor(0.0)).item() == pytest.approx(0.5 / math.log(2), rel=1e-6)
    # mean 0, variance 1/4: (1/4 - 1 + ln 4) / 2 nats
    expected = (0.25 - 1 + math.log(4)) / (2 * math.log(2))
    assert kl_bits(torch.tensor(0.0), torch.tensor(-math.log(4))).item() == pytest.approx(expected, rel=1e-6)


def test_kl_bits_is_zero_only_at_the_prior_and_accurate_beside_it():
    assert kl_bits(torch.zeros(1), torch.zeros(1)).item() == 0
    # variance e^x: x^2 / 4 nats to second order, which plain float32 arithmetic would lose
    assert kl_bits(torch.zeros(()), torch.tensor(1e-2)).item() == pytest.approx((math.expm1(1e-2) - 1e-2) / (2 * math.log(2)), rel=1e-4)
    assert (kl_bits(1e-3 * torch.randn(1000), 1e-3 * torch.randn(1000)) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_bits_is_computed_in_float32_for_half_precision(dtype):
    mean, log_variance = torch.tensor([200.0], dtype=dtype), torch.tensor([-3.0], dtype=dtype)
    bits = kl_bits(mean, log_variance)
    assert bits.dtype == torch.float32
    torch.testing.assert_close(bits, kl_bits(mean.float(), log_variance.float()))


def test_expected_usage_by_hand_and_by_drawing():
    assert expected_usage(2, 1) == pytest.approx(0.5)
    assert expected_usage(2, 3) == pytest.approx(7 / 8)
    assert expected_usage(10, 0) == 0
    assert expected_usage(1, 5) == 1
    tokens = torch.randint(0, 1000, (200, 1500), generator=torch.Generator().manual_seed(0))
    drawn = sum(len(row.unique()) for row in tokens) / len(tokens) / 1000
    assert expected_usage(1000, 1500) == pytest.approx(drawn, abs=2e-3)


def test_upper_bound_by_hand():
    # t = 0, c1 = 0: exp(-sqrt(2 / (pi e)))
    assert deviation_upper_bound(0.0, 0.0).item() == pytest.approx(math.exp(-math.sqrt(2 / (math.pi * math.e))), rel=1e-12)
    t = torch.tensor([1.0, 8.62, 12.0])
    expected = [math.exp(-math.exp(x) * math.sqrt(2 / math.pi) * math.exp(-8.12 - 0.5)) for x in t.tolist()]
    bound = deviation_upper_bound(t, 8.12)
    assert bound.dtype == torch.float64
    assert bound.tolist() == pytest.approx(expected, rel=1e-12)


def test_lower_bound_by_hand():
    # t = 0, c2 = 1: 1 - sqrt(2 / pi)
    assert deviation_lower_bound(0.0, 1.0).item() == pytest.approx(1 - math.sqrt(2 / math.pi), rel=1e-12)
    t = torch.tensor([0.5, 4.0, 10.0])
    expected = [1 - math.exp(-x) * math.sqrt(2 / math.pi) * math.exp(1.5**2 / 2 - 0.5) for x in t.tolist()]
    assert deviation_lower_bound(t, 1.5).tolist() == pytest.approx(expected, rel=1e-12)


def test_bounds_hold_for_random_codebooks():
    """Nearest codeword to one mean: the measured share of deviations of at least one sigma stays within the two bounds."""
    generator = torch.Generator().manual_seed(0)
    mean, sigma = 0.8, 0.05
    nats = kl_bits(torch.tensor(mean), torch.tensor(2 * math.log(sigma))).item() * math.log(2)
    for size in (2, 4, 8, 64, 128, 256):
        codebooks = torch.randn(20000, size, generator=generator)
        share = ((codebooks - mean).abs().amin(dim=1) >= sigma).double().mean().item()
        t = math.log(size) - nats
        if t >= 0:
            assert share <= deviation_upper_bound(t, mean * sigma).item() + 0.01
        else:
            assert share >= deviation_lower_bound(-t, mean + sigma).item() - 0.01


@pytest.mark.parametrize("mean", [0.0, -0.7, 3.0, 8.0])
@pytest.mark.parametrize("sigma", [1e-9, 1e-3, 0.1, 0.5, 1.0, 3.0])
def test_deviation_probability_is_that_of_the_density(mean, sigma):
    inside = quad(lambda x: sigma * math.exp(-((mean + sigma * x) ** 2) / 2) / math.sqrt(2 * math.pi), -1, 1, epsabs=0, epsrel=1e-12)[0]
    for size in (1, 100, 1e11):
        expected = size * math.log1p(-inside)
        assert deviation_probability(mean, sigma, size, log=True).item() == pytest.approx(expected, rel=1e-9)
        assert deviation_probability(mean, sigma, size).item() == pytest.approx(math.exp(expected), rel=1e-9)


def test_deviation_probability_at_the_ends():
    assert deviation_probability(1.0, 0.0, 10).item() == 1
    assert deviation_probability(1.0, math.inf, 10).item() == 0
    # the tails: 1 - p = 2 Phi(-20), of which 1 - p computed plainly leaves nothing
    assert deviation_probability(0.0, 20.0, 2, log=True).item() == pytest.approx(2 * (math.log(2) - 203.917155), abs=1e-5)
    # the probability underflows, its logarithm does not
    assert deviation_probability(0.7, 1e-3, 1e9).item() == 0
    assert deviation_probability(0.7, 1e-3, 1e9, log=True).item() == pytest.approx(-624714.5, rel=1e-3)


def test_deviation_probability_falls_with_the_codebook_and_with_sigma_and_rises_with_the_mean():
    sizes, sigmas, means = 2.0 ** torch.arange(0, 40), 2.0 ** torch.linspace(-20, 2, 200), torch.linspace(0, 8, 200)
    assert (deviation_probability(0.7, 1e-3, sizes, log=True).diff() < 0).all()
    # the two ways of computing it meet without a step
    assert (deviation_probability(0.7, sigmas, 100, log=True).diff() < 0).all()
    assert (deviation_probability(means, 0.4, 100, log=True).diff() > 0).all()
    assert torch.equal(deviation_probability(-means, 0.4, 100), deviation_probability(means, 0.4, 100))
    assert deviation_probability(means[:, None], sigmas, torch.tensor(10.0)).shape == (200, 200)


def grid(size):
    """(mean, sigma, t) of posteriors with means of 0 to 4 and sigmas of 1e-6 to 1, for log K = R + t."""
    mean, sigma = torch.meshgrid(torch.linspace(0, 4, 41).double(), torch.logspace(-6, 0, 61).double(), indexing="ij")
    return mean, sigma, math.log(size) - kl_bits(mean, 2 * sigma.log()) * math.log(2)


@pytest.mark.parametrize("size", [1, 2, 16, 2**10, 2**16, 2**30])
def test_deviation_probability_is_between_the_bounds(size):
    mean, sigma, t = grid(size)
    exact = deviation_probability(mean, sigma, size)
    for c1 in (8.12, 0.5):
        assert (exact <= deviation_upper_bound(t, c1) * (1 + 1e-12))[mean * sigma <= c1].all()
    for c2 in (1.5, 0.3):
        assert (exact >= deviation_lower_bound(-t, c2) - 1e-12)[mean + sigma <= c2].all()
    # both hold for every posterior with c1 = 0 and with c2^2 = sigma^2 (1 + mu^2)
    assert (exact <= deviation_upper_bound(t, 0.0) * (1 + 1e-9)).all()
    c2 = sigma * (1 + mean.square()).sqrt()
    lower = torch.stack([deviation_lower_bound(-at, float(c)) for at, c in zip(t.flatten(), c2.flatten(), strict=True)]).reshape(t.shape)
    assert (exact >= lower - 1e-12).all()


def test_the_lower_bound_needs_its_condition():
    mean, sigma, t = grid(4)
    beyond = deviation_probability(mean, sigma, 4) < deviation_lower_bound(-t, 1.5)
    assert beyond.any()
    assert ((mean + sigma)[beyond] > 1.5).all()
