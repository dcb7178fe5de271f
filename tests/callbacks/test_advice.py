from types import SimpleNamespace

import pytest
import torch
from small import small_training

from gq_lightning import UserError
from gq_lightning.callbacks import Advice
from gq_lightning.quantizers import FiniteScalarQuantizer, GaussianQuantizer
from gq_lightning.quantizers.tdc import Variant

PATIENCE, EVERY = 100, 10


def run(bits: dict[int, float], steps: int = 300, *, variant: Variant = "paper", dimensions=(2.0, 2.0), **multipliers: float):  # type: ignore[no-untyped-def]
    """The warnings of a training whose tokens cost, from each step named on, so many bits (8 are the target)."""
    training = small_training("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=256, tdc_variant=variant))
    training.step_complete = True
    for name, value in multipliers.items():
        getattr(training.tokenizer.quantizer.tdc, name).fill_(value)
    advice = Advice(PATIENCE)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=EVERY, is_global_zero=True)
    advice.on_train_start(trainer, training)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        trainer.global_step = step
        value = next(value for since, value in sorted(bits.items(), reverse=True) if since <= step)
        outputs = {"posterior": SimpleNamespace(bits=torch.full((2, 4, 4, 2), value), dimension_bits=torch.tensor(dimensions))}
        advice.on_train_batch_end(trainer, training, outputs, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "cure"), [(5.0, "lower"), (11.0, "raise")])
def test_target_out_of_reach(bits: float, cure: str) -> None:
    with pytest.warns(UserWarning, match=f"for 100 steps tokens cost {bits:.1f} bits on average, but the target is 8 ± 0.5") as said:
        run({0: bits})
    assert len(said) == 1, "once"
    assert f"{cure} model.quantizer.init_args.penalty_weight" in str(said[0].message)


def test_target_reached_in_time() -> None:
    run({0: 5.0, 95: 7.8})


def test_patience_begins_anew() -> None:
    run({0: 5.0, 95: 8.0, 150: 5.0}, steps=240)
    with pytest.warns(UserWarning, match="tokens cost 5.0 bits"):
        run({0: 5.0, 95: 8.0, 150: 5.0}, steps=250)


def test_fixed_multipliers_have_no_target() -> None:
    run({0: 5.0}, variant="fixed")


@pytest.mark.parametrize(
    ("name", "value", "bits", "says"),
    [("lambda_min", 1e-3, 7.4, "below 8 ± 0.5 bits: train longer"), ("lambda_max", 1e3, 8.5001, "above 8 ± 0.5 bits: raise")],
)
def test_multiplier_at_its_bound(name: str, value: float, bits: float, says: str) -> None:
    with pytest.warns(UserWarning) as said:
        run({0: bits}, **{name: value})
    texts = [str(warning.message) for warning in said if name in str(warning.message)]
    assert len(texts) == 1 and f"{name} is at its bound, {value:g}, and 100% of the tokens are still {says}" in texts[0]


def test_a_multiplier_at_its_bound_is_no_matter_where_tokens_are_within() -> None:
    run({0: 8.2}, lambda_min=1e-3, lambda_max=1e-3)


def test_dead_dimensions() -> None:
    with pytest.warns(UserWarning, match=r"2 of 4 latent dimensions \(1, 3\) have carried almost no bits for 100 steps"):
        run({0: 8.0}, dimensions=(4.0, 0.01, 4.0, 0.0))
    run({0: 8.0}, dimensions=(4.0, 0.1, 4.0, 0.1))


def test_dimension_bits_are_what_the_tokens_cost() -> None:
    quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=256, initial_log_variance=0.0)
    features = torch.randn(3, 5, 5, 8)
    features[..., 2], features[..., 6] = 0, 0  # the prior itself
    diagnostics = quantizer.posterior(features)
    assert diagnostics.dimension_bits[2] == 0
    torch.testing.assert_close(diagnostics.dimension_bits.sum(), diagnostics.bits.sum(-1).mean())


def test_other_quantizers_and_ranks_have_nothing_to_say() -> None:
    training = small_training("vit", FiniteScalarQuantizer(16, levels=[16, 16, 16, 16]))
    trainer = SimpleNamespace(global_step=EVERY, log_every_n_steps=EVERY, is_global_zero=True)
    training.step_complete = True
    Advice(1).on_train_batch_end(trainer, training, {"posterior": None}, None, 0)  # type: ignore[arg-type]
    trainer.is_global_zero = False
    Advice(1).on_train_batch_end(trainer, training, {}, None, 0)  # type: ignore[arg-type]


def test_bad_patience() -> None:
    with pytest.raises(UserError, match=r"advice.patience 0"):
        Advice(0)
