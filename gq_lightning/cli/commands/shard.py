"""Write a folder of pictures to tar shards, for configs/data/shards.yaml."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat

from gq_lightning.errors import printable


def run(
    folder: Path,
    /,
    *,
    out: Path,
    split: str = "train",
    size: PositiveFloat = 256,  # type: ignore[assignment]
    broken: Literal["leave-out", "keep", "unchecked"] = "leave-out",
    workers: NonNegativeInt = 2,  # type: ignore[assignment]
) -> None:
    """Write a folder of pictures to tar shards with indexes. A second call resumes an interrupted one.

    Args:
        folder: folder of pictures, searched recursively
        out: folder of the shards
        split: prefix of the shards' names
        size: largest size of a shard, in 10^6 bytes
        broken: pictures that cannot be decoded: name them and leave them out, name and keep them, or do not check
        workers: processes that read and decode
    """
    from gq_lightning.data.shards.writing import write_shards

    written = write_shards(folder, out, split, size, broken, workers)
    left_out = f", {len(written.left_out)} broken ones left out" if written.left_out else ""
    print(f"{printable(out)}: {written.shards} shards of {written.pictures} pictures{left_out}")
