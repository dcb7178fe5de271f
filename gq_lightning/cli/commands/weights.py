"""Fetch and verify the LPIPS and Inception weights."""


def run() -> None:
    """Fetch and verify the weights of LPIPS and of rFID's Inception, and print where they are."""
    from rich.console import Console
    from rich.table import Table

    from gq_lightning import weights

    table = Table("weights", "MB", "SHA-256 of the content", "file")
    for name in weights.WEIGHTS:
        path = weights.fetch(name)
        table.add_row(name, f"{path.stat().st_size / 1e6:.1f}", weights.checksum(name)[:16] + "…", str(path))
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
