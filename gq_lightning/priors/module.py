"""Prior: a class-conditional transformer over an image's tokens, as in https://arxiv.org/abs/2203.01941 and LlamaGen.

    class, tokens of the positions before --body, causal over positions--> context of a position
    context, symbols before it at this position --head, causal over symbols--> logits of the next symbol

Positions are ordered row by row. A token of a large codebook is split into several symbols (`symbols`), and the tokens of a position are
predicted one after the other, so that a small vocabulary suffices for every quantizer. Both transformers use Llama's blocks from
`transformers`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gq_lightning.construction import Recorded, check_cost, describe, fingerprint
from gq_lightning.errors import UserError
from gq_lightning.priors.symbols import Symbols
from gq_lightning.tokenizer import folder as files

try:
    from transformers import DynamicCache, LlamaConfig, LlamaModel
except ModuleNotFoundError as error:
    raise UserError("priors need transformers: install gq_lightning[prior]") from error


class Prior(Recorded, nn.Module):
    """The probabilities of an image's tokens, given its class.

    Args:
        grid: h, w and n of one picture's tokens (h, w, n).
        codebook_size: tokens are in [0, codebook_size).
        downsampling: pixels per position along one axis.
        tokenizer: fingerprint of the tokenizer whose tokens these are.
        classes: names of the classes; empty for a prior without classes.
        width: channels.
        layers: blocks of the body.
        heads: attention heads, in body and head.
        head_layers: blocks of the head.
        hidden: hidden channels of a block's MLP (SwiGLU); null takes 8/3 of the width, rounded up to a multiple of 64.
        dropout: of the embeddings, in training.
        largest_vocabulary: tokens of a larger codebook are split into symbols with at most this many values; 65536 is one large softmax.
    """

    def __init__(
        self,
        grid: Sequence[int],
        codebook_size: int,
        downsampling: int,
        tokenizer: str,
        classes: Sequence[str] = (),
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        head_layers: int = 2,
        hidden: int | None = None,
        dropout: float = 0.0,
        largest_vocabulary: int = 256,
    ) -> None:
        super().__init__()
        self.init_args |= {"grid": list(grid), "classes": list(classes)}
        if width < 1 or heads < 1 or width % (2 * heads):
            raise UserError(f"model.prior.width {width}: use a multiple of twice model.prior.heads, {heads}")
        if min(layers, head_layers) < 1:
            raise UserError(f"model.prior.layers {layers}, head_layers {head_layers}: give at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"model.prior.dropout {dropout}: give a share from 0 to below 1")
        height, columns, n = grid
        self.grid, self.codebook_size, self.downsampling = (height, columns, n), codebook_size, downsampling
        self.tokenizer, self.classes = tokenizer, tuple(classes)
        self.spelling = Symbols.of(codebook_size, largest_vocabulary)
        self.positions, self.symbols = height * columns, n * self.spelling.digits
        hidden = -(-8 * width // (3 * 64)) * 64 if hidden is None else hidden
        blocks, vocabulary = layers + head_layers, self.symbols * self.spelling.base
        weights = blocks * width * (4 * width + 3 * hidden) + width * (len(self.classes) + self.positions + 2 * vocabulary)
        sizes = {"height": height, "columns": columns, "n": n, "codebook_size": codebook_size, "downsampling": downsampling}
        check_cost("Prior", blocks, weights, hidden=hidden, **sizes)
        self.body, self.head = _llama(width, hidden, layers, heads, self.positions), _llama(width, hidden, head_layers, heads, self.symbols)
        # the last label means no class
        self.label = nn.Embedding(len(self.classes) + 1, width)
        self.position = nn.Embedding(self.positions, width)
        self.symbol = nn.Embedding(self.symbols * self.spelling.base, width)
        self.logits = nn.Parameter(torch.zeros(self.symbols, self.spelling.base, width))
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.label, self.position, self.symbol):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Bits of each symbol, (B, h * w, n * digits) float32, of tokens (B, h, w, n); labels (B,), -1 for no class.

        Their sum is minus log2 of the image's probability.
        """
        symbols = self.split(tokens)
        context = self.context(symbols[:, :-1], labels)
        logits = self.follow(context.flatten(0, 1), symbols.flatten(0, 1)[:, :-1])
        nats = functional.cross_entropy(logits.flatten(0, 1), symbols.flatten(), reduction="none")
        return nats.view(symbols.shape) / math.log(2)

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, n) to symbols (B, h * w, n * digits). Raises UserError if their grid is not that of this prior."""
        if tuple(tokens.shape[1:]) != self.grid:
            raise UserError(f"tokens of shape {tuple(tokens.shape)}: this prior takes grids of {self.grid}")
        return self.spelling.split(tokens.flatten(1, 2))

    def join(self, symbols: Tensor) -> Tensor:
        """The inverse of `split`."""
        return self.spelling.join(symbols).unflatten(1, self.grid[:2])

    def context(self, symbols: Tensor, labels: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """The context of each position, from the class and the symbols of the previous positions.

        Args:
            symbols: (B, k, n * digits) of the first k positions; with a non-empty cache of keys and values, which grows, of the next k
                positions.
            labels: (B,), -1 for no class.

        Returns:
            (B, k + 1, width), for the first position to the one after the last given; with a non-empty cache the last k of these.
        """
        begin = 0 if cache is None else cache.get_seq_length()
        x = self._embedded(symbols, 0).sum(2)
        if not begin:
            labels = torch.where(labels < 0, len(self.classes), labels)
            x = torch.cat([self.label(labels).unsqueeze(1), x], dim=1)
        return _run(self.body, self.dropout(x + self.position.weight[begin : begin + x.shape[1]]), cache)

    def follow(self, context: Tensor, symbols: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Logits (N, k + 1, base) float32 of the symbols of a position, each given the previous ones; with a non-empty cache, which grows,
        the last k.

        Args:
            context: (N, width), of the position.
            symbols: (N, k), the first k of the position; with a non-empty cache, the next k.

        Some combinations of symbols may not be tokens, see `Symbols.impossible`.
        """
        begin = 0 if cache is None else cache.get_seq_length()
        x = self._embedded(symbols, max(begin - 1, 0))
        if not begin:
            x = torch.cat([context.unsqueeze(1), x], dim=1)
        x = _run(self.head, x, cache)
        return torch.einsum("nsw,svw->nsv", x, self.logits[begin : begin + x.shape[1]].to(x.dtype)).float()

    def bits_per_pixel(self, bits: Tensor) -> Tensor:
        """Bits per pixel, averaged over images, from the bits of each symbol (B, h * w, n * digits)."""
        return bits.sum() / (len(bits) * self.positions * self.downsampling**2)

    def caches(self) -> tuple[DynamicCache, DynamicCache]:
        """Empty caches: one for `context`, for a whole image, and one for `follow`, for a single position."""
        return DynamicCache(config=self.body.config), DynamicCache(config=self.head.config)

    def labels(self, names: Sequence[str]) -> list[int]:
        """The labels of classes, given by name or number. Raises UserError for an unknown class."""
        known = {name: label for label, name in enumerate(self.classes)} | {str(label): label for label in range(len(self.classes))}
        for name in names:
            if name not in known:
                some = (
                    f"classes 0 to {len(self.classes) - 1}, such as {self.classes[0]}"
                    if self.classes
                    else "no classes: leave out --classes"
                )
                raise UserError(f"--classes {name}: this prior has {some}")
        return [known[name] for name in names]

    def _embedded(self, symbols: Tensor, first: int) -> Tensor:
        """Embeds symbols (..., k) at the places of a position from `first` on, to (..., k, width)."""
        places = torch.arange(first, first + symbols.shape[-1], device=symbols.device)
        return self.symbol(symbols + places * self.spelling.base)

    # Files

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines its probabilities: arguments, including the tokenizer's fingerprint, and weights."""
        return fingerprint([self.identity()], self.state_dict())

    def facts(self) -> dict[str, Any]:
        """The entries of config.json besides the description. They follow from the description and the weights."""
        return {"fingerprint": self.fingerprint, "parameters": sum(parameter.numel() for parameter in self.parameters())}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, from which `from_pretrained` makes an equal prior."""
        files.write_folder(folder, describe(self), self.state_dict(), self.facts(), kind="prior")

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> Self:
        """A prior from a folder or from `owner/repository` on the hub, in eval mode and frozen.

        Args:
            name: folder of a prior or of a run, or repository.
            download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of huggingface_hub.

        Raises:
            UserError: a file is missing, damaged or changed.
        """
        folder = files.locate(name, kind="prior", **download)
        description, state, recorded = files.read_folder(folder, kind="prior")
        source = str(folder / files.CONFIG)
        with files.weights_must_fit("prior", source):
            with torch.device("meta"):  # so that a forged description cannot allocate more memory than its file has
                cls.from_description(description, source).load_state_dict(state, assign=True)
            prior = cls.from_description(description, source)
            prior.load_state_dict(state)
        if spoiled := [name for name, tensor in prior.state_dict().items() if not bool(tensor.isfinite().all())]:
            raise UserError(f"{source}: {spoiled[0]} has values that are not finite: the training diverged; use another")
        files.check_facts(prior.facts(), recorded, source)
        return prior.eval().requires_grad_(False)


def _llama(width: int, hidden: int, layers: int, heads: int, length: int) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = LlamaModel(config)
    # Prior embeds the symbols, and a parameter without a gradient would stop data-parallel training
    model.embed_tokens = None  # type: ignore[assignment]
    return model


def _run(model: LlamaModel, x: Tensor, cache: DynamicCache | None) -> Tensor:
    return model(inputs_embeds=x, cache=cache, use_cache=cache is not None).last_hidden_state
