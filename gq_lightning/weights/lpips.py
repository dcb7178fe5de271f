"""LPIPS, the learned perceptual distance (https://arxiv.org/abs/1801.03924), version 0.1, with pinned weights."""

import warnings
from functools import cache
from pathlib import Path
from typing import Literal

import lpips
import torch
from torch import Tensor, nn

from gq_lightning import weights
from gq_lightning.errors import UserError

TRUNKS = {"alex": "alexnet", "vgg": "vgg16"}
# pixels along the shorter side below which the trunk's last map would be empty
SMALLEST_SIDE = {"alex": 31, "vgg": 16}


class LPIPS(nn.Module):
    """The distance of two batches of images in the features of a frozen network: ``alex`` (for reported metrics) or ``vgg`` (for training).

    The module has neither parameters nor buffers. All instances on a device share one network, always in evaluation mode and in float32. So
    `state_dict`, strict loading, copies, `train()` and casts do not affect it. Raises UserError if the network is unknown, or its weights
    are missing and cannot be fetched.
    """

    def __init__(self, network: Literal["alex", "vgg"] = "alex") -> None:
        super().__init__()
        if network not in TRUNKS:
            raise UserError(f"LPIPS network {network!r}: give one of {', '.join(TRUNKS)}")
        self.network = network
        _network(network, torch.device("cpu"))  # report missing weights now, not at the first step

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1], 0 for equal ones; gradients flow to what requires them. Raises UserError if
        they are too small for the network."""
        side, smallest = min(images.shape[-2:]), SMALLEST_SIDE[self.network]
        if side < smallest:
            raise UserError(f"images of {side} pixels: LPIPS ({self.network}) needs {smallest} or more; use larger images or turn it off")
        layout = _layout(images.device)  # a layout unlike the network's makes each convolution lay out its weights again
        with torch.autocast(images.device.type, enabled=False):
            pair = (each.float().contiguous(memory_format=layout) for each in (images, targets))
            return _network(self.network, images.device)(*pair).flatten()


def _layout(device: torch.device) -> torch.memory_format:
    """Channels last on a CPU, where it takes 0.9 to 0.95 of the time from 64 pixels on (VGG)."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


@cache
def _network(network: str, device: torch.device) -> nn.Module:
    # an inference tensor could not be used in training later
    with torch.inference_mode(False):
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # lpips calls torchvision by a deprecated name
            model = lpips.LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False)
        model.load_state_dict(_state(network, model), strict=True, assign=True)
        return model.requires_grad_(False).eval().to(device, memory_format=_layout(device))


def _state(network: str, model: nn.Module) -> dict[str, Tensor]:
    """The complete state: lpips' scaling and linear heads (registered under two names), and the cached trunk."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("scaling_layer.")}
    heads = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{network}.pth", map_location="cpu", weights_only=True)
    for name, tensor in heads.items():
        state[name] = state[name.replace("lin", "lins.", 1)] = tensor
    trunk = weights.load(TRUNKS[network])
    for name in model.state_dict():
        if name.startswith("net."):  # net.slice2.3.weight is features.3.weight
            state[name] = trunk.pop("features." + name.split(".", 2)[2])
    if trunk:
        raise RuntimeError(f"LPIPS has no place for {', '.join(trunk)}")
    return state
