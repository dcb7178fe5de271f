"""List the tokenizers shipped with the package."""


def run() -> None:
    """List the tokenizers shipped with the package: `encode --tokenizer NAME`, `ImageTokenizer.from_pretrained("NAME")`."""
    from rich.console import Console
    from rich.table import Table

    from gq_lightning.tokenizer.box import BOX, measured, names

    table = Table("name", "bits per pixel", "MB", "Kodak: PSNR", "SSIM", "LPIPS")
    for name in names():
        numbers = measured(name)
        kodak, size = numbers["kodak"], (BOX / name / "model.safetensors").stat().st_size
        quality = (f"{kodak['psnr']:.2f} dB", f"{kodak['ssim']:.3f}", f"{kodak['lpips']:.3f}")
        table.add_row(name, f"{kodak['bits_per_pixel']:g}", f"{size / 1e6:.1f}", *quality)
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
    print(f"Cards: {BOX}/NAME/README.md")
