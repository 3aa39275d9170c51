"""Rows or columns of a fused matrix, as a linear layer of their own.

Where a model has, say, query, key and value in one matrix, each is a linear layer in all but storage.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LinearSlice:
    """Some rows or columns of a linear layer, as a linear layer of its own.

    weight: a view `(out_features, in_features)` of the whole layer's, wherever that is moved: writing to it writes
    there. bias: of rows a view, of columns None, for it belongs to the sum over all columns.
    """

    def __init__(self, whole: nn.Linear, dim: int, start: int, length: int) -> None:
        """whole: the layer. dim: 0 for rows, which are outputs; 1 for columns, which are inputs. start, length: which.

        Raises ValueError for what is not in the matrix.
        """
        size = (whole.out_features, whole.in_features)[dim]
        if not (0 <= start < start + length <= size):
            raise ValueError(
                f"{start} to {start + length} of {size} {('rows', 'columns')[dim]}: there is no such slice"
            )
        self.whole, self.dim, self.start, self.length = whole, dim, start, length

    @property
    def weight(self) -> Tensor:
        """`(out_features, in_features)`, a view."""
        return self.whole.weight.narrow(self.dim, self.start, self.length)

    @property
    def bias(self) -> Tensor | None:
        """`(out_features,)`, a view, or None."""
        bias = self.whole.bias
        return None if bias is None or self.dim == 1 else bias.narrow(0, self.start, self.length)

    @property
    def in_features(self) -> int:
        """How many inputs the slice takes."""
        return self.length if self.dim == 1 else self.whole.in_features

    @property
    def out_features(self) -> int:
        """How many outputs the slice gives."""
        return self.length if self.dim == 0 else self.whole.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """The plain product. x: `(…, in_features)`."""
        return F.linear(x, self.weight, self.bias)


AnyLinear = nn.Linear | LinearSlice


def whole_of(linear: AnyLinear) -> nn.Linear:
    """The module that a layer is, or is a slice of."""
    return linear.whole if isinstance(linear, LinearSlice) else linear
