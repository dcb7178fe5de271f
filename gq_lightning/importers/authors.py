"""Import of checkpoints of the authors' code (https://arxiv.org/abs/2512.06609, section 5).

    file -> tensors (no code runs) -> renamed one to one -> backbone -> ImageTokenizer with the published codebook

The networks are the same functions with other names, so no tensor is transposed or split. Every tensor of encoder and decoder is used
exactly once. The import fails if a tensor is missing, left over, of the wrong shape, or not finite.
"""

import inspect
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from gq_lightning.backbones import Backbone, UNet, VisionTransformer
from gq_lightning.errors import UserError
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.tokenizer.checkpoint_file import read_checkpoint
from gq_lightning.tokenizer.pretrained import FLOATS

logger = logging.getLogger("gq_lightning.importers.authors")

Architecture = Literal["unet", "vit"]
CLASSES: dict[Architecture, type[Backbone]] = {"unet": UNet, "vit": VisionTransformer}
# the decoder's first layer, (width, latent channels, ...), whose name tells the two architectures apart
FIRST_LAYERS: dict[Architecture, str] = {"unet": "decoder.conv_in.weight", "vit": "decoder.post_quant_embed.weight"}

# A training that aligns the latents with a foundation model's features (checkpoints named `_vf`) also saves that model and a linear
# projection. Encoding and decoding use neither.
ALIGNMENT = ("foundation_model.", "linear_proj.")

# from our names to theirs, applied in order; `decoder.up` counts from fine to coarse, see `their_name`
RENAMINGS: dict[Architecture, tuple[tuple[str, str], ...]] = {
    "unet": (
        (r"^encoder\.levels", "encoder.down"),
        (r"^decoder\.levels", "decoder.up"),
        (r"\.middle\.blocks\.0", ".mid.block_1"),
        (r"\.middle\.blocks\.1", ".mid.block_2"),
        (r"\.blocks\.(\d+)\.attention", r".attn.\1"),
        (r"(\.attn\.\d+)\.(q|k|v)(?:uery|ey|alue)", r"\1.\2"),
        (r"(\.attn\.\d+)\.output", r"\1.proj_out"),
        (r"\.blocks\.", ".block."),
        (r"\.shortcut", ".nin_shortcut"),
        (r"^(encoder.+)\.resample", r"\1.downsample"),
        (r"^(decoder.+)\.resample", r"\1.upsample"),
    ),
    "vit": (
        (r"\.transformer\.position_embedding", ".positional_embedding"),
        (r"\.transformer\.norm_in", ".ln_pre"),
        (r"\.transformer\.norm_out", ".ln_post"),
        (r"\.transformer\.blocks", ".transformer.resblocks"),
        (r"\.norm([12])", r".ln_\1"),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj", ".attn.out_proj"),
        (r"\.mlp\.fc1", ".mlp.c_fc"),
        (r"\.mlp\.fc2", ".mlp.c_proj"),
        (r"^encoder\.linear_in", "encoder.conv1"),
        (r"^encoder\.linear_out", "encoder.quant_embed"),
        (r"^decoder\.linear_in", "decoder.post_quant_embed"),
        (r"^decoder\.head", "decoder.ffn.0"),
        (r"^decoder\.linear_out", "decoder.conv_out"),
    ),
}


