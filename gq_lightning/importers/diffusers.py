"""Autoencoders of diffusers as tokenizers: Gaussian Quant of a Gaussian VAE that others have trained, without training.

    folder or repository --diffusers' own loader--> their network -> our backbone, same tensors -> channels in even groups -> ImageTokenizer

A token stands for a group of channels, and loses what its posterior has beyond the codebook's log2 K bits; what it has below is wasted. So
channels are dealt out such that groups cost the same on average, and the report says what is left: bits of each group, decibels lost, and
whether fine-tuning under the target divergence is needed. Stable Diffusion's posteriors cost 60 to 76 bits a position, unevenly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gq_lightning.backbones import DiffusersKL, DiffusersTiny
from gq_lightning.backbones.diffusers import set_means
from gq_lightning.errors import UserError
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.tokenizer import ImageTokenizer

# what of their configs has no say in encoding and decoding
IGNORED = {"sample_size", "force_upcast", "latent_magnitude", "latent_shift", "block_out_channels"}
# what our backbones take for granted
KL = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "latents_mean": None, "latents_std": None}
TINY = {"in_channels": 3, "out_channels": 3, "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
# of the tokens: more than so many above log2 K and half a bit, or so many decibels lost, ask for training
SHARE, DECIBELS = 0.05, 1.0


def load_backbone(name: str | Path) -> DiffusersKL | DiffusersTiny:
    """The networks and weights of a model, or of the `vae` of a pipeline, in a folder or repository, for a quantizer of Gaussian
    posteriors.

    Raises UserError if there is none, it is neither AutoencoderKL nor AutoencoderTiny, something in its config is not supported, or its
    weights, in safetensors, do not fit.
    """
    try:
        import diffusers  # of others: this file shares its name
    except ImportError as error:
        raise UserError(f"--from-diffusers: diffusers is not installed ({error}): pip install 'gq_lightning[diffusers]'") from error
    within, config = _config(name, diffusers)
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise UserError(f"{name}: _class_name {kind!r:.60} is neither AutoencoderKL nor AutoencoderTiny: give such a model")
    try:
        options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True} | within
        model, info = getattr(diffusers, kind).from_pretrained(str(name), **options)
    except Exception as error:  # diffusers, safetensors and torch complain in their own ways
        raise UserError(f"{name}: its weights cannot be loaded ({_line(error)}): give a model saved in safetensors, whole") from error
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])}):
        raise UserError(f"{name}: its weights do not fit its config, {wrong[0]} and {len(wrong) - 1} more: give a model that is whole")
    for tensor_name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{name}: {tensor_name} holds values that are not finite: give another model")
    return _kl(name, model.float()) if kind == "AutoencoderKL" else _tiny(name, model.float())


def convert(
    name: str | Path, images: Tensor, bits_per_position: int, codebook_size: int = 65536, **codebook: Any
) -> tuple[ImageTokenizer, dict[str, Any]]:
    """The tokenizer of a model, see `load_backbone`, frozen, and the report of what its tokens cost.

    Args:
        images: (B, 3, H, W) in [-1, 1], on which bits are measured.
        bits_per_position: rate; a whole number of tokens, among which the channels are shared equally.
        codebook: further arguments of GaussianQuantizer.
    """
    backbone = load_backbone(name)
    # a model without log-variances begins where tokens cost what they may
    start = None if isinstance(backbone, DiffusersTiny) else 0.0
    try:
        quantizer = GaussianQuantizer(
            bits_per_position, backbone.latent_channels, codebook_size, initial_log_variance=start, tdc_variant="reference", **codebook
        )
    except UserError as error:
        raise UserError(f"--bits {bits_per_position}: {name} has {backbone.latent_channels} latent channels: {error}") from error
    tokenizer = ImageTokenizer(backbone, quantizer).eval().requires_grad_(False)
    with torch.no_grad():
        costs = [quantizer.posterior(backbone.encode(image).movedim(1, -1)).dimension_bits for image in images.split(1)]
    order = even_groups(torch.stack(costs).mean(0), quantizer.tokens_per_position)
    backbone.reorder(order)
    return tokenizer, report(tokenizer, images, order)


def even_groups(bits: Tensor, groups: int) -> list[int]:
    """An order of channels in which groups of as many neighbours cost about the same `bits` (channels,): the dearest goes to the cheapest
    group with room."""
    size = len(bits) // groups
    members: list[list[int]] = [[] for _ in range(groups)]
    for channel in bits.argsort(descending=True, stable=True).tolist():
        room = [group for group in members if len(group) < size]
        min(room, key=lambda group: sum(float(bits[member]) for member in group)).append(channel)
    return [channel for group in members for channel in group]


@torch.no_grad()
def report(tokenizer: ImageTokenizer, images: Tensor, order: Sequence[int]) -> dict[str, Any]:
    """What tokens cost and lose on pictures, in plain data; `order` names the model's own channels."""
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, GaussianQuantizer)
    parts = [tokenizer.reconstruct(image) for image in images.split(1)]
    bits = torch.cat([part.bits.flatten(0, -2) for part in parts if part.bits is not None])
    psnr = [_psnr(part.images, image) for part, image in zip(parts, images.split(1), strict=True)]
    gaussian = [_psnr(part.gaussian, image) for part, image in zip(parts, images.split(1), strict=True) if part.gaussian is not None]
    size, limit = quantizer.group_size, quantizer.target_bits + 0.5
    groups = [
        {
            "channels": list(order[group * size : (group + 1) * size]),
            **{name: round(float(value), 2) for name, value in (("min", own.min()), ("mean", own.mean()), ("max", own.max()))},
        }
        for group, own in enumerate(bits.unbind(-1))
    ]
    above, lost = float((bits > limit).float().mean()), sum(gaussian) / len(gaussian) - sum(psnr) / len(psnr)
    return {
        "pictures": len(images),
        "bits_per_position": quantizer.bits_per_position,
        "posterior_bits_per_position": round(float(bits.sum(-1).mean()), 2),
        "bits_per_token": quantizer.target_bits,
        "groups": groups,
        "share_above": round(above, 4),
        "psnr_of_posterior_mean": round(sum(gaussian) / len(gaussian), 2),
        "psnr_of_tokens": round(sum(psnr) / len(psnr), 2),
        "lost_decibels": round(lost, 2),
        "fine_tune": above > SHARE or lost > DECIBELS,
    }


