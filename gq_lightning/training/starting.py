"""A training that starts from the weights of a tokenizer, as far as they fit.

start --start_from--> tokenizer: backbone and quantizer, but for the layers between them where a rate or a codebook has other widths
"""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from gq_lightning.errors import UserError
from gq_lightning.tokenizer import ImageTokenizer

# arguments of a backbone that follow from the quantizer
WIDTHS = ("encoder_channels", "latent_channels")


def model_config(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The part of a fit's config that describes a tokenizer, without what is linked: widths, and the image size of the backbone.

    Arguments of the quantizer that would follow from the others are left to follow from them: another rate has widths of its own.
    """
    described: dict[str, Any] = tokenizer.description()["init_args"]
    backbone, quantizer = (described[part]["init_args"] for part in ("backbone", "quantizer"))
    size = backbone.pop("image_size", None)
    for name in WIDTHS:
        backbone.pop(name)
    kind, arguments = type(tokenizer.quantizer), dict(tokenizer.quantizer.init_args)
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if parameter.default is None and arguments[name] is not None:
            with suppress(UserError):
                if kind(**arguments | {name: None}).init_args == tokenizer.quantizer.init_args:
                    arguments[name] = quantizer[name] = None
    return {"backbone_image_size": size, "model": described}


@torch.no_grad()
def start_from(tokenizer: ImageTokenizer, start: ImageTokenizer, source: str, same_tokens: bool = False) -> list[str]:
    """Gives a tokenizer, in place, the weights of `start`, which errors call `source`. With `same_tokens` the encoder will be kept, so
    everything must be as it is in `start`.

    Returns the names of the weights that `start` does not have in this shape, which are as they were. Raises UserError if the backbones
    differ in more than those widths, or, for the same tokens, in anything, or the quantizers do.
    """
    if same_tokens:
        parts = (tokenizer.quantizer.identity(), start.quantizer.identity())
        _check_alike("quantizer", *parts, source, "leave it to --init_from, behind the configs, or give --train all")
    ours, theirs = (which.backbone.identity() for which in (tokenizer, start))
    for described in (ours, theirs):
        described["init_args"] = {name: value for name, value in described["init_args"].items() if name not in WIDTHS}
    _check_alike("backbone", ours, theirs, source, "leave it to --init_from, behind the configs")
    new = [f"backbone.{name}" for name in _copied(tokenizer.backbone, start.backbone.state_dict())]
    of_quantizer = start.quantizer.state_dict() if type(tokenizer.quantizer) is type(start.quantizer) else {}
    new += [f"quantizer.{name}" for name in _copied(tokenizer.quantizer, of_quantizer)]
    if same_tokens:
        tokenizer.tokens_of = start.tokens_of
    return new


def _copied(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copies those that fit, and returns the names of the others. A codebook's fingerprint follows from its recipe: it is no weight."""
    new = []
    for name, tensor in module.state_dict().items():
        if name.endswith("codebook_fingerprint"):
            continue
        if name in weights and weights[name].shape == tensor.shape:
            tensor.copy_(weights[name])
        else:
            new.append(name)
    return new


def _check_alike(part: str, ours: dict[str, Any], theirs: dict[str, Any], source: str, cure: str) -> None:
    """Raises UserError, naming the first field in which two identities differ."""
    if ours["class_path"] != theirs["class_path"]:
        names = [described["class_path"].rpartition(".")[2] for described in (ours, theirs)]
        raise UserError(f"model.{part}: a {names[0]}, but init_from {source} has a {names[1]}: {cure}")
    for name in sorted(ours["init_args"].keys() | theirs["init_args"].keys()):
        values = [described["init_args"].get(name) for described in (ours, theirs)]
        if values[0] != values[1]:
            raise UserError(f"model.{part}.init_args.{name}: {values[0]}, but init_from {source} has {values[1]}: {cure}")
