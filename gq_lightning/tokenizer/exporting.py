"""A tokenizer as two graphs that need none of this package: ONNX, for runtimes without torch, or `torch.export`'s.

    images (B, 3, H, W) in [-1, 1] --encoder--> tokens (B, h, w, n) int64 --decoder--> images (B, 3, H, W) in [-1, 1]

They are `ImageTokenizer.encode` and `decode` as they stand, without the checks of values. B is free, and so are H and W, multiples of the
downsampling, unless the backbone has one image size. A graph is compared with the tokenizer before it is written.
"""

import io
import json
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gq_lightning.construction import sides
from gq_lightning.errors import UserError
from gq_lightning.files import write_whole
from gq_lightning.tokenizer.module import ImageTokenizer

Format = Literal["onnx", "torch"]
SUFFIX: Mapping[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
FACTS = "tokenizer.json"
# how far decoded pictures may lie apart; and, as a share of their size, features between which another token is a tie
TOLERANCE = 1e-4
TRIES = 32


class _Half(nn.Module):
    def __init__(self, tokenizer: ImageTokenizer, verb: Literal["encode", "decode"]) -> None:
        super().__init__()
        self.tokenizer, self.verb = tokenizer, verb

    def forward(self, given: Tensor) -> Tensor:
        return self.tokenizer.encode(given) if self.verb == "encode" else self.tokenizer.decode(given)


@dataclass(frozen=True)
class Comparison:
    """The graphs beside the tokenizer: how many `tokens` were compared, how many differ as `ties`, where rounding decides between codewords
    that fit equally well, and the largest `difference` of a decoded value."""

    tokens: int
    ties: int
    difference: float


def export_tokenizer(tokenizer: ImageTokenizer, format: Format, folder: Path) -> Comparison:
    """Writes encoder and decoder of a tokenizer in float32 on the CPU, and in `FACTS` what a user of their tokens should know, to a folder.

    Raises UserError if a part of the tokenizer cannot be exported, a library is missing, or the graphs give something else.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if format == "onnx" and find_spec(library) is None:
            raise UserError(f"--format onnx: {library} is not installed: pip install 'gq_lightning[onnx]', or use --format torch")
    if tokenizer.dtype != torch.float32:
        raise UserError(f"export: the tokenizer is {tokenizer.dtype}, and a graph of it would be float32: save it after .float() first")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before minutes of work
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}: choose another place") from error
    step, window, names = tokenizer.downsampling, tokenizer.fixed_image_size, ("images", "tokens")
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    images = torch.zeros(2, 3, *(sides(window) if window else (4 * step, 5 * step)))
    tokens = torch.zeros(2, images.shape[2] // step, images.shape[3] // step, tokenizer.tokens_per_position, dtype=torch.int64)
    free = ({}, {}) if window else ({2: step * height, 3: step * width}, {1: height, 2: width})
    encoder = _graph(_Half(tokenizer, "encode"), images, {0: batch, **free[0]}, format, names)
    decoder = _graph(_Half(tokenizer, "decode"), tokens, {0: batch, **free[1]}, format, names[::-1])
    compared = _compare(tokenizer, _runner(encoder, format), _runner(decoder, format))
    write_whole(folder / f"encoder{SUFFIX[format]}", encoder)
    write_whole(folder / f"decoder{SUFFIX[format]}", decoder)
    write_whole(folder / FACTS, (json.dumps(tokenizer.facts() | {"fixed_image_size": window}, indent=2) + "\n").encode())
    return compared


def _graph(module: nn.Module, example: Tensor, free: Mapping[int, Any], format: Format, names: tuple[str, str]) -> bytes:
    """The file of one half, with the axes `free` of its input left open."""
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's about itself
            program = torch.export.export(module, (example,), dynamic_shapes=(dict(free),))
            if format == "torch":
                torch.export.save(program, buffer)
                return buffer.getvalue()
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names[:1], output_names=names[1:])
            assert onnx is not None
            return onnx.model_proto.SerializeToString()
    except UserError:
        raise
    except Exception as error:  # of any library below
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        where = _culprit(module.tokenizer, error)  # type: ignore[arg-type]
        raise UserError(
            f"export: {where} cannot be exported to {format} ({type(error).__name__}: {reason[:200]}): use it in torch"
        ) from error


def _culprit(tokenizer: ImageTokenizer, error: BaseException | None) -> str:
    """The class of the part in which tracing failed, or both."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if (part := frame.f_locals.get("self")) is tokenizer.backbone or part is tokenizer.quantizer:
                return type(part).__name__
        error = error.__cause__ or error.__context__
    return f"{type(tokenizer.backbone).__name__} with {type(tokenizer.quantizer).__name__}"


def _runner(graph: bytes, format: Format) -> Callable[[Tensor], Tensor]:
    """What runs a graph as its user will, from its bytes."""
    if format == "torch":
        return torch.export.load(io.BytesIO(graph)).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda value: torch.from_numpy(session.run(None, {given.name: value.numpy()})[0])


@torch.no_grad()
def _compare(tokenizer: ImageTokenizer, encoder: Callable[[Tensor], Tensor], decoder: Callable[[Tensor], Tensor]) -> Comparison:
    """On smooth random pictures of other batches and sizes than were traced. Raises UserError where they are too far apart."""
    generator, step, window = torch.Generator().manual_seed(0), tokenizer.downsampling, tokenizer.fixed_image_size
    count, ties, difference = 0, 0, 0.0
    for batch, height, width in ((1, 8, 6), (3, 2, 7)):
        size = sides(window or (height * step, width * step))
        images = functional.interpolate(torch.rand(batch, 3, 5, 5, generator=generator) * 2 - 1, size, mode="bilinear")
        tokens, found = tokenizer.encode(images), encoder(images)
        same = found == tokens
        count, ties = count + same.numel(), ties + int((~same).sum())
        features = tokenizer.backbone.encode(images).movedim(1, -1)
        for _ in range(TRIES):  # it is a tie if features within rounding have it
            if same.all():
                break
            noise = torch.randn(features.shape, generator=generator) * (TOLERANCE * features.square().mean().sqrt())
            same |= tokenizer.quantizer.tokenize(features + noise) == found
        if not same.all():
            wrong = int((~same).sum())
            raise UserError(
                f"export: {wrong} of {same.numel()} tokens are others than those of the tokenizer: report it with its config.json"
            )
        difference = max(difference, float((decoder(tokens) - tokenizer.decode(tokens)).abs().max()))
    if not difference <= TOLERANCE:
        raise UserError(f"export: decoded pictures lie {difference:g} apart, more than {TOLERANCE:g}: report it with its config.json")
    return Comparison(count, ties, difference)
