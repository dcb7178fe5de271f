import copy
import pickle
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import nn

from gq_lightning import UserError
from gq_lightning.backbones import Backbone, UNet, VisionTransformer
from gq_lightning.construction import Recorded, build, describe
from gq_lightning.quantizers import Quantizer


class Part(Recorded, nn.Module):
    def __init__(self, width: int, scales: tuple[int, ...] = (1, 2), *, name: str | None = None) -> None:
        super().__init__()
        self.scales = scales
        self.weight = nn.Parameter(torch.zeros(width))


def test_arguments_and_defaults_are_remembered() -> None:
    part = Part(3, name="a")
    assert describe(part) == {"class_path": f"{__name__}.Part", "init_args": {"width": 3, "scales": [1, 2], "name": "a"}}
    assert build(Part, describe(part), "here").scales == (1, 2)


class Bare(Recorded):
    def __init__(self, levels: list, scales: Sequence = (1,), anything=None) -> None:  # type: ignore[no-untyped-def, type-arg]
        self.levels = levels


def test_what_is_described_is_built_however_its_lists_are_annotated() -> None:
    for levels in ([4, 4], []):
        assert build(Bare, describe(Bare(levels, (2, 3), [5])), "here").init_args == {"levels": levels, "scales": [2, 3], "anything": [5]}
    with pytest.raises(UserError, match=r"levels: 4 is not of type list"):
        build(Bare, {"class_path": f"{__name__}.Bare", "init_args": {"levels": 4}}, "here")


def test_copies_remember_too() -> None:
    backbone = VisionTransformer(8, 4, image_size=16, width=16, layers=1, heads=2, head_width=8)
    for again in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert describe(again) == describe(backbone)
        assert torch.equal(again.last_layer, backbone.last_layer)


@pytest.mark.parametrize(
    "backbone",
    [
        VisionTransformer(8, 4, image_size=16, width=16, layers=1, heads=2, head_width=8),
        UNet(8, 4, image_size=16, channels=32, multipliers=[1, 1], blocks=1, attention_resolutions=[]),
    ],
)
def test_backbones_are_rebuilt(backbone: Backbone) -> None:
    again = build(Backbone, describe(backbone), "here")
    assert type(again) is type(backbone)
    assert describe(again) == describe(backbone)
    again.load_state_dict(backbone.state_dict())


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"class_path": "gq_lightning.quantizers.GaussianQuantizer", "init_args": {"colour": 1}}, "colour"),
        ({"class_path": "gq_lightning.quantizers.Nothing"}, "Nothing"),
        ({"class_path": "gq_lightning.backbones.UNet"}, "UNet"),
        ({"class_path": "os.system", "init_args": {"command": "true"}}, "os.system"),
        ({"class_path": "nowhere.Quantizer"}, "of gq_lightning nor an imported one"),
    ],
)
def test_what_is_no_quantizer_is_refused_in_one_line(description: dict, words: str) -> None:
    with pytest.raises(UserError, match=r"file\.json") as caught:
        build(Quantizer, description, "file.json")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class First(Recorded):
    training_arguments = frozenset({"patience"})

    def __init__(self, width: int, patience: int = 3) -> None: ...


def test_identity_outlives_versions() -> None:
    """What shapes the training alone, and what a later version added and is not used, leave a thing what it was."""

    class Later(Recorded):
        training_arguments = First.training_arguments | {"warmth"}
        later_arguments: ClassVar = {"height": None}

        def __init__(self, width: int, patience: int = 5, warmth: float = 1.0, height: int | None = None) -> None: ...

    def arguments(thing: Recorded) -> object:
        return thing.identity()["init_args"]

    assert arguments(First(4)) == arguments(First(4, patience=9)) == arguments(Later(4, warmth=2.0)) == {"width": 4}
    assert arguments(First(4)) != arguments(First(5))
    assert arguments(Later(4, height=2)) == {"width": 4, "height": 2}
