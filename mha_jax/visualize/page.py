"""A page to hover over: point at a token and see its weights. Plain HTML that loads nothing."""

import base64
import dataclasses
import hashlib
import html as escaping
import json
import pathlib
from typing import Any, SupportsFloat

import numpy as np

from mha_jax.errors import ShapeError
from mha_jax.visualize.inputs import Labels, check_labels, numbers, texts, whole

# Weights that a page may carry, a byte each: a notebook with more opens slowly.
_MOST = 2**21


@dataclasses.dataclass(frozen=True)
class Page:
    """HTML that a notebook shows."""

    text: str

    def _repr_html_(self) -> str:
        return self.text


def html(
    scores: Any,
    path: str | pathlib.Path | None = None,
    *,
    queries: Labels = None,
    keys: Labels = None,
    query_name: str = "query",
    key_name: str = "key",
) -> Page | None:
    """Show the weights of the token that is pointed at, by head or as the mean over heads.

    Pointing at a query colours the keys that it sees, pointing at a key the queries that see it;
    the tokens carry the weights in percent. Keyboards reach the tokens too. Without scripts, as
    where a notebook is only previewed, it shows the first query.

    Args:
      scores: Attention weights [N, T, S] of one example.
      path: The HTML file to write; None returns a `Page`, which a notebook shows.
      queries, keys: T and S tokens; their numbers if None.
      query_name, key_name: What the two sequences are.

    Raises:
      ShapeError: If the scores are not of one example or too many for a page, or the labels do not
        match them.

    >>> page = html(np.full((2, 1, 3), 1 / 3), queries=["K"], keys="cat")
    >>> "<script>" in page.text and "http" not in page.text
    True
    """
    texts(query_name=query_name, key_name=key_name)
    scores = numbers("scores", scores, "[N, T, S]")
    if scores.size > _MOST:
        raise ShapeError(
            f"{scores.size:,} weights are too many for a page: scores of shape {scores.shape}. "
            f"Expected at most {_MOST:,}; pass fewer heads or rows, or draw scores_top_k."
        )
    rows, columns = check_labels(scores, queries, keys)
    rows = rows or [str(i) for i in range(scores.shape[1])]
    columns = columns or [str(i) for i in range(scores.shape[2])]
    weights = np.concatenate([scores.mean(axis=0, keepdims=True), scores])
    scale = float(max(weights.max(), 1e-6))
    levels = np.round(weights * (255 / scale)).astype(np.uint8)
    data = {
        "shape": levels.shape,
        "scale": scale,
        "bytes": base64.b64encode(levels.tobytes()).decode(),
    }
    name = "mha-" + hashlib.sha256(json.dumps([data, rows, columns]).encode()).hexdigest()[:12]
    buttons = "".join(
        f'<button type="button" aria-pressed="{str(i == 0).lower()}">{label}</button>'
        for i, label in enumerate(["mean", *map(str, range(len(scores)))])
    )
    first = weights[0, 0]
    text = _PAGE.format(
        name=name,
        style=_STYLE.replace("ROOT", "." + name),
        buttons=buttons,
        query_name=escaping.escape(whole(query_name)),
        key_name=escaping.escape(whole(key_name)),
        queries=_tokens(rows, [None] * len(rows), scale, chosen=0),
        keys=_tokens(columns, first, scale),
        script=_SCRIPT.replace("NAME", name).replace("DATA", json.dumps(data)),
    )
    if path is None:
        return Page(text)
    document = f'<!doctype html><meta charset="utf-8"><title>attention</title>\n{text}'
    pathlib.Path(path).write_text(document, encoding="utf-8")
    return None


def _tokens(labels: list[str], weights: Any, scale: float, chosen: int = -1) -> str:
    return "".join(_token(i == chosen, *pair, scale) for i, pair in enumerate(zip(labels, weights)))


def _token(chosen: bool, label: str, weight: SupportsFloat | None, scale: float) -> str:
    """Return a token in the colour of its weight, as the script draws it too."""
    of_all = 0.0 if weight is None else float(weight)
    share, percent = of_all / scale, "" if weight is None else f"{100 * of_all:.0f}"
    mark = ' class="chosen"' if chosen else ""
    return (
        f'<span tabindex="0"{mark} style="--share:{share:.3f}">{escaping.escape(label)}'
        f"<small>{percent if percent != '0' else ''}</small></span>"
    )


_PAGE = """<div class="{name}"><style>{style}</style>
<div class="bar">head {buttons}</div>
<div class="line"><b>{query_name}</b><div class="queries">{queries}</div></div>
<div class="line"><b>{key_name}</b><div class="keys">{keys}</div></div>
</div><script>{script}</script>"""

_STYLE = """
ROOT{font:14px/1.3 system-ui,sans-serif;padding:8px 4px}
ROOT .bar{margin-bottom:8px;font-size:12px}
ROOT button{font:inherit;padding:1px 7px;margin:0 2px 2px 0;border:1px solid #8888;border-radius:4px;
 background:none;color:inherit;cursor:pointer}
ROOT button[aria-pressed=true]{background:#b5367a;border-color:#b5367a;color:#fff}
ROOT .line{display:flex;gap:10px;margin:4px 0}
ROOT b{flex:0 0 5.5em;text-align:right;font-size:12px;font-weight:600;padding-top:5px;opacity:.75}
ROOT .line div{display:flex;flex-wrap:wrap;gap:3px}
ROOT span{display:inline-flex;flex-direction:column;align-items:center;min-width:1.6em;padding:3px 4px 1px;
 border-radius:4px;border:1px solid #8883;cursor:default;white-space:pre;
 background:rgba(181,54,122,calc(var(--share)*.85))}
ROOT span.chosen,ROOT span:focus{border-color:#b5367a;box-shadow:0 0 0 1px #b5367a;outline:none}
ROOT small{font-size:9px;line-height:11px;height:11px;opacity:.8}
"""

_SCRIPT = """
(() => {
  const data = DATA;
  const levels = Uint8Array.from(atob(data.bytes), c => c.charCodeAt(0));
  const [, rows, columns] = data.shape;
  for (const root of document.querySelectorAll('.NAME:not([data-live])')) {
    root.dataset.live = '';
    const all = part => [...root.querySelectorAll(part)];
    const buttons = all('button'), queries = all('.queries span'), keys = all('.keys span');
    let head = 0, show = () => pick(queries, keys, 0, (i, j) => [i, j]);
    const paint = (token, level) => {
      token.style.setProperty('--share', level / 255);
      const percent = Math.round(level / 255 * data.scale * 100);
      token.lastChild.textContent = percent ? percent : '';
    };
    const pick = (own, others, i, place) => {
      for (const token of [...queries, ...keys]) {
        token.classList.remove('chosen');
        token.style.setProperty('--share', 0);
        token.lastChild.textContent = '';
      }
      own[i].classList.add('chosen');
      others.forEach((token, j) => {
        const [row, column] = place(i, j);
        paint(token, levels[(head * rows + row) * columns + column]);
      });
    };
    const listen = (own, others, place) => own.forEach((token, i) => {
      for (const event of ['mouseenter', 'focus'])
        token.addEventListener(event, () => (show = () => pick(own, others, i, place))());
    });
    listen(queries, keys, (i, j) => [i, j]);
    listen(keys, queries, (j, i) => [i, j]);
    buttons.forEach((button, i) => button.addEventListener('click', () => {
      head = i;
      buttons.forEach(b => b.setAttribute('aria-pressed', b === button));
      show();
    }));
    show();
  }
})();
"""
