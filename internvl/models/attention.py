"""Which positions of a packed row see which, in the forms that attention kernels take."""

import torch
from torch import Tensor


def dense_mask(document: Tensor, branch: Tensor) -> Tensor:
    """bool (1, 1, L, L), true where a query (rows) may attend to a key (columns).

    document, branch: int64 (L,). A query sees itself and earlier positions of its own document
    that are in the prefix (branch 0) or in its own branch. Padding (document -1) sees padding.
    """
    length = len(document)
    query = document.new_ones(length, length, dtype=torch.bool).tril_()
    same_document = document[:, None] == document[None, :]
    visible = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    return (query & same_document & visible)[None, None]
