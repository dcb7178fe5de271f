"""The tools of the command line: weights, shard, convert, import-checkpoint, encode, decode, evaluate.

Those that need Lightning, or the networks of LPIPS and rFID, import them when they are called.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from gq_lightning.construction import build, describe
from gq_lightning.data.pictures.reading import WhenBroken
from gq_lightning.errors import UserError
from gq_lightning.importers.authors import Architecture, import_checkpoint
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.quantizers.codebook import Generator
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.tokenizer.checkpoint import load_checkpoint
from gq_lightning.tokenizer.refining import Distance, squared_error
from gq_lightning.tokens.codec import Fit, decode_pictures, encode_pictures


def _weights(arguments: argparse.Namespace) -> None:
    from gq_lightning import weights

    table = Table("weights", "MB", "SHA-256 of the content", "file")
    for name in weights.WEIGHTS:
        weights.fetch(name)
    for name, path, size, sha256 in weights.report():
        table.add_row(name, f"{(size or 0) / 1e6:.1f}", sha256[:16] + "…", str(path))
    Console(soft_wrap=True).print(table)


def _shard(arguments: argparse.Namespace) -> None:
    from gq_lightning.data.shards.writing import write_shards

    options = (arguments.split, arguments.size, arguments.broken, arguments.workers)
    written = write_shards(arguments.folder, arguments.out, *options)
    left_out = f", {len(written.left_out)} broken ones left out" if written.left_out else ""
    print(f"{arguments.out}: {written.shards} shards of {written.pictures} pictures{left_out}")


def _another_codebook(trained: Quantizer, changes: dict[str, Any], source: str) -> Quantizer:
    """A Gaussian quantizer like the one of the training, with another codebook."""
    description = describe(trained)
    if "codebook" not in description["init_args"]:
        raise UserError(f"{source}: a {type(trained).__name__} has no codebook to exchange: leave out --{min(changes).replace('_', '-')}")
    if "codebook_size" in changes and description["init_args"].get("exact_divergence"):
        raise UserError(
            f"{source}: its divergence is exact for the codebook size it was trained with: leave out --codebook-size, or train again"
        )
    return build(Quantizer, description | {"init_args": description["init_args"] | changes}, source)  # type: ignore[type-abstract]


def _convert(arguments: argparse.Namespace) -> None:
    from gq_lightning.callbacks.gaussian_quant import convert

    tokenizer = load_checkpoint(arguments.checkpoint)
    given = {name: getattr(arguments, name) for name in ("codebook", "codebook_size", "prior_weight", "seed")}
    changes = {name: value for name, value in given.items() if value is not None}
    convert(tokenizer, _another_codebook(tokenizer.quantizer, changes, str(arguments.checkpoint)) if changes else None)
    tokenizer.save_pretrained(arguments.out)
    quantizer = tokenizer.quantizer
    geometry = f"{quantizer.tokens_per_position} tokens of {quantizer.codebook_size} per position"
    print(f"{arguments.out}: {type(tokenizer.backbone).__name__}, {geometry}")


def _import_checkpoint(arguments: argparse.Namespace) -> None:
    options = (arguments.backbone, arguments.bits_per_position, arguments.codebook_size, arguments.config)
    tokenizer = import_checkpoint(arguments.checkpoint, *options)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {type(tokenizer.backbone).__name__}, {tokenizer.quantizer.extra_repr()}")


def _encode(arguments: argparse.Namespace) -> None:
    tokenizer = _load(arguments)
    encode_pictures(
        tokenizer,
        arguments.images,
        arguments.out,
        fit=arguments.fit,
        size=arguments.size,
        deterministic=arguments.deterministic,
        tile=arguments.tile,
        skip_broken=arguments.skip_broken,
        bits=arguments.bits,
        refine=arguments.refine,
        distance=_squared_error_and_lpips(arguments.refine_lpips) if arguments.refine_lpips else None,
    )


def _squared_error_and_lpips(weight: float) -> Distance:
    """Sum over pixels of the squared error and `weight` times LPIPS, of images in [-1, 1]; small regions lie on grey for LPIPS."""
    from gq_lightning.weights.lpips import LPIPS

    if not 0 < weight < float("inf"):
        raise UserError(f"--refine-lpips {weight:g}: use a positive number, or leave it out")
    network = LPIPS("alex")

    def distance(images: Tensor, originals: Tensor) -> Tensor:
        missing = [max(0, 32 - side) for side in images.shape[:1:-1]]
        padded = [functional.pad(side, (0, missing[0], 0, missing[1])) for side in (images, originals)]
        return squared_error(images, originals) + weight * padded[0][0, 0].numel() * network(*padded)

    return distance


def _decode(arguments: argparse.Namespace) -> None:
    decode_pictures(_load(arguments), arguments.tokens, arguments.out, tile=arguments.tile, any_tokenizer=arguments.any_tokenizer)


def _evaluate(arguments: argparse.Namespace) -> None:
    from gq_lightning.data import ImageFolder
    from gq_lightning.evaluation.evaluate import evaluate, write_metrics
    from gq_lightning.metrics.report import metrics_table

    tokenizer = _load(arguments)
    size = arguments.size or tokenizer.window or 256
    folder = str(arguments.data)
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers, "skip_broken": arguments.skip_broken}
    data = ImageFolder(root=folder, validation_root=folder, image_size=size, **options)
    values, protocol = evaluate(tokenizer, data.test_dataloader(), rfid=not arguments.no_rfid)
    skipped: dict[str, int] = {"skipped_pictures": data.skipped} if data.skipped else {}
    write_metrics(arguments.out, values, protocol, data.protocol(), tokenizer_fingerprint=tokenizer.fingerprint, **skipped)
    console = Console(soft_wrap=True)
    console.print(metrics_table(values, title=f"{values['images']} images of {arguments.data}"))
    console.print(str(arguments.out))
    if skipped:  # each has been named, in a warning
        print(f"{data.skipped} of {data.skipped + values['images']} pictures were broken and skipped", file=sys.stderr)


def _load(arguments: argparse.Namespace) -> ImageTokenizer:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return ImageTokenizer.from_pretrained(arguments.tokenizer).to(arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gq_lightning")
    tools = parser.add_subparsers(dest="command", required=True)

    def tool(name: str, function: Callable[[argparse.Namespace], None], text: str, **arguments: dict[str, Any]) -> argparse.ArgumentParser:
        sub = tools.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(function=function)
        for argument, options in arguments.items():
            sub.add_argument(argument if options.pop("positional", False) else f"--{argument.replace(chr(95), chr(45))}", **options)
        return sub

    def shared() -> dict[str, dict[str, Any]]:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return {
            "tokenizer": {"required": True, "metavar": "DIR", "help": "tokenizer's folder, or owner/repository on the hub"},
            "device": {"default": default, "help": "torch device"},
            "threads": {"type": int, "help": "CPU threads"},
        }

    tile = {"type": int, "metavar": "PIXELS", "help": "see large pictures in overlapping tiles of this side, to bound memory"}
    skip = {"action": "store_true", "help": "name and count pictures that cannot be decoded instead of stopping"}
    tool("weights", _weights, "Fetch and verify the weights of LPIPS and of rFID's Inception; say where they lie.")
    tool(
        "shard",
        _shard,
        "A folder of pictures to tar shards with indexes; run again, it goes on where it was interrupted.",
        folder={"positional": True, "type": Path, "metavar": "FOLDER", "help": "folder of pictures, searched recursively"},
        out={"type": Path, "required": True, "metavar": "DIR", "help": "folder of the shards"},
        split={"default": "train", "metavar": "NAME", "help": "beginning of the shards' names"},
        size={"type": float, "default": 256, "metavar": "MB", "help": "the most that a shard may have, in 10^6 bytes"},
        broken={
            "choices": get_args(WhenBroken),
            "default": "leave-out",
            "help": "pictures that cannot be decoded: name them and leave them out, name and keep them, or decode none",
        },
        workers={"type": int, "default": 2, "help": "processes that read and decode"},
    )
    tool(
        "convert",
        _convert,
        "Gaussian Quant by hand: freeze the encoder, attach the random codebook, write the tokenizer.",
        checkpoint={"positional": True, "type": Path, "metavar": "RUN_OR_CKPT", "help": "run's folder or checkpoint"},
        out={"type": Path, "required": True, "metavar": "DIR", "help": "folder to write"},
        codebook={"choices": get_args(Generator), "help": "another generator than it was trained for; quantile is TokenBridge's"},
        codebook_size={"type": int, "metavar": "K", "help": "another size; the tokens per position follow from the rate"},
        prior_weight={"type": float, "metavar": "OMEGA", "help": "another weight of the prior"},
        seed={"type": int, "help": "another seed of the codebook"},
    )
    tool(
        "import-checkpoint",
        _import_checkpoint,
        "A Gaussian checkpoint of the authors' code to a tokenizer's folder. No code in it is run.",
        checkpoint={"positional": True, "type": Path, "metavar": "FILE.ckpt", "help": "Lightning file with a state_dict"},
        backbone={"choices": get_args(Architecture), "required": True, "help": "architecture of the checkpoint"},
        bits_per_position={"type": int, "required": True, "metavar": "BITS", "help": "rate it was trained for: 16, 32 or 64"},
        codebook_size={"type": int, "default": 65536, "metavar": "K", "help": "codebook it was trained for"},
        config={"type": Path, "metavar": "BACKBONE.yaml", "help": "sizes of the backbone where they are not the paper's"},
        out={"type": Path, "required": True, "metavar": "DIR", "help": "folder to write"},
    )
    tool(
        "encode",
        _encode,
        "Pictures to token files.",
        **shared(),
        images={"positional": True, "nargs": "+", "type": Path, "help": "pictures or folders of them"},
        out={"type": Path, "required": True, "metavar": "DIR", "help": "folder of the token files"},
        fit={
            "choices": get_args(Fit),
            "default": "pad",
            "help": "pad: keep the size, pad to the grid, cut back on decoding; "
            "resize: shorter side to --size and centre crop; crop: centre crop to the grid",
        },
        size={"type": int, "metavar": "PIXELS", "help": "for --fit resize"},
        deterministic={"action": "store_true", "help": "tokens independent of batching, to the bit"},
        tile=dict(tile),
        skip_broken=dict(skip),
        bits={
            "type": int,
            "metavar": "BITS",
            "help": "keep this many bits of each token, where the codebook is a tree (convert --order tree)",
        },
        refine={"type": int, "default": 0, "metavar": "PASSES", "help": "choose tokens through the decoder, in so many passes; slow"},
        refine_lpips={"type": float, "metavar": "WEIGHT", "help": "judge by squared error plus WEIGHT times LPIPS, in --refine"},
    )
    tool(
        "decode",
        _decode,
        "Token files to PNG.",
        **shared(),
        tokens={"positional": True, "nargs": "+", "type": Path, "help": "token files or folders of them"},
        out={"type": Path, "required": True, "metavar": "DIR", "help": "folder of the pictures"},
        tile=dict(tile),
        any_tokenizer={"action": "store_true", "help": "accept tokens that another tokenizer made"},
    )
    tool(
        "evaluate",
        _evaluate,
        "Metrics of a tokenizer on a folder of images: shorter side to --size, centre crop.",
        **shared(),
        data={"type": Path, "required": True, "metavar": "FOLDER", "help": "folder of images, searched recursively"},
        out={"type": Path, "default": Path("metrics.json"), "metavar": "FILE", "help": "file to write"},
        size={"type": int, "metavar": "PIXELS", "help": "image size; by default the backbone's own, else 256"},
        batch_size={"type": int, "default": 16, "help": "images per batch"},
        workers={"type": int, "default": 2, "help": "loader processes"},
        no_rfid={"action": "store_true", "help": "leave out rFID"},
        skip_broken=dict(skip),
    )
    return parser


def run(args: list[str]) -> None:
    """Runs a command of `main.TOOLS`."""
    arguments = _parser().parse_args(args)
    arguments.function(arguments)
