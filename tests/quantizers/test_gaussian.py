import copy
import hashlib
import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.quasirandom import SobolEngine

from gq_lightning import UserError
from gq_lightning.construction import build, describe
from gq_lightning.quantizers import GaussianQuantizer, Quantizer

LAYOUTS = ("contiguous", "strided")


def features(*shape: int, channels: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*shape, channels, generator=generator)
    return torch.cat([mean, torch.randn(*shape, channels, generator=generator) * 0.3 - 2], dim=-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bits", "tokens", "group"), [(16, 1, 16), (32, 2, 8), (64, 4, 4)])
def test_geometry_follows_from_the_rate(bits: int, tokens: int, group: int, layout: str) -> None:
    quantizer = GaussianQuantizer(bits_per_position=bits, latent_channels=16, layout=layout)  # type: ignore[arg-type]
    assert (quantizer.tokens_per_position, quantizer.group_size, quantizer.bits_per_position) == (tokens, group, bits)
    assert (quantizer.encoder_channels, quantizer.latent_channels, quantizer.codebook_size) == (32, 16, 65536)
    x = features(2, 3)
    found = quantizer.tokenize(x)
    assert found.shape == (2, 3, tokens)
    assert found.dtype == torch.int64
    assert quantizer.detokenize(found).shape == (2, 3, 16)
    assert quantizer(x).latents.shape == (2, 3, 16)
    assert quantizer.posterior(x).bits.shape == (2, 3, tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_round_trip_of_codewords(bits: int, layout: str) -> None:
    """A posterior that is narrow around a codeword becomes that codeword's token, so detokenize and tokenize are inverse."""
    quantizer = GaussianQuantizer(bits, codebook_size=256, layout=layout)  # type: ignore[arg-type]
    tokens = torch.randint(256, (5, 4, quantizer.tokens_per_position), generator=torch.Generator().manual_seed(bits))
    mean = quantizer.detokenize(tokens)
    assert torch.equal(quantizer.tokenize(torch.cat([mean, torch.full_like(mean, -7.0)], dim=-1)), tokens)


def test_layouts_name_the_channels_of_a_group() -> None:
    channels = torch.arange(8)
    contiguous = GaussianQuantizer(32, latent_channels=8, codebook_size=256)
    strided = GaussianQuantizer(32, latent_channels=8, codebook_size=256, layout="strided")
    assert contiguous.group(channels).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert strided.group(channels).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    for quantizer in (contiguous, strided):
        assert torch.equal(quantizer.ungroup(quantizer.group(channels)), channels)


@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
def test_tokens_are_the_best_codewords_one_by_one(prior_weight: float) -> None:
    quantizer = GaussianQuantizer(
        32, latent_channels=4, codebook_size=256, layout="strided", prior_weight=prior_weight, initial_log_variance=0.0
    )
    x = features(3, channels=4)
    mean, std = x[:, :4].double(), (x[:, 4:].double() / 2).exp()
    for i, tokens in enumerate(quantizer.tokenize(x)):
        for g, token in enumerate(tokens.tolist()):
            score = Normal(mean[i, g::4], std[i, g::4]).log_prob(quantizer.codewords.double())
            score = score - prior_weight * Normal(torch.zeros(1).double(), 1.0).log_prob(quantizer.codewords.double())
            assert token == int(score.sum(1).argmax())


def test_penalty_is_the_divergence_per_image() -> None:
    quantizer = GaussianQuantizer(32, latent_channels=16, penalty_weight=0.25, initial_log_variance=0.0)
    x = features(3, 5, 5)
    result = quantizer(x)
    mean, std = x[..., :16], (x[..., 16:] / 2).exp()
    nats = kl_divergence(Normal(mean, std), Normal(torch.zeros(()), torch.ones(()))).sum() / 3
    torch.testing.assert_close(result.penalty, 0.25 * nats / math.log(2))
    torch.testing.assert_close(result.posterior.bits.sum() / 3, nats / math.log(2))


def test_forward_samples_the_posterior_in_train_and_eval_alike() -> None:
    quantizer = GaussianQuantizer(16, latent_channels=16, initial_log_variance=0.0)
    x = features(1).expand(20_000, 32)
    for mode in (True, False):
        latents = quantizer.train(mode)(x).latents
        torch.testing.assert_close(latents.mean(0), x[0, :16], atol=0.02, rtol=0)
        torch.testing.assert_close(latents.std(0), (x[0, 16:] / 2).exp(), atol=0.02, rtol=0)


def test_gradients_reach_means_and_variances() -> None:
    quantizer = GaussianQuantizer(16, latent_channels=16)
    x = features(4).requires_grad_()
    result = quantizer(x)
    (result.latents.square().sum() + result.penalty).backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


def test_half_precision_features_are_taken_in_float32() -> None:
    quantizer = GaussianQuantizer(16, latent_channels=16)
    x = features(64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, tokens = quantizer(x), quantizer.tokenize(x)
    assert result.latents.dtype == result.penalty.dtype == torch.float32
    assert torch.equal(tokens, quantizer.tokenize(x.float()))


def test_codebook_stays_float32_under_conversion() -> None:
    quantizer = GaussianQuantizer(16, latent_channels=16)
    assert torch.equal(quantizer.to(torch.bfloat16).codewords, GaussianQuantizer(16, latent_channels=16).codewords)


def test_wide_posteriors_are_guarded() -> None:
    x = torch.zeros(1, 32)
    x[:, 16:] = 3.0  # variance 20: the codebook knows nothing there, and the mean is 0
    guarded, published = GaussianQuantizer(16, latent_channels=16), GaussianQuantizer(16, latent_channels=16, clamp_variance=False)
    longest = guarded.codewords.square().sum(1).argmax()
    assert published.tokenize(x).item() == longest
    assert guarded.tokenize(x).item() != longest


def test_a_posterior_begins_near_its_target() -> None:
    """Features of zero cost nothing at log-variance 0; a given start is as if the encoder had given it."""
    x = torch.zeros(1, 6)
    plain, shifted = (GaussianQuantizer(16, latent_channels=3, initial_log_variance=start) for start in (0.0, -8.0))
    assert plain.posterior(x).bits.item() == 0
    assert shifted.posterior(x).bits.item() == pytest.approx(3 * (math.exp(-8) + 7) / (2 * math.log(2)))
    given = features(5, 4, channels=3)
    assert torch.equal(shifted.tokenize(given), plain.tokenize(given + torch.tensor([0.0, 0, 0, -8, -8, -8])))


@pytest.mark.parametrize(("bits", "size", "width"), [(16, 65536, 8), (64, 65536, 32), (16, 256, 8), (4, 2, 4), (30, 1000, 15)])
def test_width_where_none_is_given(bits: int, size: int, width: int) -> None:
    quantizer = GaussianQuantizer(bits, codebook_size=size)
    assert quantizer.latent_channels == quantizer.init_args["latent_channels"] == width


@pytest.mark.parametrize(("bits", "channels", "start"), [(16, 16, -1.386294), (16, 8, -2.772589), (64, 16, -5.545177)])
def test_the_start_is_derived_from_the_rate_and_remembered(bits: int, channels: int, start: float) -> None:
    quantizer = GaussianQuantizer(bits, latent_channels=channels)
    assert quantizer.initial_log_variance == pytest.approx(start, abs=1e-6)
    assert quantizer.init_args["initial_log_variance"] == quantizer.initial_log_variance


def test_codebook_sizes_that_are_no_power_of_two_aim_at_their_real_bits() -> None:
    quantizer = GaussianQuantizer(32, codebook_size=64_000)
    assert quantizer.tdc.target_bits == pytest.approx(math.log2(64_000))
    assert quantizer.bits_per_position == pytest.approx(2 * math.log2(64_000))


def test_state_carries_the_codebooks_fingerprint() -> None:
    one = GaussianQuantizer(8, latent_channels=2, codebook_size=256, seed=1)
    state = copy.deepcopy(one.state_dict())
    assert sum(value.numel() for value in state.values()) < 100, "the codebook itself is not stored"
    GaussianQuantizer(8, latent_channels=2, codebook_size=256, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="another codebook"):
        GaussianQuantizer(8, latent_channels=2, codebook_size=256, seed=2).load_state_dict(state)


def test_a_sobol_codebook_of_float64_points_is_refused_with_the_reason() -> None:
    """What versions saved that drew the points in float64."""
    arguments: dict[str, Any] = {"bits_per_position": 16, "latent_channels": 4, "codebook_size": 256, "codebook": "sobol"}
    points = SobolEngine(2, scramble=True, seed=42).draw(256, dtype=torch.float64)
    earlier = torch.special.ndtri(points).float().numpy().astype("<f4")
    digest = hashlib.sha256(repr(earlier.shape).encode() + earlier.tobytes()).digest()
    quantizer = GaussianQuantizer(**arguments)
    state = quantizer.state_dict() | {"codebook_fingerprint": torch.tensor(list(digest), dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"drew Sobol points in float64.*convert or import the VAE again"):
        quantizer.load_state_dict(state)
    for other in ({"seed": 1}, {"codebook": "iid"}):
        with pytest.raises(UserError, match="another codebook"):
            GaussianQuantizer(**arguments | other).load_state_dict(state)


def test_describes_and_rebuilds_itself() -> None:
    quantizer = GaussianQuantizer(32, latent_channels=8, codebook_size=256, codebook="sobol", prior_weight=0.5, layout="strided")
    description = describe(quantizer)
    assert description["class_path"] == "gq_lightning.quantizers.GaussianQuantizer"
    again = build(Quantizer, description, "here")
    assert isinstance(again, GaussianQuantizer)
    assert describe(again) == description
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.tokenize(features(7, channels=8)), quantizer.tokenize(features(7, channels=8)))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits_per_position": 17}, "bits_per_position"),
        ({"bits_per_position": 16, "codebook_size": 32768}, "bits_per_position"),
        ({"bits_per_position": 48, "latent_channels": 16}, "latent_channels"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"layout": "zigzag"}, "layout"),
        ({"codebook": "uniform"}, "codebook"),
        ({"prior_weight": 2.0}, "prior_weight"),
    ],
)
def test_bad_arguments_name_the_field(arguments: dict, field: str) -> None:
    with pytest.raises(UserError, match=field):
        GaussianQuantizer(**arguments)


