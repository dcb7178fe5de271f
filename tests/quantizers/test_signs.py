import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gq_lightning import UserError
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.quantizers.bsq import BinarySphericalQuantizer
from gq_lightning.quantizers.lfq import LookupFreeQuantizer
from gq_lightning.quantizers.signs import entropies, pack, signs, tokens_of, unpack


def test_bit_order_is_fixed() -> None:
    """Tokens outlive versions: contiguous channels, the first one most significant, 0 a plus."""
    values = torch.tensor([0.1, -1.0, -2.0, 0.0, -0.1, -1e-30, 3.0, -5.0])
    assert pack(values, 1).tolist() == [0b10010010]
    assert pack(values, 2).tolist() == [0b1001, 0b0010]
    assert pack(values, 4).tolist() == [0b10, 0b01, 0b00, 0b10]
    assert unpack(torch.tensor([0b1001, 0b0010]), 4).tolist() == [1, -1, -1, 1, -1, -1, 1, -1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 62), st.integers(1, 4), st.integers(0, 2**31))
def test_round_trip(bits: int, count: int, seed: int) -> None:
    tokens = torch.randint(2**bits, (3, 2, count), generator=torch.Generator().manual_seed(seed))
    unpacked = unpack(tokens, bits)
    assert unpacked.shape == (3, 2, count * bits)
    assert unpacked.abs().eq(1).all()
    assert torch.equal(pack(unpacked, count), tokens)
    assert torch.equal(signs(unpacked * 0.3), unpacked)


def test_largest_token() -> None:
    assert pack(torch.ones(2, 62), 1).tolist() == [[2**62 - 1]] * 2


def test_zero_has_the_sign_plus() -> None:
    assert signs(torch.tensor([0.0, -0.0, -1e-45])).tolist() == [1, 1, -1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    with pytest.raises(UserError, match="finite"):
        pack(torch.tensor([0.0, value]), 1)


@pytest.mark.parametrize(("bits", "size", "tokens"), [(16, 256, 2), (64, 256, 8), (64, 65536, 4), (5, 2, 5), (18, 2**18, 1)])
def test_tokens_of(bits: int, size: int, tokens: int) -> None:
    assert tokens_of(bits, size) == tokens


@pytest.mark.parametrize(
    ("bits", "size", "message"),
    [
        (16, 250, "codebook_size: 250 is not a power of two.*use 256"),
        (16, 1, "codebook_size"),
        (16, 0, "codebook_size"),
        (16, -4, "codebook_size"),
        (64, 2**64, "codebook_size"),
        (20, 256, "bits_per_position: 20 is not a whole number of tokens of 8 bits.*use 16 bits"),
        (4, 256, "bits_per_position: 4.*use 8 bits"),
        (0, 256, "bits_per_position"),
        (-8, 256, "bits_per_position"),
    ],
)
def test_bits_that_make_no_tokens(bits: int, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokens_of(bits, size)


@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_entropies_by_enumeration(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    logits = (torch.randn(5, 7, 3, bits, generator=generator) * 2 + 1).double().float().requires_grad_()
    per_sample, batch = entropies(logits)
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)), dtype=torch.float64)
    wanted = logits.detach().double().requires_grad_()
    p = (wanted @ codes.T / 2).softmax(dim=-1)  # (5, 7, 3, 2^bits)
    mean = p.mean(dim=(0, 1))
    wanted_per_sample, wanted_batch = -(p * p.log()).sum(-1).sum(-1).mean(), -(mean * mean.log()).sum()
    torch.testing.assert_close(per_sample.double(), wanted_per_sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.double(), wanted_batch, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(per_sample - 0.7 * batch, logits)
    (wanted_gradient,) = torch.autograd.grad(wanted_per_sample - 0.7 * wanted_batch, wanted)
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=1e-7, rtol=1e-4)


def test_entropies_of_certain_and_of_undecided_bits() -> None:
    codes = unpack(torch.arange(256)[:, None], 8)[:, None] * 1e4
    per_sample, batch = entropies(codes)
    assert per_sample.item() == pytest.approx(0, abs=1e-6)
    assert batch.item() == pytest.approx(8 * math.log(2))
    assert [value.item() for value in entropies(codes[:1].expand(9, 2, 8))] == pytest.approx([0, 0], abs=1e-6)
    assert [value.item() for value in entropies(torch.zeros(9, 2, 8))] == pytest.approx([16 * math.log(2)] * 2)


def test_gradients_of_impossible_codes_are_finite() -> None:
    logits = torch.tensor([[[3e4, -3e4, 0.5, 200.0]]]).requires_grad_()
    per_sample, batch = entropies(logits)
    (per_sample - batch).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_entropies_are_not_taken_in_half_precision() -> None:
    logits = torch.randn(100, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entropies(logits)
    assert found == entropies(logits)


def test_entropies_have_shapes_on_the_meta_device() -> None:
    """Configs are built there, and models measured."""
    assert [value.shape for value in entropies(torch.empty(5, 2, 8, device="meta"))] == [torch.Size([])] * 2


class Encoder(nn.Module):
    def __init__(self, linear: nn.Linear, quantizer: Quantizer) -> None:
        super().__init__()
        self.linear, self.quantizer = linear, quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer(self.linear(x)).penalty


def gradients(folder: Path, rank: int, ranks: int) -> None:
    found = {}
    for name, quantizer in torch.load(folder / "quantizers.pt", weights_only=False).items():
        data = torch.load(folder / f"{name}.pt", weights_only=True)
        linear = nn.Linear(*reversed(data["weight"].shape))
        linear.load_state_dict({"weight": data["weight"], "bias": data["bias"]})
        model = DistributedDataParallel(Encoder(linear, quantizer))
        if rank == 0:
            with torch.no_grad():
                model.module(data["x"])  # one rank may have a batch more to evaluate
        model(data["x"].chunk(ranks)[rank]).backward()
        found[name] = (linear.weight.grad, linear.bias.grad)
    torch.save(found, folder / f"gradients{rank}.pt")


def gradient(quantizer: Quantizer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parameters = (weight.clone().requires_grad_(), bias.clone().requires_grad_())
    return torch.autograd.grad(quantizer(torch.nn.functional.linear(x, *parameters)).penalty, parameters)


def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    quantizers: dict[str, Quantizer] = {
        "lfq": LookupFreeQuantizer(16, temperature=2.0, commitment=0.01),
        "bsq": BinarySphericalQuantizer(32, temperature=0.2, commitment=0.1),
    }
    wanted, alone = {}, {}
    for name, quantizer in quantizers.items():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, 3, 3, 6, generator=generator)
        x[:4] += 2.0  # the ranks' means differ
        weight = torch.randn(quantizer.encoder_channels, 6, generator=generator) / 2
        bias = torch.zeros(quantizer.encoder_channels)
        torch.save({"x": x, "weight": weight, "bias": bias}, tmp_path / f"{name}.pt")

        wanted[name] = gradient(quantizer, x, weight, bias)
        halves = [gradient(quantizer, part, weight, bias) for part in x.chunk(2)]
        alone[name] = [(first + second) / 2 for first, second in zip(*halves, strict=True)]
    torch.save(quantizers, tmp_path / "quantizers.pt")
    on_ranks(__file__, "gradients", tmp_path, 2)
    for rank in (0, 1):
        for name, both in torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True).items():
            for found, one, local in zip(both, wanted[name], alone[name], strict=True):
                torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)
                assert (one - local).abs().max() > 0.01 * one.abs().max(), "without the reduction it would be another gradient"