def _psnr(images: Tensor, originals: Tensor) -> float:
    return float(10 * torch.log10(4 / (images - originals).square().mean()))


def _config(name: str | Path, diffusers: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Where in it the model lies, and its config."""
    failure: Exception | None = None
    for within in ({}, {"subfolder": "vae"}):
        try:
            config = diffusers.AutoencoderKL.load_config(str(name), **within)
            if config.get("_class_name"):
                return within, config
        except Exception as error:  # of the hub, of files, of JSON
            failure = failure or error
    said = _line(failure) if failure else "its config names no class"
    raise UserError(f"{name}: no model of diffusers ({said}): give a folder with config.json, or owner/repository") from failure


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check(name: str | Path, config: dict[str, Any], taken: set[str], granted: dict[str, Any]) -> None:
    for field, given in config.items():
        value = list(given) if isinstance(given, tuple) else given
        if field in granted and value != granted[field]:
            raise UserError(f"{name}: {field} {value!r:.60} is not supported, only {granted[field]!r}: give another model")
        if not (field.startswith("_") or field in IGNORED or field in taken or field in granted):
            raise UserError(f"{name}: {field} is a field that this version does not know: give another model")


def _kl(name: str | Path, model: Any) -> DiffusersKL:
    config = dict(model.config)
    same = ("layers_per_block", "norm_num_groups", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "scaling_factor")
    levels = len(config["block_out_channels"])
    granted = KL | {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    _check(name, config, {*same, "shift_factor", "latent_channels"}, granted)
    channels = config["latent_channels"]
    arguments = {field: config[field] for field in same} | {"shift_factor": config["shift_factor"] or 0.0}
    backbone = DiffusersKL(2 * channels, channels, block_out_channels=list(config["block_out_channels"]), **arguments)
    backbone.encoder.network, backbone.decoder.network = model.encoder, model.decoder
    if model.quant_conv is not None:
        backbone.encoder.last = model.quant_conv
    if model.post_quant_conv is not None:
        backbone.decoder.first = model.post_quant_conv
    return backbone


def _tiny(name: str | Path, model: Any) -> DiffusersTiny:
    config = dict(model.config)
    widths, blocks, channels = list(config["encoder_block_out_channels"]), list(config["num_encoder_blocks"]), config["latent_channels"]
    granted = TINY | {"decoder_block_out_channels": widths, "num_decoder_blocks": blocks[::-1]}
    taken = {"encoder_block_out_channels", "num_encoder_blocks", "scaling_factor", "shift_factor", "latent_channels"}
    _check(name, config, taken, granted)
    scaling = {"scaling_factor": config["scaling_factor"], "shift_factor": config["shift_factor"] or 0.0}
    backbone = DiffusersTiny(2 * channels, channels, block_out_channels=widths, blocks=blocks, **scaling)
    wide: Any = cast(Any, backbone.encoder.network).layers[-1]
    set_means(wide, model.encoder.layers[-1])
    model.encoder.layers[-1] = wide
    backbone.encoder.network, backbone.decoder.network = model.encoder, model.decoder
    return backbone
