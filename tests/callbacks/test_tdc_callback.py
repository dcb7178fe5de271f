from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from small import small_training

from gq_lightning import UserError
from gq_lightning.callbacks import TDC
from gq_lightning.quantizers import FiniteScalarQuantizer, GaussianQuantizer
from gq_lightning.quantizers.tdc import TargetDivergence


def trainer(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, log_every_n_steps=1)


def start(monkeypatch: pytest.MonkeyPatch, ranks: list[torch.Tensor] | None = None):  # type: ignore[no-untyped-def]
    training = small_training("vit")
    monkeypatch.setattr(training, "log_dict", Mock())
    gather = (lambda local: torch.stack([local, *ranks])) if ranks else (lambda local: local)
    monkeypatch.setattr(training, "all_gather", gather)
    callback = TDC()
    callback.on_train_start(trainer(0), training)  # type: ignore[arg-type]
    update = Mock(wraps=training.tokenizer.quantizer.tdc.update)
    monkeypatch.setattr(training.tokenizer.quantizer.tdc, "update", update)
    return training, callback, update


def end(callback: TDC, training: object, step: int, bits: torch.Tensor) -> None:
    callback.on_train_batch_end(trainer(step), training, {"posterior": SimpleNamespace(bits=bits)}, None, 0)  # type: ignore[arg-type]


def values(update: Mock) -> list[list[float]]:
    return [[float(value) for value in call.args] for call in update.call_args_list]


def test_every_step_updates_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    training, callback, update = start(monkeypatch)
    end(callback, training, 1, torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    end(callback, training, 2, torch.tensor([[8.0, 9.0]]))
    assert values(update) == [[1, 3, 6], [8, 8.5, 9]]
    assert training.tokenizer.quantizer.tdc.lambda_max.item() == pytest.approx(1.0, rel=1e-6), "once down, once up"


def test_accumulated_batches_are_one_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    training, callback, update = start(monkeypatch)
    end(callback, training, 0, torch.tensor([1.0, 3.0, 5.0]))
    end(callback, training, 0, torch.tensor([7.0]))
    assert update.call_count == 0
    end(callback, training, 1, torch.tensor([4.0]))
    assert values(update) == [[1, 4, 7]], "the mean is over tokens, not over batches"


def test_ranks_of_different_size_are_one_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([0.5, 20.0, 30.0, 6.0])  # min, max, sum, count of another rank
    training, callback, update = start(monkeypatch, [other])
    end(callback, training, 1, torch.tensor([1.0, 9.0]))
    assert values(update) == [[0.5, 5, 20]]


def test_a_quantizer_without_divergence_is_refused() -> None:
    training = small_training("vit", FiniteScalarQuantizer(16))
    with pytest.raises(UserError, match=r"trainer.callbacks: TDC"):
        TDC().on_train_start(trainer(0), training)  # type: ignore[arg-type]


def test_no_host_synchronisation() -> None:
    """Tensors on the meta device have no values: whatever asks for one raises."""
    with torch.device("meta"):
        tdc = TargetDivergence(16)
        tdc.update(*torch.empty(3))
        assert tdc.penalty(torch.empty(4, 2)).shape == (4, 2)


def test_an_exact_divergence_needs_no_multipliers(monkeypatch: pytest.MonkeyPatch) -> None:
    training = small_training("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True))
    monkeypatch.setattr(training, "all_gather", Mock(side_effect=AssertionError("nothing is to be gathered")))
    callback = TDC()
    callback.on_train_start(trainer(0), training)  # type: ignore[arg-type]
    end(callback, training, 1, torch.tensor([[8.0, 9.0]]))
    assert not [name for name in training.state_dict() if "lambda" in name]
