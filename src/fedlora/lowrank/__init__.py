"""Adds, compares and shortens low-rank updates of a weight matrix.

A LoRA adapter changes a weight `W (m x n)` by `dW = B @ A` with `B (m, r)` and `A (r, n)`; here the
LoRA scaling is already folded into `B`. Sums, norms and truncations of such updates never need the
`m x n` matrix: a sum is a concatenation, a norm is a trace of r x r Gram matrices, and the singular
value decomposition of a long concatenation is that of a small core between two QR factors.

A sum of many updates can need more numbers as factors, `r (m + n)`, than as a matrix, `m n`. From
there on it is held as a `Dense` matrix; every function here takes either.

Arithmetic is done in float32 or better: half precision inputs are widened, float64 stays float64.
"""

from fedlora.lowrank.arithmetic import (
    add,
    add_all,
    balance,
    concat,
    inner,
    merge_equal_rows,
    norm,
    scale,
    scale_all,
    subtract,
    total_norm,
)
from fedlora.lowrank.common_space import CommonSpace, common_space
from fedlora.lowrank.decomposition import (
    drop_null_directions,
    leading,
    refactor,
    top,
    truncate,
)
from fedlora.lowrank.updates import (
    Adapter,
    Delta,
    Deltas,
    Dense,
    LowRank,
    cheaper_form,
    factor_bytes,
    fold,
    nbytes,
    prefix,
    scaling,
    suffix,
    to_dense,
    unfold,
    wide,
    zeros,
)

__all__ = [
    "Adapter",
    "CommonSpace",
    "Delta",
    "Deltas",
    "Dense",
    "LowRank",
    "add",
    "add_all",
    "balance",
    "cheaper_form",
    "common_space",
    "concat",
    "drop_null_directions",
    "factor_bytes",
    "fold",
    "inner",
    "leading",
    "merge_equal_rows",
    "nbytes",
    "norm",
    "prefix",
    "refactor",
    "scale",
    "scale_all",
    "scaling",
    "subtract",
    "suffix",
    "to_dense",
    "top",
    "total_norm",
    "truncate",
    "unfold",
    "wide",
    "zeros",
]