def import_checkpoint(
    path: str | Path, architecture: Architecture, bits_per_position: int, codebook_size: int = 65536, config: str | Path | None = None
) -> ImageTokenizer:
    """The tokenizer of a checkpoint of the authors' code, in eval mode and frozen. Raises UserError if the file cannot be read safely, has
    another architecture or other sizes, or a tensor does not fit.

    Args:
        path: Lightning file with a `state_dict`. No code from it is run.
        bits_per_position, codebook_size: at which it was trained, which the weights do not show.
        config: YAML with `model.backbone.{class_path,init_args}`, for sizes other than the paper's. The widths of features and latents,
            and a ViT's image size, are derived from the weights.
    """
    tensors = read_tensors(path)
    backbone = _empty_backbone(tensors, architecture, path, config)
    ours = backbone.state_dict()
    levels = len(backbone.decoder.levels) if isinstance(backbone, UNet) else 0
    names = {name: their_name(name, architecture, levels) for name in ours}
    for name, theirs in names.items():
        _check(tensors.get(theirs), ours[name].shape, f"{path}: {theirs} (our {name})", architecture)
    if surplus := sorted(tensors.keys() - names.values()):
        raise UserError(
            f"{path}: {surplus[0]!r} of shape {tuple(tensors[surplus[0]].shape)} (our name: none) is left over, one of {len(surplus)}: "
            f"give a {architecture} of these sizes, or its sizes by --config"
        )
    # copied, because entries of the file may share memory, and the file may be deleted later
    weights = {name: tensors[theirs].detach().to(torch.float32, copy=True).contiguous() for name, theirs in names.items()}
    backbone.load_state_dict(weights, assign=True)
    quantizer = GaussianQuantizer(
        bits_per_position,
        latent_channels=backbone.latent_channels,
        codebook_size=codebook_size,
        codebook="sobol",
        seed=42,
        prior_weight=1.0,
        layout="strided",
        clamp_variance=False,
        initial_log_variance=0.0,
    )
    return ImageTokenizer(backbone, quantizer).eval().requires_grad_(False)


def their_name(name: str, architecture: Architecture, levels: int = 0) -> str:
    """The authors' name of a tensor of our backbone. `levels` is the UNet's number of levels, which our decoder counts in reverse."""
    for pattern, replacement in RENAMINGS[architecture]:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)


def _check(tensor: Tensor | None, shape: torch.Size, where: str, architecture: Architecture) -> None:
    fix = f"give a {architecture} of these sizes, or its sizes by --config"
    if tensor is None:
        raise UserError(f"{where} is missing: {fix}")
    if tensor.shape != shape:
        raise UserError(f"{where} has shape {tuple(tensor.shape)}, not {tuple(shape)}: {fix}")
    if tensor.dtype not in FLOATS:
        raise UserError(f"{where} is {tensor.dtype}: save it as a plain float32 tensor")
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{where} has values that are not finite: the training diverged or the file is damaged; give another checkpoint")


# From tensors and config to an empty backbone