@pytest.mark.parametrize(
    "tokens", [torch.tensor([[256]]), torch.tensor([[-1]]), torch.tensor([[0, 0]]), torch.tensor([[0.0]]), torch.tensor(3)]
)
def test_bad_tokens(tokens: torch.Tensor) -> None:
    with pytest.raises(UserError, match="tokens"):
        GaussianQuantizer(8, latent_channels=2, codebook_size=256).detokenize(tokens)


def test_bad_features() -> None:
    quantizer = GaussianQuantizer(8, latent_channels=2, codebook_size=256)
    with pytest.raises(UserError, match="4 channels"):
        quantizer.tokenize(torch.zeros(3, 5))
    with pytest.raises(UserError, match="finite"):
        quantizer.tokenize(torch.full((1, 4), float("nan")))


def test_an_order_renames_tokens_and_changes_nothing_else() -> None:
    arguments: dict[str, Any] = {"bits_per_position": 16, "latent_channels": 8, "codebook_size": 256}
    drawn, tree = GaussianQuantizer(**arguments), GaussianQuantizer(**arguments, order="tree")
    x = features(50, channels=8)
    assert not torch.equal(drawn.tokenize(x), tree.tokenize(x))
    assert torch.equal(drawn.detokenize(drawn.tokenize(x)), tree.detokenize(tree.tokenize(x)))
    assert "order" not in drawn.identity()["init_args"] and tree.identity() != drawn.identity()
    with pytest.raises(UserError, match=r"another codebook.*as a tree"):
        tree.load_state_dict(drawn.state_dict())
