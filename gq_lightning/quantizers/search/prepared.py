"""Caches the tables that a search derives from a codebook, while the codebook's tensor lives and does not change."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gq_lightning.errors import UserError

T = TypeVar("T")
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepared(codebook: Tensor, prepare: Callable[[Tensor], T]) -> T:
    """prepare(codebook), computed again only for another tensor or after an in-place change, detected by its version counter. Raises
    UserError if a codeword is not finite."""
    if codebook.is_inference():  # inference tensors have no version counter
        return prepare(_finite(codebook))
    state = (codebook._version, codebook.data_ptr(), codebook.shape)
    kept = _kept.get(codebook)
    if kept is None or kept[0] != state:
        kept = _kept[codebook] = (state, {})
        _finite(codebook)
    if prepare not in kept[1]:
        kept[1][prepare] = prepare(codebook)
    return kept[1][prepare]


def _finite(codebook: Tensor) -> Tensor:
    if not bool(codebook.isfinite().all().item()):
        raise UserError("codebook: its codewords are not finite: the training diverged, or the weights are damaged")
    return codebook
