"""Token files coded with a prior: round trips to the bit, their size, and what they refuse."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_tokenizer
from small_priors import SHAPES, make

from gq_lightning import UserError
from gq_lightning.cli.main import main
from gq_lightning.data import load_picture
from gq_lightning.priors import Prior
from gq_lightning.priors.coding import PriorCoder, windows
from gq_lightning.priors.sampling import noise, sample
from gq_lightning.tokens.codec import fit_picture
from gq_lightning.tokens.token_file import TokenFile, from_bytes, read_tokens, to_bytes, write_tokens


def test_windows_cover_a_grid_and_overlap_only_earlier_groups() -> None:
    for size in [(4, 4), (9, 4), (4, 11), (10, 7), (8, 12), (5, 5)]:
        known = np.zeros(size, dtype=bool)
        for corners in windows(size, (4, 4)):
            (y, x), before = corners[0], known.copy()
            given = before[y : y + 4, x : x + 4].copy()
            for y, x in corners:
                part = known[y : y + 4, x : x + 4]
                assert np.array_equal(part, given) and part.shape == (4, 4), "no overlap within the group"
            for y, x in corners:
                known[y : y + 4, x : x + 4] = True
        assert known.all()


def learned(grid: torch.Tensor, fingerprint: str, codebook_size: int) -> Prior:
    """A prior that knows the windows of a grid (h, w, n), of four positions or sixteen, by heart."""
    side = 2 if grid.shape[1] < 4 else 4
    parts = [grid[y : y + side, x : x + side] for corners in windows(tuple(grid.shape[:2]), (side, side)) for y, x in corners]
    torch.manual_seed(0)
    prior = Prior((side, side, grid.shape[2]), codebook_size, 8, fingerprint, width=64, layers=1, heads=2, head_layers=1)
    optimizer = torch.optim.Adam(prior.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        prior(torch.stack(parts), torch.full((len(parts),), -1)).mean().backward()
        optimizer.step()
    return prior.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES)
def test_grids_cost_what_the_prior_says(shape: str) -> None:
    prior = make(shape)
    coder, label = PriorCoder(prior), torch.tensor([-1])
    tokens = prior.join(torch.stack(list(sample(prior, label, noise(prior, 0, [0]))), dim=1))
    bits = prior(tokens, label).double().sum().item()
    data = coder.encode(tokens[0].numpy())
    assert bits - 1 < 8 * len(data) < bits + 64 + 0.02 * bits, "whole words of 32 bits"
    assert np.array_equal(coder.decode(data, tuple(tokens.shape[1:])), tokens[0])


@pytest.mark.parametrize("count", [8, pytest.param(2_000, marks=pytest.mark.slow)])
def test_grids_of_any_size_come_back_and_mutated_files_do_not(count: int) -> None:
    """The numbers are those of one machine; the general form of the file has a test with ten thousand (test_entropy_coding.py)."""
    generator, coders = random.Random(count), {shape: PriorCoder(make(shape)) for shape in SHAPES}
    for index in range(count):
        shape = generator.choice(list(SHAPES))
        (height, width, n), size = SHAPES[shape][:2]
        grid = [height + generator.randrange(6), width + generator.randrange(6), n]
        tokens = torch.randint(size, grid, generator=torch.Generator().manual_seed(index))
        coded = coders[shape].encode(tokens.numpy())
        assert np.array_equal(coders[shape].decode(coded, (grid[0], grid[1], n)), tokens)
        written = TokenFile(tokens, grid[0] * 8, grid[1] * 8 - 3, "", "f" * 64, size, 8)
        data = to_bytes(written, coders[shape])
        assert to_bytes(written, coders[shape]) == data and torch.equal(from_bytes(data, coders[shape]).tokens, tokens)
        at = generator.randrange(len(data))
        for mutated in (data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :], data[:at], data + b"\0"):
            with pytest.raises((UserError, ValueError)):
                from_bytes(mutated, coders[shape])


def test_another_computation_is_an_error_and_no_other_tokens(tmp_path: Path) -> None:
    """As on a machine that computes differently: one weight is another, the fingerprint is the same."""
    tokens, other_tokens = (torch.randint(65536, (16, 2, 1), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    prior = learned(tokens, "f" * 64, 65536)
    coder = PriorCoder(prior)
    write_tokens(tmp_path / "a", TokenFile(tokens, 128, 16, "", "f" * 64, 65536, 8), coder)
    assert torch.equal(read_tokens(tmp_path / "a", coder).tokens, tokens)
    with pytest.raises(UserError, match="a: coded with prior"):
        read_tokens(tmp_path / "a")
    write_tokens(tmp_path / "b", TokenFile(other_tokens, 128, 16, "", "f" * 64, 65536, 8), coder)
    assert torch.equal(read_tokens(tmp_path / "b").tokens, other_tokens), "what it does not expect is stored without it"
    other = PriorCoder(prior)
    with torch.no_grad():
        other.prior.logits += 0.01 * torch.randn_like(other.prior.logits)
    with pytest.raises(UserError, match="computes other probabilities on this machine: decode it where it was encoded, or"):
        read_tokens(tmp_path / "a", other)


def test_what_cannot_be_coded_is_refused(tmp_path: Path) -> None:
    coder = PriorCoder(make("halves"))
    for grid in ((1, 2, 1), (2, 1, 1), (2, 2, 2)):
        with pytest.raises(UserError, match=r"^\S*a: tokens of .* use a larger picture, or no --prior"):
            write_tokens(tmp_path / "a", TokenFile(torch.zeros(grid, dtype=torch.int64), 8, 8, "", "f" * 64, 65536, 8), coder)
    assert not list(tmp_path.iterdir())
    large = Prior((2, 2, 1), 2**20, 8, "f" * 64, width=4, layers=1, heads=2, head_layers=1, largest_vocabulary=2**20)
    with pytest.raises(UserError, match="a vocabulary of 1048576 cannot be coded"):
        PriorCoder(large)


def test_by_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = small_tokenizer("vit")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ours, kinds = tokenizer.fingerprint, {"second": (4, 32), "large": (8, 16), "foreign": (4, 16)}
    for name, (side, width) in kinds.items():
        fingerprint = "f" * 64 if name == "foreign" else ours
        made = Prior((side, side, 2), 256, 8, fingerprint, ["cat", "dog"], width=width, layers=1, heads=2, head_layers=1)
        made.save_pretrained(tmp_path / name)
    pixels = np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, *_ = fit_picture(load_picture(tmp_path / "a.png"), "pad", 8, 32, None)
    learned(tokenizer.encode(image[None])[0], ours, 256).save_pretrained(tmp_path / "prior")
    prior, plain = f"--prior={tmp_path}/prior", [f"--tokenizer={tmp_path}/tokenizer"]

    def call(command: str, source: str, out: str, *more: str) -> str:
        arguments = [command, str(tmp_path / source), *plain, f"--out={tmp_path / out}", *more]
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / out).exists()
        return error

    assert main(["encode", str(tmp_path / "a.png"), *plain, f"--out={tmp_path}/plain"]) == 0
    assert main(["encode", str(tmp_path / "a.png"), *plain, f"--out={tmp_path}/coded", prior]) == 0
    assert main(["decode", str(tmp_path / "plain"), *plain, f"--out={tmp_path}/one", prior]) == 0, "which needs none"
    assert main(["decode", str(tmp_path / "coded"), *plain, f"--out={tmp_path}/two", prior]) == 0
    sizes = [next((tmp_path / folder).iterdir()).stat().st_size for folder in ("plain", "coded")]
    assert sizes[1] < sizes[0], "with the prior's fingerprint, too"
    assert (tmp_path / "one/a.png").read_bytes() == (tmp_path / "two/a.png").read_bytes()
    capfd.readouterr()
    assert "but none was given: decode with that one (--prior)" in call("decode", "coded", "x")
    assert "but the given one is " in call("decode", "coded", "x", f"--prior={tmp_path}/second")
    assert "the prior was trained on tokens of ffffffffffff: give that as --tokenizer" in call(
        "encode", "a.png", "x", f"--prior={tmp_path}/foreign"
    )
    assert "give that as --tokenizer" in call("decode", "coded", "x", f"--prior={tmp_path}/foreign")
    assert "tokens of 9 x 7 x 2, but the prior codes 8 x 8 x 2 or more" in call("encode", "a.png", "x", f"--prior={tmp_path}/large")
    assert "--bits 4: a prior codes whole tokens" in call("encode", "a.png", "x", prior, "--bits=4")
    coded = next((tmp_path / "coded").iterdir())
    content = bytearray(coded.read_bytes())
    content[-9] ^= 4
    coded.write_bytes(content)
    assert "damaged" in call("decode", "coded", "x", prior)
