"""What the page's handlers call: the models, each loaded once, and one upload through them."""

import logging
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image

from gq_lightning.cli.loading import load_tokenizer
from gq_lightning.cli.web.trial import Trial, is_token_file, try_picture, try_token_file
from gq_lightning.data import to_picture
from gq_lightning.errors import UserError
from gq_lightning.priors import Prior
from gq_lightning.priors.generation import check_fit, first_rows, generate
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.tokenizer.folder import locate

logger = logging.getLogger("gq_lightning.web")


class Work:
    """What the handlers do. Models are loaded once, at their first use. `names` are tokenizers to choose from; token files to be taken away
    lie in `folder`; without a prior, the page has no completion."""

    def __init__(self, names: list[str], prior: str | None, device: str, threads: int | None, folder: Path) -> None:
        self.names, self.folder = names, folder
        self.load: Callable[[str], ImageTokenizer] = cache(lambda name: load_tokenizer(name, device, threads))
        self.prior: tuple[Prior, ImageTokenizer] | None = None
        if prior is not None:
            place = locate(prior, kind="prior")
            decoder = self.load(str(place / "tokenizer"))
            loaded = Prior.from_pretrained(place)
            check_fit(loaded, decoder, str(place / "tokenizer"))
            self.prior = loaded.to(decoder.device), decoder

    def rates(self, name: str) -> int:
        """The bits of its tokens, if they can be cut short, else 0."""
        tokenizer = self.load(name)
        try:
            tokenizer.coarser(1)
        except UserError:
            return 0
        return tokenizer.codebook_size.bit_length() - 1

    def of_fingerprint(self, fingerprint: str) -> ImageTokenizer:
        for tokenizer in map(self.load, self.names):
            if tokenizer.fingerprint == fingerprint:
                return tokenizer
        raise UserError(f"made by tokenizer {fingerprint[:12]}, which is not on this page: start it with --tokenizer FOLDER of that one")

    def show(self, upload: str, name: str, bits: int) -> Trial:
        path, folder = Path(upload), Path(tempfile.mkdtemp(dir=self.folder))
        if is_token_file(path):
            return try_token_file(self.of_fingerprint, path, folder)
        most = self.rates(name)
        return try_picture(self.load(name), path, bits if most and bits < most else None, folder)

    def complete(self, upload: str, seed: int, label: str | None) -> Image.Image:
        assert self.prior is not None
        prior, decoder = self.prior
        if is_token_file(Path(upload)):
            raise UserError("a token file cannot be completed: upload a picture")
        number = prior.labels([label])[0] if label else -1
        given = first_rows(prior, decoder, Path(upload), 0.5)
        return to_picture(next(generate(prior, decoder, [number], [0], seed, given=given)))


def shown(name: str) -> str:
    """A tokenizer's name as the page has it: of a folder its last two parts."""
    return "/".join(Path(name).parts[-2:])


def sentence(error: BaseException, upload: str) -> str:
    """What the page says of an error: never where files lie here."""
    if not isinstance(error, UserError | OSError):
        logger.error("the page could not show %s", upload, exc_info=error)
        return "Something went wrong here; the log of the page's server says what."
    return f"{Path(upload).name}: {str(error).replace(f'{upload}: ', '').replace(str(Path(upload).parent), '')}"
