"""Measure a tokenizer on a folder of images, or generated pictures against a reference."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from gq_lightning.errors import UserError, printable

if TYPE_CHECKING:
    from gq_lightning.tokenizer import ImageTokenizer


def run(
    *,
    tokenizer: str | None = None,
    data: Path | None = None,
    generated: Path | None = None,
    reference: Path | None = None,
    out: Path = Path("metrics.json"),
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | Literal["whole"] | None = None,
    tile: PositiveInt | None = None,
    batch_size: PositiveInt = 16,  # type: ignore[assignment]
    workers: NonNegativeInt = 2,  # type: ignore[assignment]
    rfid: bool = True,
    gaussian: bool = True,
    skip_broken: bool = False,
    device: str = "auto",
    threads: PositiveInt | None = None,
) -> None:
    """Measure a tokenizer on a folder of images, each resized and centre-cropped to --size or whole, or generated pictures.

    Args:
        data: folder of images, searched recursively
        generated: folder of generated pictures, or an .npz file of them; measures gFID, sFID, Inception score, precision and recall
        reference: of --generated: folder of pictures, or an .npz file of pictures or statistics in ADM's format
        out: file to write
        size: image size in pixels, a number or [height,width], or whole: pictures as they are, padded as by encode; by default the
            backbone's fixed size, else 256
        tile: reconstruct large pictures in overlapping tiles of this side, in pixels, to bound memory; a ViT has tiles of its own size
        batch_size: images per batch; whole pictures come one at a time
        workers: loader processes
        rfid: measure rFID too
        gaussian: measure the Gaussian VAE too, by images decoded from the posterior mean; without, about half the time
        skip_broken: name and count pictures that cannot be decoded instead of stopping
    """
    given = [value for value in (tokenizer, data, generated, reference) if value]
    loading = {"batch_size": batch_size, "workers": workers, "skip_broken": skip_broken}
    if tokenizer is not None and data is not None and len(given) == 2:
        from gq_lightning.cli.loading import load_tokenizer

        measured = {"rfid": rfid, "gaussian": gaussian, "tile": tile}
        _of_a_tokenizer(load_tokenizer(tokenizer, device, threads), data, out, size, loading, measured)
    elif generated is not None and reference is not None and len(given) == 2:
        for option, default in {"--size": size is None, "--tile": tile is None, "--no_rfid": rfid, "--no_gaussian": gaussian}.items():
            if not default:
                raise UserError(f"{option}: is for --tokenizer, not for --generated: leave it out")
        _of_pictures(generated, reference, out, device, threads, loading)
    else:
        wanted = "--tokenizer and --data, or --generated and --reference"
        raise UserError(f"evaluate: give {wanted} (see python -m gq_lightning evaluate --help)")


def _of_a_tokenizer(loaded: "ImageTokenizer", data: Path, out: Path, size: Any, loading: dict[str, Any], measured: dict[str, Any]) -> None:
    from rich.console import Console

    from gq_lightning.data import ImageFolder
    from gq_lightning.data.sets import Whole
    from gq_lightning.evaluation.evaluate import evaluate, whole_protocol, write_metrics
    from gq_lightning.evaluation.report import metrics_table
    from gq_lightning.tokens.codec import check_size

    side, whole = (size or loaded.fixed_image_size or 256), {}
    if side == "whole":
        module = ImageFolder(root=str(data), validation_root=str(data), **{**loading, "batch_size": 1})
        module.evaluation_crop = Whole()
        whole = whole_protocol(loaded, measured["tile"])
    else:
        check_size(loaded, "--size", side)
        module = ImageFolder(root=str(data), validation_root=str(data), image_size=side, **loading)
    values, protocol = evaluate(loaded, module.test_dataloader(), **measured)
    skipped: dict[str, int] = {"skipped_pictures": module.skipped} if module.skipped else {}
    write_metrics(out, values, protocol, module.protocol() | whole, tokenizer_fingerprint=loaded.fingerprint, **skipped)
    console = Console(soft_wrap=True, markup=False, emoji=False)
    console.print(metrics_table(values, title=f"{values['images']} images of {printable(data)}"))
    console.print(printable(out))
    if skipped:  # a warning has named each
        print(f"{module.skipped} of {module.skipped + values['images']} pictures were broken and skipped", file=sys.stderr)


def _of_pictures(generated: Path, reference: Path, out: Path, device: str, threads: int | None, options: dict[str, int]) -> None:
    from rich.console import Console

    from gq_lightning.cli.loading import choose_device
    from gq_lightning.evaluation.evaluate import write_metrics
    from gq_lightning.evaluation.generated import evaluate_generated, generation_table

    values, protocol, pictures = evaluate_generated(generated, reference, choose_device(device, threads), **options)
    write_metrics(out, values, protocol, pictures)
    for name, reason in protocol["left_out"].items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    console = Console(soft_wrap=True, markup=False, emoji=False)
    console.print(generation_table(values, f"{printable(generated)} against {printable(reference)}"))
    console.print(printable(out))
