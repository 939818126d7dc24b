"""How narrow attention heads could be: Q with K and V with O are coupled, since only their products matter.

Scores are x^T W_Q^T W_K y, and what a head adds is W_O W_V y: a pair whose product has rank r is exactly as good with r
columns in place of head_dim (the joint SVD). What is reported is r, for the energy that low_rank keeps; the heads of a
layer have one width, so that its worst head decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slipcast_compiler.passes.context import Context, Floats

if TYPE_CHECKING:
    from slipcast_compiler.model.layers import AttentionLayer
    from slipcast_compiler.model.rewrite import Denoiser


def couplings(denoiser: Denoiser, context: Context, energy: float) -> dict[str, dict[str, int]]:
    """By attention layer: `head_dim`, and the ranks that `query_key` and `value_output` need in the worst head.

    Products are weighed by the second moments of the layer's inputs. Left out are layers that an earlier pass has
    factorised, and those in which more than the products matters: of several streams, of shared key heads, or with
    norms of queries and keys.
    """
    return {
        layer.name: _ranks(denoiser, context, layer, energy)
        for layer in denoiser.layers.attention if _is_plain(denoiser, layer)
    }  # fmt: skip


def _is_plain(denoiser: Denoiser, layer: AttentionLayer) -> bool:
    from slipcast_compiler.model.attention import has_head_norms

    alone = len({place.linear for place in layer.rows}) == 3 == len(layer.rows) and len(layer.columns) == 1
    whole = denoiser.has(f"{layer.rows[0].linear}.weight")
    return alone and whole and layer.group == 1 and not has_head_norms(denoiser.module.get_submodule(layer.name))


def _ranks(denoiser: Denoiser, context: Context, layer: AttentionLayer, energy: float) -> dict[str, int]:
    query, key, value = (
        (denoiser.weight(f"{place.linear}.weight") @ root(context.measured.second_moment(place.linear))).reshape(
            layer.heads, layer.head_dim, -1
        )
        for place in layer.rows
    )
    output = denoiser.weight(f"{layer.columns[0].linear}.weight").T.reshape(layer.heads, layer.head_dim, -1)
    return {
        "head_dim": layer.head_dim,
        "query_key": max(joint_rank(a, b, energy) for a, b in zip(query, key, strict=True)),
        "value_output": max(joint_rank(a, b, energy) for a, b in zip(value, output, strict=True)),
    }


def root(moment: Floats) -> Any:
    """R with R R^T = H, float64."""
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    return vectors * np.sqrt(values.clip(0))


def joint_rank(a: Any, b: Any, energy: float) -> int:
    """The rank of a^T b, [width, m] and [width, n], that keeps `energy` of its squared singular values."""
    # Those of the product of the triangles, which are as small as the head is narrow.
    triangles: list[Any] = [np.linalg.qr(each.T, mode="r") for each in (a, b)]
    total = np.cumsum(np.linalg.svd(triangles[0] @ triangles[1].T, compute_uv=False) ** 2)
    return int(np.searchsorted(total, energy * total[-1])) + 1 if total[-1] > 0 else 0