def _empty_backbone(tensors: dict[str, Tensor], architecture: Architecture, path: str | Path, config: str | Path | None) -> Backbone:
    """The backbone on the meta device; drawing weights that the file replaces would take seconds and memory."""
    other: Architecture = "vit" if architecture == "unet" else "unet"
    if FIRST_LAYERS[architecture] not in tensors and FIRST_LAYERS[other] in tensors:
        raise UserError(f"{path}: {FIRST_LAYERS[other]} makes it a {other}, not a {architecture}: use --backbone {other}")
    latents = _size(tensors, FIRST_LAYERS[architecture], 1, path)
    arguments = _configured(architecture, config)
    known: dict[str, Any] = {"encoder_channels": 2 * latents, "latent_channels": latents}
    if architecture == "unet":
        # the only size that no shape shows; the authors' code has no other value
        known["norm_groups"] = 32
    else:
        if "width" in arguments and "heads" not in arguments:
            raise UserError(f"{config}: model.backbone.init_args.heads is missing: give it together with width; the weights do not show it")
        known["patch_size"] = max(1, math.isqrt(_size(tensors, "encoder.conv1.weight", 1, path) // 3))
        known["image_size"] = math.isqrt(_size(tensors, "encoder.positional_embedding", 0, path)) * known["patch_size"]
    for name, value in known.items():
        if arguments.setdefault(name, value) != value:
            raise UserError(f"{config}: model.backbone.init_args.{name}: {arguments[name]} given, but {path} has {value}: leave it out")
    description = {"class_path": CLASSES[architecture].public_path(), "init_args": arguments}
    source = str(config or path)
    try:
        with torch.device("meta"):
            return Backbone.from_description(description, source)
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix(f'{source}: ')}; give the network's sizes by --config") from error
    except RuntimeError as error:  # torch raises it for sizes below 1
        raise UserError(f"{source}: model.backbone.init_args: {arguments} make no {architecture}: correct them") from error


def _size(tensors: dict[str, Tensor], name: str, axis: int, path: str | Path) -> int:
    if name not in tensors or tensors[name].ndim <= axis or not tensors[name].numel():
        raise UserError(f"{path}: {name} is missing or empty: give a checkpoint of the authors' code, with encoder.* and decoder.*")
    return tensors[name].shape[axis]


def _configured(architecture: Architecture, config: str | Path | None) -> dict[str, Any]:
    """The `init_args` of the backbone in a YAML file like configs/backbone/*.yaml."""
    if config is None:
        return {}
    name, cls = "model.backbone", CLASSES[architecture]
    try:
        backbone = yaml.safe_load(Path(config).read_text(encoding="utf-8"))["model"]["backbone"]
        class_path, arguments = str(backbone["class_path"]), dict(backbone.get("init_args") or {})
    except OSError as error:
        raise UserError(f"{config}: cannot be read ({error.strerror}); give a YAML file like configs/backbone/unet_small.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{config}: no {name}.class_path and init_args there; write them as in configs/backbone/unet_small.yaml") from error
    if class_path not in (cls.public_path(), f"{cls.__module__}.{cls.__name__}", cls.__name__):
        raise UserError(f"{config}: {name}.class_path: {class_path} is not {cls.public_path()}: change it or --backbone")
    if unknown := sorted(map(str, arguments.keys() - inspect.signature(cls).parameters.keys())):
        raise UserError(f"{config}: {name}.init_args.{unknown[0]} is no argument of {cls.__name__}: remove it")
    return arguments


# From a file to tensors


class Inert:
    """Placeholder for an object of an unneeded class, such as a training setting. It accepts any state and does nothing."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict(Inert):
    """Placeholder for subclasses of dict, which the unpickler fills entry by entry."""

    def __new__(cls, *args: Any) -> Any:
        return {}


# what Lightning files contain besides tensors: settings, paths, callbacks' names. None of these is imported; all become Inert
HARMLESS = re.compile(
    r"(omegaconf|pathlib|lightning|lightning_fabric|pytorch_lightning)\.[\w.]+|argparse\.Namespace|collections\.defaultdict|typing\.Any"
    r"|numpy\.dtype|numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)|numpy\.ndarray"
    r"|builtins\.(object|type|dict|list|tuple|frozenset|bool|int|float|str|bytes|slice|range)|types\.SimpleNamespace"
)
DICTS = re.compile(r"collections\.defaultdict|.*\.AttributeDict")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of encoder and decoder in a Lightning file, by the authors' names; they are mapped, not read.

    It ignores `loss.*` and, with a warning, the tensors of an alignment with a foundation model.

    torch's restricted unpickler reads the file. Unknown classes become inert placeholders if they are known to be harmless; otherwise the
    file is refused.
    """

    def placeholders(names: list[str]) -> list[Any]:
        if refused := [name for name in names if not HARMLESS.fullmatch(name)]:
            raise UserError(
                f"{path}: refused, because it would call {', '.join(map(repr, refused[:3]))}: if you trust the file, save"
                " {'state_dict': torch.load(...)['state_dict']} to a new file"
            )
        return [(InertDict if DICTS.fullmatch(name) else Inert, name) for name in names]

    try:
        checkpoint = read_checkpoint(path, mmap=True, placeholders=placeholders)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; give the Lightning file (.ckpt) of the authors' code") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: has no state_dict: give the Lightning file (.ckpt) of the authors' code")
    if "tokenizer" in checkpoint and any(str(name).startswith("backbone.") for name in state):
        raise UserError(f"{path}: a checkpoint of this package, not of the authors' code: use `python -m gq_lightning convert`")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: state_dict entry {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor: save only tensors")
        if not name.startswith(("encoder.", "decoder.", "loss.", *ALIGNMENT)):
            raise UserError(
                f"{path}: {name[:80]!r} of shape {tuple(tensor.shape)} (our name: none) belongs to no Gaussian checkpoint: "
                "give one of Gaussian Quant, without averaged copies"
            )
    if left := Counter(name.split(".")[0] for name in state if name.startswith(ALIGNMENT)):
        counts = " and ".join(f"{name}.* ({count})" for name, count in sorted(left.items()))
        logger.warning("%s: ignored %s, which only the training uses to align latents with a foundation model's features", path, counts)
    return {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "decoder."))}
