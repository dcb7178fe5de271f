import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.stats
import torch
from small import small_training

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.callbacks import TDC, GaussianQuant
from gq_lightning.callbacks.gaussian_quant import convert
from gq_lightning.construction import build, describe
from gq_lightning.quantizers import GaussianQuantizer, Quantizer
from gq_lightning.quantizers.base import PosteriorQuantizer
from gq_lightning.quantizers.tokenbridge import TokenBridge

RATES = [(16, 1), (32, 2), (64, 4)]


def features(*shape: int, channels: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*shape, channels, generator=generator)
    return torch.cat([mean, torch.randn(*shape, channels, generator=generator) - 2], dim=-1)


def values(quantizer: TokenBridge) -> torch.Tensor:
    """(K,), by detokenising every token."""
    tokens = torch.arange(quantizer.codebook_size)[:, None].expand(-1, quantizer.tokens_per_position)
    return quantizer.detokenize(tokens)[:, 0]


@pytest.mark.parametrize(("bits", "each"), RATES)
def test_geometry_follows_from_the_rate(bits: int, each: int) -> None:
    quantizer = TokenBridge(bits)
    assert (quantizer.tokens_per_position, quantizer.codebook_size, quantizer.bits_per_position) == (16, 2**each, bits)
    assert (quantizer.encoder_channels, quantizer.latent_channels) == (32, 16)
    assert quantizer.tdc.target_bits == each
    x = features(2, 3)
    tokens = quantizer.tokenize(x)
    assert (tokens.shape, tokens.dtype) == ((2, 3, 16), torch.int64)
    assert quantizer.detokenize(tokens).shape == quantizer(x).latents.shape == quantizer.posterior(x).mean.shape == (2, 3, 16)
    assert quantizer.posterior(x).bits.shape == (2, 3, 16), "the divergence of each dimension"


@pytest.mark.parametrize(("bits", "each"), RATES)
def test_bins_have_equal_probability(bits: int, each: int) -> None:
    found = values(TokenBridge(bits)).double().numpy()
    draws = np.random.default_rng(0).standard_normal(200_000)
    edges = scipy.stats.norm.ppf(np.linspace(0, 1, 2**each + 1))
    shares = np.histogram(draws, edges)[0] / len(draws)
    np.testing.assert_allclose(shares * 2**each, 1, atol=0.04)
    inside = np.digitize(draws, edges) - 1
    below = [(draws[inside == index] < value).mean() for index, value in enumerate(found)]
    np.testing.assert_allclose(below, 0.5, atol=0.02)
    # the cells of nearest values are bounded by midpoints, not by those edges: the tails get up to a seventh less
    mean = torch.from_numpy(draws[:160_000]).float().view(-1, 16)
    tokens = TokenBridge(bits).tokenize(torch.cat([mean, torch.full_like(mean, -4.0)], dim=1))
    used = tokens.flatten().bincount(minlength=2**each) / tokens.numel() * 2**each
    assert used.min() > 0.85
    assert used.max() < 1.1


@pytest.mark.parametrize("bits", [16, 32, 64, 128])
def test_tokens_are_the_nearest_values_whatever_the_variance(bits: int) -> None:
    quantizer = TokenBridge(bits)
    x = features(50, 7) * torch.tensor([2.0, 6.0]).repeat_interleave(16)
    distance = (x[..., :16, None].double() - values(quantizer).double()).abs()
    assert torch.equal(quantizer.tokenize(x), distance.argmin(-1))
    assert torch.equal(quantizer.tokenize(x.bfloat16()), quantizer.tokenize(x.bfloat16().float()))


@pytest.mark.parametrize("bits", [16, 32, 64, 256])
def test_round_trip_of_values(bits: int) -> None:
    quantizer = TokenBridge(bits)
    tokens = torch.randint(quantizer.codebook_size, (5, 4, 16), generator=torch.Generator().manual_seed(bits))
    mean = quantizer.detokenize(tokens)
    assert torch.equal(quantizer.tokenize(torch.cat([mean, features(5, 4)[..., 16:]], dim=-1)), tokens)


