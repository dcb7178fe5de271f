"""A prior's probabilities, what is drawn from them, and its files."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONFIGS, small_tokenizer
from small_priors import SHAPES, make, some

from gq_lightning import UserError
from gq_lightning.construction import build
from gq_lightning.priors import Prior
from gq_lightning.priors.generation import check_fit, generate
from gq_lightning.priors.sampling import Sampling, draw, noise, sample
from gq_lightning.priors.symbols import Symbols
from gq_lightning.quantizers import GaussianQuantizer

every = pytest.mark.parametrize("shape", SHAPES)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 2**18), largest=st.integers(2, 2**16), seed=st.integers(0, 99))
def test_tokens_are_spelled_and_read_again(size: int, largest: int, seed: int) -> None:
    spelling = Symbols.of(size, largest)
    tokens = torch.randint(size, (5, 3), generator=torch.Generator().manual_seed(seed))
    symbols = spelling.split(tokens)
    assert symbols.shape == (5, 3 * spelling.digits) and int(symbols.max()) < spelling.base <= largest
    assert torch.equal(spelling.join(symbols), tokens)


def test_65536_codewords_are_256_cells_of_256() -> None:
    assert Symbols.of(65536, 256) == Symbols(65536, 2, 256)
    assert Symbols.of(65536, 256).split(torch.tensor([513])).tolist() == [2, 1], "the cell first"
    assert (Symbols.of(256, 256).digits, Symbols.of(65536, 65536).digits, Symbols.of(2**18, 256).digits) == (1, 1, 3)


def test_what_no_token_begins_with() -> None:
    spelling = Symbols.of(50, 4)
    words = {tuple(spelling.split(torch.tensor([token])).tolist()) for token in range(50)}
    for length in range(spelling.digits):
        for before in product(range(4), repeat=length):
            if any(word[:length] == before for word in words):
                possible = [any(word[: length + 1] == (*before, symbol) for word in words) for symbol in range(4)]
                assert (~spelling.impossible(torch.tensor([before], dtype=torch.int64))).tolist() == [possible]
    assert Symbols.of(64, 4).impossible(torch.zeros(1, 0, dtype=torch.int64)) is None


def test_probabilities_of_all_pictures_sum_to_one() -> None:
    torch.manual_seed(0)
    prior = Prior((1, 2, 1), 16, 8, "f" * 64, ["a"], width=16, layers=1, heads=2, head_layers=1, largest_vocabulary=4).eval()
    torch.nn.init.normal_(prior.logits)
    pictures = torch.tensor(list(product(range(16), repeat=2))).view(-1, 1, 2, 1)
    for label in (-1, 0):
        bits = prior(pictures, torch.full((256,), label)).double().detach()
        assert bits.shape == (256, 2, 2)
        assert float((2 ** -bits.sum((1, 2))).sum()) == pytest.approx(1, abs=1e-5)
        assert bits.sum((1, 2)).std() > 0.1


@every
def test_nothing_looks_ahead(shape: str) -> None:
    prior = make(shape)
    tokens, labels = some(prior, 1)
    before = prior(tokens, labels).flatten()
    for place in range(before.numel()):
        symbols = prior.split(tokens).flatten().clone()
        symbols[place] = (symbols[place] + 1) % 2
        changed = prior.join(symbols.view(1, prior.positions, prior.symbols))
        if int(changed.max()) < prior.codebook_size:
            after = prior(changed, labels).flatten()
            torch.testing.assert_close(after[:place], before[:place])
            assert not torch.isclose(after[place:], before[place:], rtol=1e-3).all(), "what follows depends on it"


@every
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_with_a_cache_the_same_is_drawn(shape: str, cfg: float) -> None:
    prior = make(shape)
    _, labels = some(prior, 3)
    drawn = [
        torch.stack(list(sample(prior, labels, noise(prior, 1, range(3)), Sampling(cfg, temperature=0.7), cached=cached)), dim=1)
        for cached in (True, False)
    ]
    assert torch.equal(*drawn) and int(prior.join(drawn[0]).max()) < prior.codebook_size


@every
def test_a_prior_draws_by_its_own_probabilities(shape: str) -> None:
    """With the first symbol's and the last symbol's numbers running from 0 to 1: shares are the probabilities that `forward` gives."""
    prior, count = make(shape), 400
    uniform = torch.full((count, prior.positions, prior.symbols), 0.5, dtype=torch.float64)
    uniform[:, -1, -1] = (torch.arange(count) + 0.5) / count
    drawn = torch.stack(list(sample(prior, torch.full((count,), -1), uniform)), dim=1)
    assert (drawn.flatten(1)[:, :-1] == drawn.flatten(1)[:1, :-1]).all()
    values, found = drawn[:, -1, -1].unique(return_counts=True)
    bits = prior(prior.join(drawn), torch.full((count,), -1))[:, -1, -1]
    shares = torch.stack([2.0 ** -bits[drawn[:, -1, -1] == value][0] for value in values])
    if prior.spelling.impossible(drawn[:1, -1, :0]) is None:
        torch.testing.assert_close(found / count, shares, atol=1.01 / count, rtol=0)


def test_classes_guidance_and_seeds_matter() -> None:
    prior = make("halves")

    def tokens(label: int, seed: int = 0, **options: Any) -> torch.Tensor:
        return prior.join(torch.stack(list(sample(prior, torch.tensor([label]), noise(prior, seed, [0]), Sampling(**options))), dim=1))

    first = tokens(0)
    assert torch.equal(first, tokens(0)) and torch.equal(first, tokens(0, cfg=1.0))
    for other in (tokens(1), tokens(0, seed=1), tokens(0, cfg=30.0), tokens(0, temperature=3.0)):
        assert not torch.equal(first, other)
    assert torch.equal(tokens(0, cfg=0.0), tokens(-1)), "without what the class adds"
    assert torch.equal(tokens(-1), tokens(-1, cfg=4.0)), "no class adds nothing to no class"
    assert torch.equal(tokens(0, top_k=1), tokens(0, seed=7, top_k=1)), "the likeliest, whatever the numbers"


def test_draws() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000

    def shares(**options: Any) -> np.ndarray:
        drawn = draw(logits.expand(20000, -1), uniform, Sampling(**options))
        return np.bincount(drawn.numpy(), minlength=20) / 20000

    p = np.exp(logits.double().numpy())
    np.testing.assert_allclose(shares(), p / p.sum(), atol=1e-4)
    hot = p**0.5
    np.testing.assert_allclose(shares(temperature=2.0), hot / hot.sum(), atol=1e-4)
    order = np.argsort(-p)
    kept = np.zeros(20)
    kept[order[:5]] = p[order[:5]]
    np.testing.assert_allclose(shares(top_k=5), kept / kept.sum(), atol=1e-4)
    count = int(np.searchsorted(np.cumsum(p[order] / p.sum()), 0.8)) + 1
    kept = np.zeros(20)
    kept[order[:count]] = p[order[:count]]
    np.testing.assert_allclose(shares(top_p=0.8), kept / kept.sum(), atol=1e-4)
    edge = draw(torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([1 - 2.0**-53], dtype=torch.float64), Sampling())
    assert edge.tolist() == [1], "what is impossible is never drawn"
    cold = draw(logits.expand(20, -1), uniform[::1000], Sampling(temperature=1e-320))
    assert set(cold.tolist()) == {int(logits.argmax())}, "the likeliest, at the lowest temperature"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"cfg": -1.0}, "--cfg -1"),
        ({"top_k": 0}, "--top_k 0"),
        ({"top_p": 0.0}, "--top_p 0"),
        ({"top_p": 1.1}, "--top_p"),
        ({"temperature": 0.0}, "--temperature 0"),
    ],
)
def test_settings_without_sense(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Sampling(**options)


def test_pictures_do_not_depend_on_their_batch() -> None:
    tokenizer = small_tokenizer("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=65536, order="tree")).eval()
    torch.manual_seed(1)
    prior = Prior((4, 4, 1), 65536, 8, tokenizer.fingerprint, ["a", "b"], width=16, layers=1, heads=2).eval()
    check_fit(prior, tokenizer, "T")
    labels = [0, 1, 0, 1, 0]
    alone = list(generate(prior, tokenizer, labels, batch_size=1))
    together = list(generate(prior, tokenizer, labels, batch_size=4))
    share = list(generate(prior, tokenizer, labels[1::2], range(1, 5, 2)))
    for pictures, expected in ((together, alone), (share, alone[1::2])):
        torch.testing.assert_close(torch.stack(pictures), torch.stack(expected), atol=1e-4, rtol=0)
    assert not torch.equal(alone[0], alone[2])
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    kept = tokenizer.encode(picture)[:, :2].flatten(1, 2)
    drawn = torch.stack(list(sample(prior, torch.tensor([0]), noise(prior, 0, [0]), given=prior.spelling.split(kept))), dim=1)
    assert torch.equal(prior.join(drawn)[:, :2].flatten(1, 2), kept)
    with pytest.raises(UserError, match="U: is tokenizer .*, but the prior was trained on tokens of"):
        check_fit(prior, small_tokenizer("unet"), "U")
    for grid, codebook_size, downsampling in (((4, 4, 2), 65536, 8), ((4, 4, 1), 16, 8), ((4, 4, 1), 65536, 16)):
        forged = Prior(grid, codebook_size, downsampling, tokenizer.fingerprint, width=16, layers=1, heads=2)
        with pytest.raises(UserError, match="T: has other tokens than the prior"):
            check_fit(forged, tokenizer, "T")


def test_it_learns_what_tokens_have_in_common() -> None:
    """The second token repeats the first, within a position and at the next: half of one position's bits remain."""
    torch.manual_seed(0)
    prior = Prior((1, 2, 2), 16, 8, "f" * 64, width=32, layers=1, heads=2, head_layers=1, largest_vocabulary=4)
    optimizer = torch.optim.AdamW(prior.parameters(), 1e-2)
    for _ in range(150):
        tokens = torch.randint(16, (64, 1, 1, 1)).expand(-1, 1, 2, 2)
        loss = prior(tokens, torch.full((64,), -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach() * 8) == pytest.approx(4, abs=0.4)


def test_files(tmp_path: Path) -> None:
    prior = make("halves")
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    tokens, labels = some(prior, 2)
    assert (
        torch.equal(again(tokens, labels), prior(tokens, labels))
        and again.fingerprint == prior.fingerprint
        and again.classes == prior.classes
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["prior"]["init_args"]["tokenizer"] == "f" * 64
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model.safetensors: SHA-256 .* damaged or changed"):
        Prior.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    for change, words in (
        ({"tokenizer": "0" * 64}, "is recorded, but the description gives"),
        ({"width": 20}, "do not fit the prior|cannot build"),
        ({"grid": [4, 4, 1]}, "do not fit"),
        ({"grid": [2, 2]}, "cannot build"),
        ({"grid": [2**40, 2**20, 1]}, "Prior: .* weights take"),
        ({"grid": [2**13, 2**13, 1]}, "do not fit"),
        ({"layers": 10**9}, "blocks are more than 1000"),
        ({"codebook_size": 0}, "codebook_size 0 is not positive"),
        ({"hidden": 0}, "hidden 0 is not positive"),
        ({"classes": [{"class_path": "subprocess.Popen"}]}, "cannot build"),
    ):
        changed = json.loads(json.dumps(config))
        changed["prior"]["init_args"] |= change
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            Prior.from_pretrained(tmp_path)
    spoiled = make("halves")
    spoiled.logits.data[0, 0, 0] = math.nan
    spoiled.save_pretrained(tmp_path / "spoiled")
    with pytest.raises(UserError, match="config.json: logits has values that are not finite"):
        Prior.from_pretrained(tmp_path / "spoiled")
    spoiled.logits.data = torch.zeros_like(spoiled.logits).to(torch.float8_e4m3fn)
    spoiled.save_pretrained(tmp_path / "spoiled")
    with pytest.raises(UserError, match="config.json: fingerprint"):
        Prior.from_pretrained(tmp_path / "spoiled")
    config["prior"]["class_path"] = "subprocess.Popen"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot build|of gq_lightning nor an imported one"):
        Prior.from_pretrained(tmp_path)


def test_labels_by_name_and_number() -> None:
    prior = make("halves")
    assert prior.labels(["class 2", "0"]) == [2, 0]
    with pytest.raises(UserError, match="--classes 3: this prior has classes 0 to 2, such as class 0"):
        prior.labels(["3"])
    with pytest.raises(UserError, match="--classes a: this prior has no classes: leave out --classes"):
        make("one softmax").labels(["a"])
    with pytest.raises(UserError, match="this prior takes grids of"):
        prior(torch.zeros(1, 3, 2, 1, dtype=torch.int64), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"width": 15}, "width"), ({"layers": 0}, "layers"), ({"largest_vocabulary": 1}, "largest_vocabulary"), ({"heads": 0}, "heads")],
)
def test_bad_arguments_name_the_field(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Prior(**{"grid": (2, 2, 1), "codebook_size": 16, "downsampling": 8, "tokenizer": "f", "width": 16, "heads": 2} | arguments)


SIZES = {"demo_prior": (1e6, 3e6), "small": (3e6, 10e6), "llama_b": (100e6, 160e6), "llama_l": (350e6, 460e6)}


@pytest.mark.parametrize("path", [*sorted((CONFIGS / "prior").glob("*.yaml")), CONFIGS / "demo_prior.yaml"], ids=lambda path: path.stem)
def test_every_config_is_built(path: Path) -> None:
    """On the meta device, for the tokens of 256 x 256 pixels at 16 bits a position."""
    import yaml

    config = yaml.safe_load(path.read_text())
    geometry = {"grid": [32, 32, 1], "codebook_size": 65536, "downsampling": 8, "tokenizer": "f" * 64, "classes": ["a"] * 1000}
    with torch.device("meta"):
        prior = build(Prior, {"class_path": "gq_lightning.priors.Prior", "init_args": config["model"]["prior"] | geometry}, path.name)
    assert (prior.positions, prior.symbols, prior.spelling.base) == (1024, 2, 256)
    low, high = SIZES[path.stem]
    assert low < sum(parameter.numel() for parameter in prior.parameters()) < high
