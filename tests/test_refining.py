"""Tokens chosen through the decoder: never worse, as good as an exhaustive search where that can be, and the regions they are judged in."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import small_tokenizer
from torch import Tensor

from gq_lightning import UserError
from gq_lightning.data.pictures.reading import to_picture
from gq_lightning.quantizers import FiniteScalarQuantizer, GaussianQuantizer, LookupFreeQuantizer, Quantizer, TokenBridge, VectorQuantizer
from gq_lightning.tokenizer.refining import _regions, field_of_view, refine, squared_error
from gq_lightning.tokens.codec import decode_pictures, encode_pictures
from gq_lightning.tokens.token_file import read_tokens


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1, (height, width))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56)])
@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_pictures_come_nearer_and_never_go_further(backbone: str, height: int, width: int) -> None:
    tokenizer, images = small_tokenizer(backbone).eval(), pictures(2, height, width)
    plain, refined = tokenizer.encode(images), tokenizer.encode(images, refine=1)
    before, after = (squared_error(tokenizer.decode(tokens), images) for tokens in (plain, refined))
    assert refined.shape == plain.shape and not torch.equal(refined, plain)
    assert (after <= before).all() and after.sum() < before.sum()
    assert torch.equal(tokenizer.encode(images, refine=0), plain)


@pytest.mark.parametrize(
    "quantizer",
    [FiniteScalarQuantizer(16, [4] * 8), FiniteScalarQuantizer(16, [2, 3] * 6), VectorQuantizer(16, codebook_size=256), TokenBridge(16, 4)],
    ids=["fsq", "fsq symmetric", "vq", "tokenbridge"],
)
def test_other_quantizers_refine_too(quantizer: Quantizer) -> None:
    tokenizer, images = small_tokenizer("unet", quantizer).eval(), pictures(2, 16, 24)
    refined = tokenizer.encode(images, refine=1)
    assert (squared_error(tokenizer.decode(refined), images) <= squared_error(tokenizer.decode(tokenizer.encode(images)), images)).all()


@pytest.mark.parametrize(
    "quantizer",
    [
        GaussianQuantizer(32, 8, 256),
        FiniteScalarQuantizer(32, [8, 8, 8, 5, 5, 5]),
        FiniteScalarQuantizer(16, [2] * 16),
        VectorQuantizer(16),
    ],
    ids=["gaussian", "fsq", "fsq symmetric", "vq"],
)
def test_the_first_candidate_is_the_token(quantizer: Quantizer) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, quantizer.encoder_channels)
    candidates = quantizer.candidates(features, 9)
    assert candidates.shape == (3, 5, quantizer.tokens_per_position, 9)
    assert torch.equal(candidates[..., 0], quantizer.tokenize(features))
    assert all(len(row.unique()) == 9 for row in candidates.flatten(0, -2))
    with pytest.raises(UserError, match="k: "):
        quantizer.candidates(features, 2**17)


def test_candidates_of_fsq_are_the_nearest_points_of_its_grid() -> None:
    quantizer = FiniteScalarQuantizer(12, [4] * 6)
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    points = quantizer.detokenize(torch.arange(4096)[:, None])
    bounded = torch.tanh(features + torch.atanh(torch.tensor(0.5 / 1.5015))) * 1.5015 - 0.5
    nearest = torch.cdist(bounded.double(), points.double() * 2).argsort(1)[:, :16]
    assert torch.equal(quantizer.candidates(features, 16)[:, 0], nearest)


def test_what_has_no_candidates_says_so() -> None:
    tokenizer = small_tokenizer("unet", LookupFreeQuantizer(16))
    with pytest.raises(UserError, match="refine: LookupFreeQuantizer .*leave it out"):
        tokenizer.encode(pictures(1, 16, 16), refine=1)
    with pytest.raises(UserError, match="refine: -1 passes"):
        tokenizer.encode(pictures(1, 16, 16), refine=-1)


def test_tokens_that_do_not_meet_are_chosen_as_by_an_exhaustive_search() -> None:
    """A decoder that paints a square for each token: the best of every token is the best of all together."""
    generator = torch.Generator().manual_seed(2)
    candidates = torch.randint(0, 256, (2, 2, 3, 1, 5), generator=generator)
    images = torch.rand(2, 3, 8, 12, generator=generator)

    def decode(tokens: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(tokens.movedim(-1, 1) / 255.0, scale_factor=4).expand(-1, 3, -1, -1)

    assert field_of_view(decode, candidates) == 1
    tokens, distances = refine(decode, images, candidates)
    for picture, original, options, distance in zip(tokens, images, candidates, distances, strict=True):
        every = torch.tensor(list(itertools.product(*options.flatten(0, -2).tolist()))).view(-1, 2, 3, 1)
        errors = squared_error(decode(every), original[None].expand(len(every), -1, -1, -1))
        torch.testing.assert_close(errors.amin(), distance)
        assert torch.equal(every[errors.argmin()], picture)


def test_a_leak_never_makes_a_picture_worse() -> None:
    """A decoder where every token moves all of the picture a little, which no region sees."""
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(0, 256, (4, 6, 6, 1, 8), generator=generator)
    images = torch.rand(4, 3, 12, 12, generator=generator)

    def decode(tokens: Tensor) -> Tensor:
        own = torch.nn.functional.interpolate(tokens.movedim(-1, 1) / 255.0, scale_factor=2).expand(-1, 3, -1, -1)
        return own - own.mean((1, 2, 3), keepdim=True)

    _, distances = refine(decode, images, candidates, passes=3)
    assert (distances <= squared_error(decode(candidates[..., 0]), images)).all()


@pytest.mark.parametrize(("spacing", "row", "column"), [(1, 0, 0), (2, 1, 0), (3, 0, 2), (5, 4, 1), (9, 2, 3)])
def test_regions_are_the_squares_around_their_positions(spacing: int, row: int, column: int) -> None:
    height, width, cell = 5, 7, 2
    pixels = torch.arange(height * width * cell**2).view(1, 1, height * cell, width * cell) + 1.0
    found = _regions(pixels, row, column, spacing, cell)
    expected = []
    for i in range(row, height, spacing):
        for j in range(column, width, spacing):
            padded = torch.nn.functional.pad(pixels, [spacing * cell] * 4)
            top, left = ((place - spacing // 2 + spacing) * cell for place in (i, j))
            rows = slice(top, top + spacing * cell) if spacing < height else slice(spacing * cell, -spacing * cell)
            columns = slice(left, left + spacing * cell) if spacing < width else slice(spacing * cell, -spacing * cell)
            expected.append(padded[:, :, rows, columns])
    assert torch.equal(found, torch.cat(expected))


def tree(bits: int) -> GaussianQuantizer:
    return GaussianQuantizer(2 * bits, 8, 2**bits, order="tree")


def test_the_first_bits_of_a_token_name_a_cell_and_its_mean() -> None:
    quantizer = tree(8)
    features = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in range(1, 9):
        coarse = quantizer.coarser(bits)
        tokens = coarse.tokenize(features)
        assert tokens.max() < 2**bits == coarse.codebook_size and coarse.bits_per_position == 2 * bits
        cells = quantizer.codewords.view(2**bits, -1, 4).mean(1)
        assert torch.equal(coarse.detokenize(tokens), cells[tokens].flatten(-2))
        errors.append((coarse.detokenize(tokens) - features[..., :8]).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(tokens, quantizer.tokenize(features)) and quantizer.codebook_size == 256


@pytest.mark.parametrize("quantizer", [GaussianQuantizer(16, 4, 256), FiniteScalarQuantizer(16)], ids=["no tree", "fsq"])
def test_tokens_without_an_order_are_not_cut_short(quantizer: Quantizer) -> None:
    with pytest.raises(UserError, match="bits: "):
        quantizer.coarser(4)


@pytest.mark.parametrize("bits", [0, 9, -3])
def test_bits_that_there_are_not(bits: int) -> None:
    with pytest.raises(UserError, match="use 1 to 8"):
        tree(8).coarser(bits)


def test_a_file_of_tokens_cut_short_decodes_with_the_whole_tokenizer(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("unet", tree(8)).eval()
    picture = to_picture(pictures(1, 21, 30)[0])
    picture.save(tmp_path / "a.png")
    [file] = encode_pictures(tokenizer, [tmp_path / "a.png"], tmp_path / "tokens", bits=3, progress=False)
    read = read_tokens(file)
    assert read.codebook_size == 8 and read.fingerprint == tokenizer.fingerprint
    [decoded] = decode_pictures(tokenizer, [file], tmp_path / "decoded", progress=False)
    expected = to_picture(tokenizer.coarser(3).decode(read.tokens[None])[0, :, :21, :30])
    assert Image.open(decoded).tobytes() == expected.tobytes()
