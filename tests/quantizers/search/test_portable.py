"""The search of exported graphs finds what the others find."""

import pytest
import torch

from gq_lightning.quantizers.search import best_codewords, portable


@pytest.mark.parametrize(
    ("size", "dimensions", "prior_weight", "scale"),
    [(4096, 8, 1.0, 1.0), (300, 16, 0.5, 1.0), (3, 1, 0.0, 1e-4)],
)
def test_it_finds_the_same(size: int, dimensions: int, prior_weight: float, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(size, dimensions, generator=generator) * scale
    codebook[size // 2] = codebook[0]  # ties go to the lowest index
    count = 200
    mean = torch.randn(count, dimensions, generator=generator)
    # from far narrower than a codeword's cell to the prior's width and beyond
    variance = (torch.rand(count, dimensions, generator=generator) * 31 - 30).exp()
    mean[:5] = codebook[:1]
    monkeypatch.setattr(portable, "SCORES_PER_BLOCK", 7 * size)  # several blocks, the last one not full
    found = portable.search(mean.double(), variance.double().reciprocal(), codebook, prior_weight)
    assert torch.equal(found, best_codewords(mean, variance, codebook, prior_weight))


def test_memory_does_not_grow_with_the_positions() -> None:
    """The largest tensor of a graph for any number of positions has SCORES_PER_BLOCK elements, or as many as it is given."""

    class Search(torch.nn.Module):
        def forward(self, mean: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
            return portable.search(mean, mean.exp(), codebook, 1.0)

    shapes = ({0: torch.export.Dim("positions")}, None)
    program = torch.export.export(Search(), (torch.zeros(100, 4, dtype=torch.float64), torch.zeros(4096, 4)), dynamic_shapes=shapes)
    inner = [module for name, module in program.graph_module.named_modules() if name and isinstance(module, torch.fx.GraphModule)]
    sizes = [node.meta["val"].numel() for module in inner for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(sizes) == portable.SCORES_PER_BLOCK