def test_training_is_that_of_the_gaussian_vae() -> None:
    """Without TDC, the same relaxation as the Gaussian VAE that GQ starts from."""
    x = features(3, 5)
    results = []
    for quantizer in (TokenBridge(32, penalty_weight=0.3), GaussianQuantizer(32, penalty_weight=0.3)):
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        result = quantizer(inputs)
        (result.latents.square().sum() + result.penalty).backward()
        results.append((result.latents, result.penalty, inputs.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_the_hook_attaches_it_to_a_model_of_gaussian_quant(backbone: str, tmp_path: Path) -> None:
    training = small_training(backbone)
    tokenizer = training.tokenizer
    for parameter in tokenizer.backbone.parameters():
        parameter.data.add_(0.01)  # not what another seed's initialisation gives
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gaussian = tokenizer.eval().reconstruct(images).gaussian
    GaussianQuant(quantizer=TokenBridge(16, latent_channels=4)).on_fit_end(SimpleNamespace(fast_dev_run=False), training)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in tokenizer.backbone.encoder.parameters())
    result = tokenizer.reconstruct(images)
    assert gaussian is not None
    assert result.gaussian is not None
    assert torch.equal(result.gaussian, gaussian), "the Gaussian VAE is the one that was trained"
    assert result.tokens.shape == (3, 4, 4, 4)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["codebook"]["recipe"] == "quantile codebook of 16 x 1"
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(images), result.tokens)
    assert torch.equal(again.decode(result.tokens), result.images)
    config["tokenizer"]["init_args"]["quantizer"]["init_args"]["bits_per_position"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another codebook"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "trained",
    [
        GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True),
        GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True, layout="strided"),
        GaussianQuantizer(16, latent_channels=4, codebook_size=256, initial_log_variance=-1.0),
    ],
    ids=["exact", "exact, strided", "another start"],
)
@pytest.mark.parametrize(
    "attached",
    [TokenBridge(32, latent_channels=4), GaussianQuantizer(16, latent_channels=4, codebook_size=16, codebook="sobol")],
    ids=["tokenbridge", "codebook"],
)
def test_what_is_attached_works_on_the_posteriors_of_the_training(
    trained: GaussianQuantizer, attached: PosteriorQuantizer, tmp_path: Path
) -> None:
    tokenizer = small_training("vit", trained).tokenizer.eval()
    tokenizer.backbone.encoder.linear_out.weight.data.mul_(30)  # type: ignore[union-attr, operator]
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = tokenizer.backbone.encode(images).movedim(1, -1)
    posterior, before = trained.posterior(features), tokenizer.reconstruct(images)
    convert(tokenizer, attached)
    found, result = tokenizer.quantizer.posterior(features), tokenizer.reconstruct(images)  # type: ignore[operator]
    assert torch.equal(found.mean, posterior.mean) and torch.equal(found.log_variance, posterior.log_variance)
    assert torch.equal(result.gaussian, before.gaussian)  # type: ignore[arg-type]
    assert result.bits is not None and before.bits is not None
    torch.testing.assert_close(result.bits.sum(-1), before.bits.sum(-1))
    if trained.tdc is None:
        torch.testing.assert_close(result.bits.sum(-1), torch.full((3, 4, 4), 16.0), rtol=1e-4, atol=1e-4)
    if isinstance(attached, TokenBridge):
        distance = (posterior.mean[..., None] - values(attached)).abs()
        assert torch.equal(result.tokens, distance.argmin(-1))
        assert not torch.equal(attached.posterior(features).bits, result.bits), "on its own it would see other posteriors"
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.reconstruct(images).bits, result.bits)  # type: ignore[arg-type]


def test_how_the_vae_was_trained_has_no_part_in_the_identity() -> None:
    first, other = (GaussianQuantizer(16, latent_channels=4, codebook_size=256, penalty_weight=weight) for weight in (0.1, 0.2))
    assert TokenBridge(32, 4, vae=first).identity() == TokenBridge(32, 4, vae=other).identity()
    assert TokenBridge(32, 4, vae=first).identity() != TokenBridge(32, 4).identity()


