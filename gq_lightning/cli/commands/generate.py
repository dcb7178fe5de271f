"""Generate pictures from a prior."""

import json
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

ON_SHEET = 64  # pictures


def run(
    *,
    prior: str,
    out: Path,
    count: PositiveInt = 16,  # type: ignore[assignment]
    classes: str | None = None,
    tokenizer: str | None = None,
    from_: Path | None = None,
    keep: float = 0.5,
    cfg: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: NonNegativeInt = 0,  # type: ignore[assignment]
    batch_size: PositiveInt = 16,  # type: ignore[assignment]
    device: str = "auto",
    threads: PositiveInt | None = None,
) -> None:
    """Generate pictures from a prior: PNG files and a contact sheet. A seed fixes the pictures; under torchrun each rank draws its share.

    Args:
        prior: folder of a prior or of its run, or owner/repository on the hub
        out: folder of the pictures
        count: number of pictures, cycling through the classes
        classes: names or numbers of classes, separated by commas; by default all
        tokenizer: folder of the tokenizer that the prior belongs to; by default the one in the prior's folder
        from_: picture whose upper rows are kept; the prior draws the rest
        keep: share of the rows that are kept
        cfg: classifier-free guidance scale; 1 is no guidance
        top_k: draw from the k likeliest symbols
        top_p: draw from the likeliest symbols that together have this probability
        temperature: divides the logits
        seed: of all random numbers
        batch_size: pictures drawn together
    """
    from torchvision.utils import make_grid

    from gq_lightning.cli.loading import load_tokenizer
    from gq_lightning.data import load_picture, to_picture, to_tensor
    from gq_lightning.data.pictures.progress import progress
    from gq_lightning.data.pictures.reading import save_picture
    from gq_lightning.distributed import launched_ranks, rank, ranks, wait_for_all
    from gq_lightning.evaluation.evaluate import SHEET, TOLD
    from gq_lightning.files import write_whole
    from gq_lightning.priors import Prior
    from gq_lightning.priors.generation import check_fit, first_rows, generate
    from gq_lightning.priors.sampling import Sampling
    from gq_lightning.tokenizer.folder import locate

    sampling = Sampling(cfg, top_k, top_p, temperature)
    with launched_ranks():
        folder = locate(prior, kind="prior")
        loaded = Prior.from_pretrained(folder)
        source = str(folder / "tokenizer") if tokenizer is None else tokenizer
        decoder = load_tokenizer(source, device, threads)
        check_fit(loaded, decoder, source)
        loaded = loaded.to(decoder.device)
        chosen = loaded.labels(classes.split(",")) if classes is not None else list(range(len(loaded.classes))) or [-1]
        labels = [chosen[number % len(chosen)] for number in range(count)]
        given = None if from_ is None else first_rows(loaded, decoder, from_, keep)
        numbers = range(rank(), count, ranks())
        with progress(f"drawing {out}, pictures", len(numbers)) as advance:
            mine = [labels[number] for number in numbers]
            pictures = generate(loaded, decoder, mine, numbers, seed, sampling, given, batch_size, advance)
            for number, picture in zip(numbers, pictures, strict=True):
                save_picture(to_picture(picture), out / f"{number:06d}.png")
        wait_for_all()
        if rank() == 0:
            first = [to_tensor(load_picture(out / f"{number:06d}.png")) for number in range(min(count, ON_SHEET))]
            save_picture(to_picture(make_grid(first, nrow=8, pad_value=1)), out / SHEET)
            told = {"seed": seed, "sampling": vars(sampling), "prior": loaded.fingerprint, "from": from_ and from_.name, "keep": keep}
            told |= {"pictures": count, "classes": [loaded.classes[label] if label >= 0 else "" for label in labels]}
            write_whole(out / TOLD, (json.dumps(told, indent=1) + "\n").encode())
            print(f"{out}: {count} pictures, the first ones side by side in sheet.png")
