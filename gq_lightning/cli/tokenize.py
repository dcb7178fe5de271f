"""`tokenize` turns the pictures of a data module into two token sets, OUT/train and OUT/val."""

from pathlib import Path

from jsonargparse import ArgumentParser

from gq_lightning.cli.loading import load_tokenizer
from gq_lightning.cli.runs import call, refused
from gq_lightning.data import ImageDataModule, PictureSet
from gq_lightning.distributed import launched_ranks, rank, wait_for_all
from gq_lightning.tokens.tokenizing import Views, class_names, write_token_set


def tokenize(
    tokenizer: str,
    data: ImageDataModule,
    out: Path,
    views: Views = "one",
    batch_size: int = 32,
    shard_pictures: int = 4096,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Encode pictures to token sets. A second call resumes an interrupted one; under torchrun each rank writes its share.

    Args:
        tokenizer: tokenizer's folder, or owner/repository on the hub
        data: data module of the pictures, as for fit: --config configs/data/…; image_size is the size of the encoded images
        out: folder of the two sets, train and val
        views: of a training picture: one as in evaluation, flip adds its mirror image, ten_crop takes centre and corners, mirrored too
        batch_size: pictures encoded together
        shard_pictures: pictures in a file, which is the most that a kill loses
        device: torch device; auto is a GPU if there is one
        threads: CPU threads
    """
    with launched_ranks():
        loaded = load_tokenizer(tokenizer, device, threads)
        if rank() == 0:
            data.prepare_data()
        wait_for_all()
        training = data.training_set()
        classes = class_names(training)
        splits: dict[str, tuple[PictureSet, Views]] = {"train": (training, views), "val": (data.evaluation_set(), "one")}
        for name, (pictures, seen) in splits.items():
            options = (data.image_size, classes, seen, batch_size, data.workers, shard_pictures)
            written = write_token_set(loaded, pictures, out / name, *options)
            if rank() == 0:
                header = written.header
                left_out = f", {len(header.left_out)} broken ones left out" if header.left_out else ""
                tokens = len(written) * header.grid[0] * header.grid[1] * header.grid[2]
                print(f"{out / name}: {len(written)} rows of {' x '.join(map(str, header.grid))} tokens, {tokens} in all{left_out}")


def run(args: list[str]) -> None:
    """Runs `tokenize` with the arguments that follow it. Raises UserError."""
    call(_run, args, "tokenize")


def _run(args: list[str]) -> None:
    parser = ArgumentParser(prog="python -m gq_lightning tokenize", description=tokenize.__doc__.splitlines()[0], exit_on_error=False)  # type: ignore[union-attr]
    parser.add_argument("--config", action="config", help="YAML file, such as configs/data/folder.yaml; more than one, later ones win")
    parser.add_function_arguments(tokenize, as_group=False)
    parsed = parser.parse_args(args)
    try:
        arguments = parser.instantiate(parsed)
    except (ImportError, TypeError, ValueError) as error:
        raise refused(error) from error
    arguments.pop("config", None)
    tokenize(**vars(arguments))
