"""Tensors over the layers as pure functions: t-product, t-SVD, ranks, and transforms that spread components over layers.

The constructors of transforms have short names; call them through their module: `transforms.haar(12)`.
"""

from deltaloom.linalg import transforms
from deltaloom.linalg.tensor import (
    average_rank,
    block_circulant,
    depth_correlation,
    low_rank_gram,
    m_product,
    m_svd,
    multi_rank,
    t_identity,
    t_product,
    t_svd,
    t_transpose,
    transform,
    tubal_rank,
)
from deltaloom.linalg.transforms import LayerTransform, reconstruct, rotation

__all__ = ["LayerTransform", "average_rank", "block_circulant", "depth_correlation", "low_rank_gram", "m_product", "m_svd",
           "multi_rank", "reconstruct", "rotation", "t_identity", "t_product", "t_svd", "t_transpose", "transform", "transforms",
           "tubal_rank"]
