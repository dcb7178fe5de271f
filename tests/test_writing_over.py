"""A tokenizer written over another: at every moment the folder holds one of both, whole."""

import os
import threading
from pathlib import Path

import pytest
from small import small_tokenizer

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.files import whole
from gq_lightning.quantizers import GaussianQuantizer

NAMES = {"README.md", "config.json", "model.safetensors"}


def tokenizers() -> list[ImageTokenizer]:
    """Of equal shapes, so that nothing but their content tells them apart."""
    return [small_tokenizer("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=256, seed=seed)) for seed in (1, 2)]


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_in_between(steps: int, tmp_path: Path) -> None:
    old, new = tokenizers()
    old.save_pretrained(tmp_path)
    child = os.fork()
    if child == 0:
        rename, left = os.replace, [steps]

        def until(*names: object) -> None:
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            rename(*names)  # type: ignore[arg-type]

        os.replace = until  # type: ignore[assignment]
        new.save_pretrained(tmp_path)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (9 if steps < 4 else 0), "four names change: the weights', twice, the card's and the config's"
    found = ImageTokenizer.from_pretrained(tmp_path).fingerprint
    assert found == (old if steps < 3 else new).fingerprint
    whole._leftovers.cache_clear()  # which a process lists once
    old.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NAMES, "the next one tidies up"
    assert ImageTokenizer.from_pretrained(tmp_path).fingerprint == old.fingerprint


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    both = tokenizers()
    expected = {tokenizer.fingerprint for tokenizer in both}
    both[0].save_pretrained(tmp_path)
    wrong: list[object] = []

    def write(tokenizer: ImageTokenizer) -> None:
        for _ in range(15):
            tokenizer.save_pretrained(tmp_path)

    def read() -> None:
        while any(writer.is_alive() for writer in writers):
            try:
                found: object = ImageTokenizer.from_pretrained(tmp_path).fingerprint
            except UserError as error:
                found = str(error)
            if found not in expected:
                wrong.append(found)

    writers = [threading.Thread(target=write, args=(tokenizer,)) for tokenizer in both]
    threads = [*writers, threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and {path.name for path in tmp_path.iterdir()} == NAMES
