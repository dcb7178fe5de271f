"""What a training takes from the optimizer's state in a checkpoint: steps and moments, if they can be right, and no setting."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from small import small_training
from torch import Tensor, nn

from gq_lightning.callbacks import CheckpointFiles
from gq_lightning.errors import UserError
from gq_lightning.lightning_internals import explain_restoring
from gq_lightning.training.optimization import adamw, as_asked_for


def made(network: nn.Module, rate: float = 0.1) -> tuple[Any, Any]:
    made = adamw(network.parameters(), rate, (0.9, 0.99), 0.01, 2, "cosine", 10)
    return made["optimizer"], made["lr_scheduler"]["scheduler"]  # type: ignore[typeddict-item]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(steps: int = 3) -> tuple[nn.Module, Any, Any]:
    model = network()
    optimizer, scheduler = made(model)
    for step in range(steps):
        model(torch.full((1, 3), step + 1.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("after", [torch.contiguous_format, torch.channels_last])
def test_moments_follow_the_layout_of_their_parameters(before: torch.memory_format, after: torch.memory_format) -> None:
    """A fused step takes parameters and moments by their order in memory, so a checkpoint of another layout would mix them up."""

    def convolution(layout: torch.memory_format) -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(4, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]

    def step(model: nn.Module, optimizer: Any) -> None:
        model(torch.linspace(-1, 1, 100).view(1, 4, 5, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, other = convolution(before), convolution(after)
    (optimizer, _), (resumed, _) = made(model), made(other)
    for _ in range(3):
        step(model, optimizer)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    step(model, optimizer)
    step(other, resumed)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)


def test_moments_go_on_and_settings_do_not() -> None:
    model, optimizer, scheduler = trained()
    state, schedule = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    for group in state["param_groups"]:
        for name, value in {"lr": 1e9, "betas": (0.0, 0.0), "weight_decay": 9.0, "eps": 1e9, "maximize": True, "amsgrad": True}.items():
            assert name in group
            group[name] = value
        group["more"] = 3
    schedule |= {"base_lrs": [1e9, 1e9], "last_epoch": 10**9, "_last_lr": [1e9, 1e9]}
    other, schedule_of_other = made(model)
    settings = copy.deepcopy([{name: value for name, value in group.items() if name != "params"} for group in other.param_groups])
    other.load_state_dict(state)
    schedule_of_other.load_state_dict(schedule)
    as_asked_for(other, schedule_of_other)
    for group, before, reached in zip(other.param_groups, settings, optimizer.param_groups, strict=True):
        assert {name: value for name, value in group.items() if name != "params"} == before | {"lr": reached["lr"]}
    for parameter in model.parameters():
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][name], value)
    assert schedule_of_other.last_epoch == 3
    scheduler.step()
    schedule_of_other.step()
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]


def forge(name: str, change: Callable[[Tensor], object]) -> Callable[[dict[str, Any]], object]:
    return lambda state: change(state["state"][1][name])


FORGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (forge("exp_avg", lambda tensor: tensor.view(-1)[0].fill_(torch.nan)), "parameter 1: exp_avg has values"),
    (forge("exp_avg", lambda tensor: tensor.view(-1)[-1].fill_(-torch.inf)), "parameter 1: exp_avg has values"),
    (forge("exp_avg_sq", lambda tensor: tensor.fill_(torch.inf)), "parameter 1: exp_avg_sq has values"),
    (forge("exp_avg_sq", lambda tensor: tensor.sub_(1e9)), "parameter 1: exp_avg_sq has values"),
    (forge("step", lambda tensor: tensor.fill_(torch.nan)), "parameter 1: step has values"),
    (forge("step", lambda tensor: tensor.fill_(-1)), "parameter 1: step has values"),
    (lambda state: state["state"][1].pop("exp_avg"), "parameter 1 has no exp_avg of shape"),
    (lambda state: state["state"][1].pop("step"), "parameter 1 has no step of shape ()"),
    (lambda state: state["state"][1].update(step="three"), "parameter 1 has no step"),
    (lambda state: state["state"][1].update(exp_avg=torch.zeros(7)), "parameter 1 has no exp_avg of shape"),
    (lambda state: state["state"][1].update(exp_avg_sq=torch.zeros(4, dtype=torch.int64)), "parameter 1 has no exp_avg_sq"),
    (lambda state: state["state"].update({1: [3]}), "parameter 1 belongs to no parameter"),
    (lambda state: state["state"].update({99: {}}), "parameter 99 belongs to no parameter"),
    (lambda state: state["state"].update(text={}), "parameter 'text' belongs to no parameter"),
    (lambda state: state["param_groups"].pop(), "belongs to other parameters"),
    (lambda state: state["param_groups"][0]["params"].pop(), "belongs to other parameters"),
    (lambda state: state["param_groups"][0].update(params=[1, 0]), "belongs to other parameters"),
    (lambda state: state["param_groups"][0].pop("params"), "belongs to other parameters"),
    (lambda state: state.update(param_groups="text"), "lacks param_groups or state"),
    (lambda state: state.update(param_groups=[1, 2]), "lacks param_groups or state"),
    (lambda state: state.update(state=[]), "lacks param_groups or state"),
    (lambda state: state.pop("state"), "lacks param_groups or state"),
]


@pytest.mark.parametrize(("change", "words"), FORGED)
def test_a_state_that_cannot_be_right_is_refused(change: Callable[[dict[str, Any]], object], words: str) -> None:
    _, optimizer, _ = trained()
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    fresh, _ = made(network())
    with pytest.raises(UserError) as caught:
        fresh.load_state_dict(state)
    assert words in str(caught.value)
    assert str(caught.value).startswith("--ckpt_path: optimizer_states: ")
    assert not fresh.state


def trainer(folder: Path, steps: int) -> Trainer:
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    made = Trainer(accelerator="cpu", devices=1, max_steps=steps, plugins=[CheckpointFiles()], default_root_dir=folder, **options)
    explain_restoring(made)
    return made


@pytest.mark.filterwarnings("ignore")
def test_a_run_refuses_it_before_its_first_step(tmp_path: Path) -> None:
    batches = torch.utils.data.DataLoader(torch.zeros(4, 3, 32, 32))
    first = trainer(tmp_path, 1)
    first.fit(small_training("vit"), batches)
    first.save_checkpoint(tmp_path / "last.ckpt")
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda content: FORGED[0][0](content["optimizer_states"][0]),
        lambda content: FORGED[6][0](content["optimizer_states"][0]),
        lambda content: content["optimizer_states"].clear(),
        lambda content: None,
    ]
    for change in changes:
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "other.ckpt")
        second = trainer(tmp_path, 2)
        if change is changes[-1]:
            second.fit(small_training("vit"), batches, ckpt_path=tmp_path / "other.ckpt")
            assert second.global_step == 2
        else:
            with pytest.raises(UserError, match="optimizer_states|optimizer's state"):
                second.fit(small_training("vit"), batches, ckpt_path=tmp_path / "other.ckpt")
