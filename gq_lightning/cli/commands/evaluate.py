"""Measure a tokenizer on a folder of images."""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from gq_lightning.errors import printable


def run(
    *,
    tokenizer: str,
    data: Path,
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
    """Measure a tokenizer on a folder of images, each resized and centre-cropped to --size, or whole.

    Args:
        tokenizer: a name of `models`, folder of a tokenizer or a run, or owner/repository on the hub
        data: folder of images, searched recursively
        out: file to write
        size: image size in pixels, a number or [height,width], or whole: pictures as they are, padded as by encode; by default the
            backbone's fixed size, else 256
        tile: reconstruct large pictures in overlapping tiles of this side, in pixels, to bound memory
        batch_size: images per batch; whole pictures come one at a time
        workers: loader processes
        rfid: measure rFID too
        gaussian: measure the Gaussian VAE too, by images decoded from the posterior mean; without, about half the time
        skip_broken: name and count pictures that cannot be decoded instead of stopping
        device: torch device; auto is a GPU if there is one
        threads: CPU threads
    """
    from rich.console import Console

    from gq_lightning.cli.loading import load_tokenizer
    from gq_lightning.data import ImageFolder
    from gq_lightning.data.sets import Whole
    from gq_lightning.evaluation.evaluate import evaluate, whole_protocol, write_metrics
    from gq_lightning.metrics.report import metrics_table
    from gq_lightning.tokens.codec import check_size

    loaded = load_tokenizer(tokenizer, device, threads)
    side, whole = (size or loaded.fixed_image_size or 256), {}
    folder, options = str(data), {"workers": workers, "skip_broken": skip_broken}
    if side == "whole":
        module = ImageFolder(root=folder, validation_root=folder, batch_size=1, **options)
        module.evaluation_crop = Whole()
        whole = whole_protocol(loaded, tile)
    else:
        check_size(loaded, "--size", side)
        module = ImageFolder(root=folder, validation_root=folder, image_size=side, batch_size=batch_size, **options)
    values, protocol = evaluate(loaded, module.test_dataloader(), rfid=rfid, gaussian=gaussian, tile=tile)
    skipped: dict[str, int] = {"skipped_pictures": module.skipped} if module.skipped else {}
    write_metrics(out, values, protocol, module.protocol() | whole, tokenizer_fingerprint=loaded.fingerprint, **skipped)
    console = Console(soft_wrap=True, markup=False, emoji=False)
    console.print(metrics_table(values, title=f"{values['images']} images of {printable(data)}"))
    console.print(printable(out))
    if skipped:  # a warning has named each
        print(f"{module.skipped} of {module.skipped + values['images']} pictures were broken and skipped", file=sys.stderr)
