"""Convert a run, a checkpoint or a VAE of diffusers to a tokenizer by Gaussian Quant."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from gq_lightning.errors import UserError, printable

if TYPE_CHECKING:
    from gq_lightning.tokenizer import ImageTokenizer

# of the pictures on which bits are measured: their side, in pixels, and how many at most
SIDE, MOST = 256, 16


def run(
    source: Path | None = None,
    /,
    *,
    out: Path,
    codebook: Literal["iid", "sobol", "quantile"] | None = None,
    codebook_size: PositiveInt | None = None,
    prior_weight: NonNegativeFloat | None = None,
    seed: int | None = None,
    order: Literal["none", "tree"] | None = None,
    from_diffusers: str | None = None,
    bits: PositiveInt | None = None,
    data: Path | None = None,
) -> None:
    """Convert by Gaussian Quant: freeze the encoder, attach the random codebook, write the tokenizer.

    Args:
        source: run's folder, checkpoint, or tokenizer's folder
        out: folder to write
        codebook: a different generator than in training; quantile is TokenBridge's
        codebook_size: a different size; the tokens per position follow from the rate
        prior_weight: a different weight of the prior
        seed: a different seed of the codebook
        order: tree orders the codewords from coarse to fine, for priors and tokens of fewer bits
        from_diffusers: instead of SOURCE, folder or owner/repository of an AutoencoderKL or AutoencoderTiny, or of a pipeline with one
        bits: rate of --from_diffusers, bits per position
        data: folder of pictures on which the bits of --from_diffusers are measured; by default photographs of scikit-image
    """
    from gq_lightning.callbacks.gaussian_quant import another_codebook, convert
    from gq_lightning.tokenizer import ImageTokenizer
    from gq_lightning.tokenizer.folder import CONFIG

    given = {"codebook": codebook, "codebook_size": codebook_size, "prior_weight": prior_weight, "seed": seed, "order": order}
    changes = {name: value for name, value in given.items() if value is not None}
    others = from_diffusers is not None
    if others == (source is not None) or others == (bits is None) or (data is not None and not others):
        raise UserError("convert: give SOURCE, or --from_diffusers with --bits, and with --data if you like")
    if source is None:
        tokenizer = _from_diffusers(str(from_diffusers), bits or 0, data, changes, out)
    else:
        is_tokenizer = (source / CONFIG).is_file()
        tokenizer = ImageTokenizer.from_pretrained(source) if is_tokenizer else ImageTokenizer.from_checkpoint(source)
        convert(tokenizer, another_codebook(tokenizer.quantizer, changes, str(source)) if changes else None)
    tokenizer.save_pretrained(out)
    tokens = f"{tokenizer.tokens_per_position} tokens of {tokenizer.codebook_size} per position"
    print(f"{printable(out)}: {type(tokenizer.backbone).__name__}, {tokens}")


def _from_diffusers(name: str, bits: int, data: Path | None, codebook: dict[str, Any], out: Path) -> "ImageTokenizer":
    """The tokenizer of a model of others, with the report in OUT/conversion.json and on the console."""
    from rich.console import Console
    from rich.table import Table

    from gq_lightning.data import ImageFolder, Photographs
    from gq_lightning.evaluation.evaluate import some_images
    from gq_lightning.files import write_whole
    from gq_lightning.importers.diffusers import convert

    folder = str(data)
    module = ImageFolder(folder, folder, image_size=SIDE, workers=0) if data is not None else Photographs(SIDE, workers=0)
    tokenizer, report = convert(name, some_images(module.evaluation_set(), MOST), bits, **codebook)
    target = report["bits_per_token"]
    table = Table(
        "token", "channels", "min", "mean", "max", title=f"bits of {report['pictures']} pictures' tokens; a codeword has {target:g}"
    )
    for number, group in enumerate(report["groups"]):
        table.add_row(str(number), ", ".join(map(str, group["channels"])), *(f"{group[which]:.1f}" for which in ("min", "mean", "max")))
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
    print(
        f"{report['posterior_bits_per_position']:.1f} bits per position in the posterior, {bits} in tokens; {report['share_above']:.0%} of "
        f"the tokens cost more than {target + 0.5:g} bits\nPSNR {report['psnr_of_tokens']:.2f} dB from tokens, "
        f"{report['psnr_of_posterior_mean']:.2f} dB from the posterior mean: {report['lost_decibels']:.2f} dB lost"
    )
    advice = f"needed: python -m gq_lightning fit --config … --init_from {out} --name NAME" if report["fine_tune"] else "not needed"
    print(printable(f"fine-tuning under the target divergence: {advice}"))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "conversion.json", (json.dumps(report, indent=1) + "\n").encode())
    return tokenizer
