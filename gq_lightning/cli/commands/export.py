"""A tokenizer to ONNX or torch.export's format, to be run without this package."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from gq_lightning.errors import printable


def run(*, tokenizer: str, out: Path, format: Literal["onnx", "torch"] = "onnx", threads: PositiveInt | None = None) -> None:
    """A tokenizer's encoder, with the search for codewords, and decoder as graphs, compared with it before they are written.

    Args:
        out: folder to write
        format: onnx, for runtimes without torch, or torch, for torch.export.load
    """
    from gq_lightning.cli.loading import load_tokenizer
    from gq_lightning.tokenizer.exporting import SUFFIX, export_tokenizer

    compared = export_tokenizer(load_tokenizer(tokenizer, "cpu", threads), format, out)
    sizes = ", ".join(
        f"{name} of {(out / name).stat().st_size / 1e6:.1f} MB" for name in (f"encoder{SUFFIX[format]}", f"decoder{SUFFIX[format]}")
    )
    print(f"{printable(out)}: {sizes}")
    ties = f"but for {compared.ties} ties" if compared.ties else "all"
    print(f"{compared.tokens} tokens are those of the tokenizer, {ties}; decoded pictures lie at most {compared.difference:.1e} apart")
