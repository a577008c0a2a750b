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
    sum_norm,
    truncate_rank,
)
from fedmira.adapters.mappings import LazyAdapters, known_hash, replaced
from fedmira.adapters.merging import (
    folded,
    metagpt_weights,
    nearest,
    padded,
    rank_by_energy,
    singular_values,
    spare_directions,
    ties,
    update_gram,
)
from fedmira.adapters.precision import common_directions, in_directions, mean_by_precision
from fedmira.adapters.robust import median_of, trimmed_mean
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
    "common_directions",
    "content_hash",
    "cross_gram",
    "digest",
    "distance",
    "dot_products",
    "factor_sketches",
    "folded",
    "gram",
    "in_directions",
    "inner",
    "known_hash",
    "map_tensors",
    "mean_by_precision",
    "median_of",
    "metagpt_weights",
    "mix",
    "module_grams",
    "modules",
    "nearest",
    "norm",
    "padded",
    "product_norm",
    "product_sketches",
    "rank_by_energy",
    "replaced",
    "same_shapes",
    "scale",
    "singular_values",
    "spare_directions",
    "subtract",
    "ties",
    "trimmed_mean",
    "sum_norm",
    "truncate_rank",
    "update_gram",
    "weighted_sum",
]
