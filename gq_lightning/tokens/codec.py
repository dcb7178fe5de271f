"""Pictures to token files and back.

picture --fit_picture--> (3, H, W) --tokenizer.encode--> TokenFile --write_tokens--> NAME.tokens
NAME.tokens --read_tokens--> TokenFile --tokenizer.decode, crop--> picture
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gq_lightning.construction import Size, sides, spelled
from gq_lightning.data.pictures.listing import find_pictures
from gq_lightning.data.pictures.reading import (
    BrokenImage,
    center_crop,
    centred,
    extended,
    load_picture,
    resize_shorter,
    save_picture,
    scale_pixels,
    to_picture,
    to_pixels,
    to_tensor,
)
from gq_lightning.errors import UserError, printable
from gq_lightning.tokens.token_file import SUFFIX, SUFFIXES, Prior, TokenFile, read_tokens, write_tokens

__all__ = ["SUFFIX", "Fit", "TokenFile", "Tokenizer", "decode_pictures", "encode_pictures", "fit_picture", "read_tokens", "write_tokens"]

Fit = Literal["pad", "resize", "crop"]
T = TypeVar("T")
MOST_PIXELS = 2**28  # of a decoded picture; Pillow refuses to read larger ones
Distance = Callable[[Tensor, Tensor], Tensor]


class Tokenizer(Protocol):
    """The interface of a tokenizer that the codec needs."""

    @property
    def downsampling(self) -> int: ...
    @property
    def fixed_image_size(self) -> Size | None: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def tokens_per_position(self) -> int: ...
    @property
    def tokens_fingerprint(self) -> str: ...
    def encode(
        self, images: Tensor, deterministic: bool = False, tile: int | None = None, refine: int = 0, distance: Distance | None = None
    ) -> Tensor: ...
    def decode(self, tokens: Tensor, tile: int | None = None) -> Tensor: ...
    def coarser(self, bits: int) -> "Tokenizer": ...


def fit_picture(picture: Image.Image, fit: Fit, downsampling: int, window: Size | None, size: Size | None) -> tuple[Tensor, int, int, str]:
    """Fits a picture to the tokenizer's grid. Raises UserError if the picture is too small to be cropped.

    Args:
        fit: "pad" extends the picture at the right and the bottom by reflection, to a multiple of `downsampling` that is at least
            `window`; "crop" takes the centre, rounded down to a multiple; "resize" resizes the shorter side to `size`, or to cover
            a height and width, and takes the centre, as in evaluation.

    Returns:
        image (3, H, W) in [-1, 1]; height and width to restore after decoding; a short description, with sizes as height x width.
    """
    before = f"{picture.height}x{picture.width}"
    if fit == "resize":
        assert size is not None  # checked with the other options
        (height, width), picture = sides(size), resize_shorter(picture, size)
        done = f"{before} resized to {picture.height}x{picture.width}, cropped to {height}x{width}"
        return to_tensor(center_crop(picture, size)), height, width, done
    pixels = to_pixels(picture)  # one byte per value; floats would take four, in each of the copies below
    if fit == "crop":
        (height, width), least = (length // downsampling * downsampling for length in pixels.shape[1:]), sides(window or downsampling)
        if height < least[0] or width < least[1]:
            raise UserError(f"{before} is too small to be cropped, it must be at least {least[0]}x{least[1]}: use --fit pad")
        done = f"{before} cropped to {height}x{width}" if (height, width) != pixels.shape[1:] else f"{before} kept"
        top, left = centred(pixels.shape[1], height), centred(pixels.shape[2], width)
        return scale_pixels(pixels[:, top : top + height, left : left + width]), height, width, done
    pixels = extended(pixels, downsampling, window)
    height, width = pixels.shape[1:]
    done = f"{before} padded to {height}x{width}" if (height, width) != (picture.height, picture.width) else f"{before} kept"
    return scale_pixels(pixels), picture.height, picture.width, done


def encode_pictures(
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    out: Path,
    fit: Fit = "pad",
    size: Size | None = None,
    deterministic: bool = False,
    tile: int | None = None,
    skip_broken: bool = False,
    progress: bool = True,
    bits: int | None = None,
    refine: int = 0,
    distance: Distance | None = None,
    prior: Prior | None = None,
) -> list[Path]:
    """Encodes pictures, and folders of pictures with their structure, to token files ``NAME.SUFFIX.tokens`` in `out`.

    Args:
        bits: number of bits of each token to keep, if the tokenizer's codebook is ordered as a tree; None keeps all.
        refine, distance: passes that choose tokens by decoding them, and what they minimise; None is the squared error.
        prior: codes the tokens with its probabilities where that is smaller.

    Raises:
        UserError: the options do not fit the tokenizer, two pictures would have the same token file, there is nothing to encode, or,
            unless `skip_broken`, a picture cannot be read. Skipped pictures are named on standard error.
    """
    _check_fit(fit, size, tokenizer)
    targets: dict[Path, Path] = {}
    for given in (Path(path).expanduser() for path in paths):
        for picture in find_pictures([given]):
            relative = picture.relative_to(given) if given.is_dir() else Path(picture.name)
            _claim(targets, out / relative.with_name(relative.name + SUFFIX), picture)
    fingerprint = tokenizer.tokens_fingerprint  # once, since it hashes all weights; shortened tokens keep that of the full tokenizer
    tokenizer = tokenizer if bits is None else tokenizer.coarser(bits)
    console, errors, written, broken = _console(quiet=not progress), _console(stderr=True), [], 0
    for target, path in _tracked(list(targets.items()), "encoding", console):
        try:
            loaded = load_picture(path)
            try:
                image, height, width, done = fit_picture(loaded, fit, tokenizer.downsampling, tokenizer.fixed_image_size, size)
            except UserError as error:
                raise type(error)(f"{path}: {error}") from error
        except BrokenImage as error:
            if not skip_broken:
                raise
            broken += 1
            errors.print(str(error))
            continue
        with warnings.catch_warnings():
            # pictures are scaled here, so a bright one is no mistake
            warnings.filterwarnings("ignore", message="images have no value below 0")
            tokens = tokenizer.encode(image[None], deterministic, tile, refine, distance)[0].cpu()
        token_file = TokenFile(tokens, height, width, done, fingerprint, tokenizer.codebook_size, tokenizer.downsampling)
        write_tokens(target, token_file, prior)
        written.append(target)
        stored = target.stat().st_size
        rate = f"{tokens.numel()} tokens, {token_file.bits:.0f} bits, {token_file.bits_per_pixel:.4f} bits per pixel"
        rate = f"{rate}, a file of {stored} bytes, {8 * stored / (height * width):.4f}"
        console.print(printable(f"{path}: {done}, {rate}"))
    if broken:
        errors.print(f"{broken} of {len(targets)} pictures were broken and skipped")
    if not written:
        raise UserError(f"none of the {len(targets)} pictures could be read: nothing was encoded")
    return written


def decode_pictures(
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    out: Path,
    tile: int | None = None,
    progress: bool = True,
    any_tokenizer: bool = False,
    prior: Prior | None = None,
) -> list[Path]:
    """Decodes token files, and folders of token files with their structure, to PNG files in `out`; `prior` is for files that were coded
    with it.

    ``a.jpg.tokens`` becomes ``a.png``, or ``a.jpg.png`` if two token files of this call would become ``a.png``. Raises UserError if a token
    file is damaged or belongs to another tokenizer, unless `any_tokenizer` is given and the geometry fits, or a picture next to its token
    file would be overwritten.
    """
    sources = [(source, Path(source.name) if given == source else source.relative_to(given)) for given, source in _token_files(paths)]
    names = [relative.with_name(_without_suffix(relative.name)) for _, relative in sources]
    ambiguous = Counter(name.with_suffix(".png") for name in set(names))
    targets: dict[Path, Path] = {}
    for (source, _), name in zip(sources, names, strict=True):
        short = name.with_suffix(".png")
        target = out / (short if ambiguous[short] == 1 else name.with_name(name.name + ".png"))
        if target.exists() and target.parent.samefile(source.parent):
            raise UserError(f"{target} exists already and may be the original of {source.name}: choose another --out")
        _claim(targets, target, source)
    fingerprint = tokenizer.tokens_fingerprint  # once, since it hashes all weights
    console, written = _console(quiet=not progress), []
    for target, source in _tracked(list(targets.items()), "decoding", console):
        token_file = read_tokens(source, prior)
        if token_file.fingerprint != fingerprint and not any_tokenizer:
            theirs = f"made by tokenizer {token_file.fingerprint[:12]}, this one is {fingerprint[:12]}"
            raise UserError(f"{source}: {theirs}: decode with that one, or allow --any_tokenizer")
        _check_geometry(source, token_file, tokenizer)
        cut_short = token_file.fingerprint == fingerprint and token_file.codebook_size < tokenizer.codebook_size
        decoder = tokenizer.coarser(token_file.codebook_size.bit_length() - 1) if cut_short else tokenizer
        image = decoder.decode(token_file.tokens[None], tile=tile)[0].float().cpu()
        save_picture(to_picture(image[:, : token_file.height, : token_file.width]), target)
        written.append(target)
        said = f"{target}: {token_file.height}x{token_file.width} from {token_file.tokens.numel()} tokens ({token_file.fit})"
        console.print(printable(said))
    return written


def check_size(tokenizer: Tokenizer, option: str, size: Size) -> None:
    """Raises UserError, naming the option and a size that fits, unless the tokenizer can encode images of this size."""
    step, least = tokenizer.downsampling, sides(tokenizer.fixed_image_size or tokenizer.downsampling)
    if any(side < smallest or side % step for side, smallest in zip(sides(size), least, strict=True)):
        height, width = (max(side // step * step, smallest) for side, smallest in zip(sides(size), least, strict=True))
        asked, smallest, nearest = (spelled(each) for each in (size, least, (height, width)))
        raise UserError(f"{option} {asked}: use a multiple of {step} that is at least {smallest}, such as {nearest}")


def _check_fit(fit: str, size: Size | None, tokenizer: Tokenizer) -> None:
    if fit not in get_args(Fit):
        raise UserError(f"--fit {fit}: use one of {', '.join(get_args(Fit))}")
    if (size is None) == (fit == "resize"):
        raise UserError("--fit resize needs --size" if size is None else f"--size {size} is for --fit resize, not for --fit {fit}")
    if size is not None:
        check_size(tokenizer, "--size", size)


def _check_geometry(path: Path, token_file: TokenFile, tokenizer: Tokenizer) -> None:
    theirs_and_ours = {
        "downsampling": (token_file.downsampling, tokenizer.downsampling),
        "tokens per position": (token_file.tokens.shape[2], tokenizer.tokens_per_position),
    }
    for name, (has, needs) in theirs_and_ours.items():
        if has != needs:
            raise UserError(f"{path}: {name} is {has}, but {needs} for this tokenizer: decode with the one that made it")
    height, width = (side * token_file.downsampling for side in token_file.tokens.shape[:2])
    if height * width > MOST_PIXELS:  # a flat grid takes a few bytes, so that the file's size bounds nothing
        raise UserError(f"{path}: {height} x {width} pixels are more than {MOST_PIXELS}: encode the picture in parts")
    highest = int(token_file.tokens.max())
    if highest >= tokenizer.codebook_size:
        size = tokenizer.codebook_size
        raise UserError(f"{path}: token {highest} is out of range, this codebook has {size}: decode with the one that made it")


def _token_files(paths: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    for given in (Path(path).expanduser() for path in paths):
        found = sorted(path for suffix in SUFFIXES for path in given.rglob(f"*{suffix}")) if given.is_dir() else [given]
        if not found:
            raise UserError(f"{given}: no file with the suffix {' or '.join(SUFFIXES)} in this folder: give a folder of token files")
        yield from ((given, source) for source in found)


def _without_suffix(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name) or name


def _claim(targets: dict[Path, Path], target: Path, source: Path) -> None:
    other = targets.setdefault(target, source)
    if not (other == source or (other.exists() and source.exists() and other.samefile(source))):
        raise UserError(f"{other} and {source} would both be written to {target}: give them different --out folders")


def _tracked(items: Sequence[T], verb: str, console: Console) -> Iterator[T]:
    yield from track(items, verb, console=console, transient=True, disable=console.quiet or not console.is_terminal)


def _console(**settings: bool) -> Console:
    # file names may contain brackets, which are not markup, and colons, which are not emoji
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, **settings)  # type: ignore[arg-type]
