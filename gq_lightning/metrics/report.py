"""Metrics for people: a table of tokens and the Gaussian VAE that they replace, side by side, and a warning where one is due."""

from collections.abc import Mapping

from rich.table import Table

# name, heading, format
PAIRED = (
    ("psnr", "PSNR (dB)", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("ms_ssim", "MS-SSIM", ".4f"),
    ("lpips", "LPIPS", ".4f"),
    ("rfid", "rFID", ".2f"),
)
SINGLE = (
    ("bits_per_pixel", "bits per pixel", ".4g"),
    ("bits_mean", "bits per token, mean", ".2f"),
    ("bits_min", "bits per token, min", ".2f"),
    ("bits_max", "bits per token, max", ".2f"),
    ("share_within_alpha", "tokens within target ± alpha", ".1%"),
    ("codebook_usage", "codebook usage", ".2%"),
    ("codebook_usage_expected", "usage of as many uniform tokens", ".2%"),
    ("codebook_perplexity", "codebook perplexity", ".0f"),
)


def collapse(values: Mapping[str, float]) -> str | None:
    """What is wrong with the codebook, in a sentence, or None: usage under 1 %, unless there were too few tokens to expect more."""
    used, expected = values["codebook_usage"], values["codebook_usage_expected"]
    if used >= min(0.01, expected / 4):
        return None
    return f"the codebook has collapsed: the tokens use {used:.3%} of its codewords, where as many uniform tokens would use {expected:.2%}"


def metrics_table(values: Mapping[str, float], title: str) -> Table:
    """Rows of metrics; those that were not measured are left out."""
    both = "gaussian_psnr" in values
    table = Table("metric", "tokens", *(["Gaussian VAE"] if both else []), title=title, title_justify="left")
    for name, heading, form in PAIRED:
        columns = [name, f"gaussian_{name}"] if both else [name]
        if name in values:
            table.add_row(heading, *(format(values[column], form) if column in values else "-" for column in columns))
    table.add_section()
    for name, heading, form in SINGLE:
        if name in values:
            table.add_row(heading, format(values[name], form))
    return table
