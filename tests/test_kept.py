"""Files are for good: the folder, checkpoint and token file in tests/kept must load and give the same picture in every version to come.

They were written by the version that first had this format. A version that cannot read them has a fault; they are never written anew.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gq_lightning import ImageTokenizer
from gq_lightning.data.pictures.reading import to_picture
from gq_lightning.tokens.token_file import read_tokens

KEPT = Path(__file__).parent / "kept"
FINGERPRINT = "c1fcbf4425c538230a740328bc50c6585bc64d308e6725ad04eebe365fab7267"


def test_a_folder_and_its_tokens_stay_readable() -> None:
    tokenizer, file = ImageTokenizer.from_pretrained(KEPT / "tokenizer"), read_tokens(KEPT / "picture.tokens.safetensors")
    assert tokenizer.fingerprint == file.fingerprint == FINGERPRINT
    picture = to_picture(tokenizer.decode(file.tokens[None])[0, :, : file.height, : file.width])
    difference = np.asarray(picture).astype(int) - np.asarray(Image.open(KEPT / "decoded.png")).astype(int)
    assert np.abs(difference).max() <= 1, "processors may round differently"


def test_a_checkpoint_stays_convertible() -> None:
    tokenizer, converted = ImageTokenizer.from_pretrained(KEPT / "tokenizer"), ImageTokenizer.from_checkpoint(KEPT / "last.ckpt")
    assert converted.fingerprint == tokenizer.fingerprint
    tokens = read_tokens(KEPT / "picture.tokens.safetensors").tokens[None]
    assert torch.equal(converted.decode(tokens), tokenizer.decode(tokens))
