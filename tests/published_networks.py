"""The published networks at small sizes, from their description in the paper, under the names that their checkpoints have.

Independent of the package: what a published checkpoint computes is to be seen twice.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENTS, IMAGE = 8, 32
UNET: dict[str, Any] = {"image_size": IMAGE, "channels": 32, "multipliers": [1, 2, 2], "blocks": 1, "attention_resolutions": [16]}
VIT: dict[str, Any] = {"patch_size": 8, "width": 48, "layers": 2, "heads": 3}


class Node(nn.Module):
    """Children by name."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


# UNet


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(Node):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = group_norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = self.norm2(self.conv1(y * y.sigmoid()))
        y = self.conv2(y * y.sigmoid())
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(Node):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(x.shape[1] ** 0.5).softmax(dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


def level(widths: list[int], attention: bool) -> Node:
    blocks = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
    return Node(block=blocks, attn=nn.ModuleList(Attention(width) for width in widths[1:] if attention))


def resample(width: int, stride: int) -> Node:
    return Node(conv=nn.Conv2d(width, width, 3, stride=stride))


def apply_level(module: Node, x: Tensor) -> Tensor:
    for index, block in enumerate(module.block):
        x = block(x)
        x = module.attn[index](x) if len(module.attn) else x
    return x


class UNetHalf(Node):
    def __init__(self, deepest: int, inputs: int, first: int, last: int, outputs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, first, 3, padding=1)
        self.mid = Node(block_1=ResidualBlock(deepest, deepest), block_2=ResidualBlock(deepest, deepest))
        self.norm_out, self.conv_out = group_norm(last), nn.Conv2d(last, outputs, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.block_1(x))

    def end(self, x: Tensor) -> Tensor:
        x = self.norm_out(x)
        return self.conv_out(x * x.sigmoid())


class UNetEncoder(UNetHalf):
    def __init__(self) -> None:
        super().__init__(64, 3, 32, 64, 2 * LATENTS)
        self.down: Any = nn.ModuleList([level([32, 32], False), level([32, 64], True), level([64, 64], False)])
        for module, width in zip(self.down, (32, 64), strict=False):
            module.downsample = resample(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for module in self.down:
            x = apply_level(module, x)
            if hasattr(module, "downsample"):
                x = module.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.end(self.middle(x))


class UNetDecoder(UNetHalf):
    def __init__(self) -> None:
        super().__init__(64, LATENTS, 64, 32, 3)
        self.up: Any = nn.ModuleList([level([64, 32, 32], False), level([64, 64, 64], True), level([64, 64, 64], False)])
        for module in self.up[1:]:
            module.upsample = resample(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for module in reversed(self.up):
            x = apply_level(module, x)
            if hasattr(module, "upsample"):
                x = module.upsample.conv(F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1)))
        return self.end(x)


# ViT


class TransformerBlock(Node):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


class Transformer(Node):
    def __init__(self) -> None:
        super().__init__()
        width = VIT["width"]
        self.positional_embedding = nn.Parameter(torch.zeros((IMAGE // 8) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.transformer = Node(resblocks=nn.ModuleList(TransformerBlock(width, VIT["heads"]) for _ in range(VIT["layers"])))

    def transform(self, x: Tensor) -> Tensor:
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x)


class ViTEncoder(Transformer):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.quant_embed = nn.Linear(192, VIT["width"], bias=False), nn.Linear(VIT["width"], 2 * LATENTS)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 8, stride=8).transpose(1, 2)  # channel, row, column
        return self.quant_embed(self.transform(self.conv1(patches))).transpose(1, 2).unflatten(2, (4, 4))


class ViTDecoder(Transformer):
    def __init__(self) -> None:
        super().__init__()
        self.post_quant_embed = nn.Linear(LATENTS, VIT["width"])
        self.ffn, self.conv_out = nn.Sequential(nn.Linear(VIT["width"], 3072), nn.Tanh()), nn.Linear(3072, 192)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transform(self.post_quant_embed(x.flatten(2).transpose(1, 2)))
        return F.fold(self.conv_out(self.ffn(x)).transpose(1, 2), IMAGE, 8, stride=8)


def reference(architecture: str) -> Node:
    """Encoder and decoder with random weights everywhere, normalisations and biases included."""
    halves = (UNetEncoder(), UNetDecoder()) if architecture == "unet" else (ViTEncoder(), ViTDecoder())
    module = Node(encoder=halves[0], decoder=halves[1])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()
