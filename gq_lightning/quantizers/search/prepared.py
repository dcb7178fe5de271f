"""What a search derives from a codebook, kept while the codebook's tensor lives and stays as it is."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gq_lightning.errors import UserError

T = TypeVar("T")
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepared(codebook: Tensor, prepare: Callable[[Tensor], T]) -> T:
    """prepare(codebook), taken again only for another tensor or after an in-place change, which its version counter shows.

    Raises:
        UserError: a codeword that is not finite.
    """
    if codebook.is_inference():  # such tensors count no versions
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
        raise UserError("codebook: its codewords must be finite")
    return codebook
