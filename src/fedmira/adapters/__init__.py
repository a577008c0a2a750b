"""The algebra of adapters: named tensors, low-rank products, sketches.

Nothing here reads a file or knows a model.
"""

from fedmira.adapters.arithmetic import (
    Adapter,
    HashedAdapter,
    all_finite,
    content_hash,
    digest,
    distance,
    dot_products,
    map_tensors,
    norm,
    same_shapes,
    subtract,
    weighted_sum,
)
from fedmira.adapters.low_rank import (
    Mixed,
    Split,
    cross_gram,
    gram,
    inner,
    mix,
    module_grams,
    modules,
    product_norm,
    scale,
    truncate_rank,
)
from fedmira.adapters.mappings import LazyAdapters, replaced
from fedmira.adapters.sketch import factor_sketches, product_sketches
from fedmira.adapters.subspaces import column_spaces

__all__ = [
    "Adapter",
    "HashedAdapter",
    "LazyAdapters",
    "Mixed",
    "Split",
    "all_finite",
    "column_spaces",
    "content_hash",
    "cross_gram",
    "digest",
    "distance",
    "dot_products",
    "factor_sketches",
    "gram",
    "inner",
    "map_tensors",
    "mix",
    "module_grams",
    "modules",
    "norm",
    "product_norm",
    "product_sketches",
    "replaced",
    "same_shapes",
    "scale",
    "subtract",
    "truncate_rank",
    "weighted_sum",
]