def test_the_same_posteriors_need_no_memory_of_the_training() -> None:
    trained = GaussianQuantizer(16, latent_channels=4, codebook_size=256)
    tokenizer = small_training("vit", trained).tokenizer
    convert(tokenizer, another := GaussianQuantizer(16, latent_channels=4, codebook_size=256, seed=1))
    assert tokenizer.quantizer is another
    assert not [name for name in tokenizer.state_dict() if ".vae." in name]


def test_the_callback_moves_its_multipliers() -> None:
    training = small_training("vit", quantizer := TokenBridge(8, latent_channels=4))
    callback, trainer = TDC(), SimpleNamespace(global_step=0, log_every_n_steps=1)
    training.log_dict, training.all_gather = Mock(), Mock(side_effect=lambda local: local)  # type: ignore[method-assign]
    callback.on_train_start(trainer, training)  # type: ignore[arg-type]
    x = torch.zeros(1, 8)
    # one dimension of 6.5 bits, three of none: a mean of 1.6 bits where the target is 2
    x[:, 0], x[:, 4:] = 3.0, -quantizer.gaussian.initial_log_variance
    trainer.global_step = 1
    result = quantizer(x)
    callback.on_train_batch_end(trainer, training, {"posterior": result.posterior}, x, 0)  # type: ignore[arg-type]
    moved = {name: value.item() for name, value in training.state_dict().items() if "lambda" in name}
    prefix = "tokenizer.quantizer.gaussian.tdc.lambda_"
    assert moved == pytest.approx({f"{prefix}min": 1 / 1.01, f"{prefix}mean": 1 / 1.01, f"{prefix}max": 1.01})
    again = quantizer(x).penalty
    torch.testing.assert_close(again, 1.01 * result.penalty)


def test_describes_and_rebuilds_itself() -> None:
    quantizer = TokenBridge(32, latent_channels=8, tdc_alpha=0.25, tdc_beta=1.1, tdc_variant="reference", penalty_weight=0.2)
    again = build(Quantizer, describe(quantizer), "here")  # type: ignore[type-abstract]
    assert isinstance(again, TokenBridge)
    assert describe(again) == describe(quantizer)
    again.load_state_dict(quantizer.state_dict())
    assert (again.tdc.alpha, again.tdc.beta, again.tdc.variant, again.gaussian.penalty_weight) == (0.25, 1.1, "reference", 0.2)
    with pytest.raises(UserError, match="another codebook"):
        TokenBridge(16, latent_channels=8).load_state_dict(quantizer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits_per_position": 24}, ["bits_per_position", "use 32"]),
        ({"bits_per_position": 8}, ["bits_per_position", "use 16"]),
        ({"bits_per_position": 0}, ["bits_per_position", "use 16"]),
        ({"bits_per_position": 512}, ["bits_per_position", "use 256"]),
        ({"bits_per_position": 16, "latent_channels": 3}, ["bits_per_position", "use 15", "latent_channels"]),
        ({"latent_channels": 0}, ["latent_channels"]),
        ({"tdc_variant": "other"}, ["variant"]),
        ({"tdc_alpha": -1.0}, ["alpha"]),
    ],
)
def test_bad_arguments_name_the_field_and_the_fix(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        TokenBridge(**arguments)
    for word in words:
        assert word in str(error.value)


def test_bad_inputs() -> None:
    quantizer = TokenBridge(8, latent_channels=4)
    with pytest.raises(UserError, match="8 channels"):
        quantizer.tokenize(torch.zeros(3, 5))
    for tokens in (torch.tensor([[0, 0, 0, 4]]), torch.tensor([[-1, 0, 0, 0]]), torch.tensor([[0, 0]]), torch.zeros(1, 4)):
        with pytest.raises(UserError, match="tokens"):
            quantizer.detokenize(tokens)
