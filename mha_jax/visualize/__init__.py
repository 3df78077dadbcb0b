"""Pictures of attention: maps, overviews, figures by head, a page to hover over.

N query heads   T query length   S key length   L layers   k largest weights of a query

    heads       every head of one layer              scores [N, T, S], their mean [T, S]
    alignment   the mean large, every head small     scores [N, T, S]
    layers      every head of every layer            L scores [N, T, S]
    html        point at a token, see its weights    scores [N, T, S]
    entropy     one number a head: sharp or spread   L scores, or L entropies [N, T]
    by_query    one number a head and query          any reduction [N, T]
    top_keys    the largest weights, however long    scores_top_k: two arrays [N, T, k]
    masks       who may see whom, by rule            masks and Tokens
    curves      figures of a training run

Scores are what `return_attention_scores=True` or `attention_scores` gives for one example; the
reductions of `mha_jax.scores_mean`, `scores_max`, `scores_entropy` and `scores_top_k` give what the
others draw without T x S memory. Every function takes a `path` to write a file to; without one it
returns the picture, which a notebook shows. matplotlib is imported when a picture is drawn, never
before; `html` needs nothing and loads nothing.
"""

from mha_jax.visualize.maps import alignment, heads, layers, masks
from mha_jax.visualize.page import Page, html
from mha_jax.visualize.reductions import by_query, entropy, top_keys
from mha_jax.visualize.training import curves

__all__ = [
    "Page",
    "alignment",
    "by_query",
    "curves",
    "entropy",
    "heads",
    "html",
    "layers",
    "masks",
    "top_keys",
]
