from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from small import small_tokenizer

from gq_lightning import UserError
from gq_lightning.callbacks import TDC
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.quantizers.tdc import TargetDivergence


def trainer(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, log_every_n_steps=1)


def start(monkeypatch: pytest.MonkeyPatch, ranks: list[torch.Tensor] | None = None):  # type: ignore[no-untyped-def]
    tokenizer = small_tokenizer("vit")
    monkeypatch.setattr(tokenizer, "log_dict", Mock())
    gather = (lambda local: torch.stack([local, *ranks])) if ranks else (lambda local: local)
    monkeypatch.setattr(tokenizer, "all_gather", gather)
    callback = TDC()
    callback.on_train_start(trainer(0), tokenizer)  # type: ignore[arg-type]
    update = Mock(wraps=tokenizer.quantizer.tdc.update)
    monkeypatch.setattr(tokenizer.quantizer.tdc, "update", update)
    return tokenizer, callback, update


def end(callback: TDC, tokenizer: object, step: int, bits: torch.Tensor) -> None:
    callback.on_train_batch_end(trainer(step), tokenizer, {"diagnostics": {"bits": bits}}, None, 0)  # type: ignore[arg-type]


def values(update: Mock) -> list[list[float]]:
    return [[float(value) for value in call.args] for call in update.call_args_list]


def test_every_step_updates_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, callback, update = start(monkeypatch)
    end(callback, tokenizer, 1, torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    end(callback, tokenizer, 2, torch.tensor([[8.0, 9.0]]))
    assert values(update) == [[1, 3, 6], [8, 8.5, 9]]
    assert tokenizer.quantizer.tdc.lambda_max.item() == pytest.approx(1.0, rel=1e-6), "once down, once up"


def test_accumulated_batches_are_one_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, callback, update = start(monkeypatch)
    end(callback, tokenizer, 0, torch.tensor([1.0, 3.0, 5.0]))
    end(callback, tokenizer, 0, torch.tensor([7.0]))
    assert update.call_count == 0
    end(callback, tokenizer, 1, torch.tensor([4.0]))
    assert values(update) == [[1, 4, 7]], "the mean is over tokens, not over batches"


def test_ranks_of_different_size_are_one_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([0.5, 20.0, 30.0, 6.0])  # min, max, sum, count of another rank
    tokenizer, callback, update = start(monkeypatch, [other])
    end(callback, tokenizer, 1, torch.tensor([1.0, 9.0]))
    assert values(update) == [[0.5, 5, 20]]


def test_a_quantizer_without_divergence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer("vit")
    monkeypatch.delattr(tokenizer.quantizer, "tdc")
    with pytest.raises(UserError, match=r"trainer.callbacks: TDC"):
        TDC().on_train_start(trainer(0), tokenizer)  # type: ignore[arg-type]


def test_no_host_synchronisation() -> None:
    """Tensors on the meta device have no values: whatever asks for one raises."""
    with torch.device("meta"):
        tdc = TargetDivergence(16)
        tdc.update(*torch.empty(3))
        assert tdc.penalty(torch.empty(4, 2)).shape == (4, 2)


def test_an_exact_divergence_needs_no_multipliers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True))
    monkeypatch.setattr(tokenizer, "all_gather", Mock(side_effect=AssertionError("nothing is to be gathered")))
    callback = TDC()
    callback.on_train_start(trainer(0), tokenizer)  # type: ignore[arg-type]
    end(callback, tokenizer, 1, torch.tensor([[8.0, 9.0]]))
    assert all(multiplier == 1 for multiplier in tokenizer.quantizer.tdc.buffers())  # type: ignore[union-attr]
