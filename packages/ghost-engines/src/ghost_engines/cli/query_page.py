"""A page of what `ghost query` found, which needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from ghost_engines.cli.answers import Answer, Asked, Found, shortened
from ghost_engines.cli.tables import plain
from ghost_engines.files import write_atomically

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a7f62; --bad: #b3413a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .3rem; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; }
.how { opacity: .75; margin: 0; overflow-wrap: anywhere; }
blockquote { margin: 0; padding: .6rem .9rem; border-left: 3px solid #888;
             background: var(--soft); }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      margin: 0; max-height: 12rem; overflow: auto; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 1rem; padding: .8rem 0;
     border-bottom: 1px solid var(--line); }
.score { font-variant-numeric: tabular-nums; font-weight: 600; }
.side small { display: block; opacity: .7; font-weight: 400; }
.bar { height: .4rem; margin: .25rem 0; background: var(--soft); border-radius: .2rem; }
.bar i { display: block; height: 100%; border-radius: .2rem; background: var(--good); }
.bar.hurts i { background: var(--bad); }
details { margin-top: .5rem; font-size: .85rem; }
td { padding: .1rem .8rem .1rem 0; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.b { width: 10rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="how">$how</p>
$queries
</body>
</html>
""")

_ITEM = Template("""<li>
<div class="side"><span class="score">$score</span> $bar
<small>$rank. sample $id$group</small><small>a step on it $sign</small></div>
<div>$text$layers</div>
</li>""")

_SIGNS = {
    "helps": "lowers the query's loss",
    "hurts": "raises the query's loss",
    "neither": "does not change the query's loss",
}


def write_page(path: Path, asked: Asked, answers: Sequence[Answer]) -> None:
    """Write the page; what was there before is replaced once it is complete.

    Raises:
        OSError: If it cannot be written.
    """
    how = [
        f"{asked.rows} samples in {asked.store}, compared with {asked.model} by {asked.by}",
        f"loss: {asked.loss}",
        f"compared: {asked.parameters or 'all parameters'}",
    ]
    title = f"What the model learns {'least' if asked.smallest else 'most'} alike from"
    page = _PAGE.substitute(
        title=_shown(title),
        how=_shown("; ".join(how)),
        queries="\n".join(_query(at, answer) for at, answer in enumerate(answers)),
    )
    write_atomically(path.absolute(), page.encode(), path.absolute().parent)


def _query(at: int, answer: Answer) -> str:
    asked = f"<blockquote><pre>{_shown(answer.text)}</pre></blockquote>" if answer.text else ""
    longest = max((abs(each.score) for each in answer.found), default=0.0)
    items = "\n".join(_item(rank, each, longest) for rank, each in enumerate(answer.found, 1))
    return f"<h2>Query {at}</h2>\n{asked}\n<ol>\n{items}\n</ol>"


def _item(rank: int, each: Found, longest: float) -> str:
    text = "text not known" if each.text is None else each.text
    return _ITEM.substitute(
        score=f"{each.score:.4g}",
        bar=_bar(each.score, longest),
        rank=rank,
        id=each.id,
        group=f", {_shown(each.group)}" if each.group else "",
        sign=_SIGNS[each.sign],
        text=f"<pre>{_shown(text)}</pre>",
        layers=_layers(each),
    )


def _layers(each: Found) -> str:
    if not each.layers:
        return ""
    longest = max(map(abs, each.layers.values()))
    rows = "".join(
        f'<tr><td>{_shown(shortened(layer or "(the model)"))}</td><td class="n">{part:.3g}</td>'
        f'<td class="b">{_bar(part, longest)}</td></tr>'
        for layer, part in each.layers.items()
    )
    return f"<details open><summary>by layer</summary><table>{rows}</table></details>"


def _bar(value: float, longest: float) -> str:
    width = 100 * abs(value) / longest if longest else 0
    kind = "bar hurts" if value < 0 else "bar"
    return f'<div class="{kind}"><i style="width:{width:.1f}%"></i></div>'


def _shown(text: str) -> str:
    """Return a text of which nothing is markup, nor commands anything."""
    return escape(plain(text.replace("\t", "    ")))
