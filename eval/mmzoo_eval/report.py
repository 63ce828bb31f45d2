"""A page to look at, in one file: what the model saw, what it was asked, what it said, and the verdict."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmzoo.errors import MmzooError
from mmzoo.files import replacing
from mmzoo.media import Video
from mmzoo_eval.benchmark import Item, lettered
from mmzoo_eval.runner import RESULTS, SCORES, Run

HEIGHT, MOST_FRAMES = 96, 16

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }}
article {{ border-left: 6px solid #bbb; margin: 1.5em 0; padding: .2em 1em }}
article.right {{ border-color: #2a8f4c }} article.wrong {{ border-color: #c43d3d }}
img {{ max-width: 100% }} .note {{ color: #777 }} .answer {{ font-weight: 600 }} li.truth {{ color: #2a8f4c }}
table {{ border-collapse: collapse }} td, th {{ padding: .1em .8em; text-align: left }}
pre {{ white-space: pre-wrap; margin: .3em 0; font: inherit }}
</style>
<h1>{title}</h1>
<p class="answer">{text}</p>
<table><tr><th>metric<th>value<th>95 % interval</tr>{metrics}</table>
<p>Show {buttons} {shown} of {total} items are on this page.</p>
{articles}
<script>
function show(kind) {{
  for (const one of document.querySelectorAll("article"))
    one.hidden = kind !== "all" && !one.classList.contains(kind);
}}
</script>
</html>
"""


def write(
    plan: Run, path: str | Path, most: int = 100, advance: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write the page of a finished run.

    Args:
        plan: its `results.jsonl` is there.
        path: of the page.
        most: items on the page, evenly over all of them.
        advance: told the items done, and all of the page.
    """
    rows = [json.loads(line) for line in (plan.folder / RESULTS).read_text().split("\n") if line]
    found = json.loads((plan.folder / SCORES).read_text())
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=int)).tolist() if rows else []
    articles = []
    for done, i in enumerate(chosen):
        articles.append(_article(plan, plan.items[i], rows[i]))
        advance(done + 1, len(chosen))
    page = _PAGE.format(
        title=escape(found["label"]),
        text=escape(found["text"]),
        metrics="".join(_metric(name, one) for name, one in found["scores"].items()),
        buttons=" ".join(
            f"<button onclick=\"show('{one}')\">{one}</button>" for one in ("all", "right", "wrong", "other")
        ),
        shown=len(chosen),
        total=len(rows),
        articles="\n".join(articles),
    )
    with replacing(path) as temporary:
        temporary.write_text(page)
    return Path(path)


def _metric(name: str, one: dict[str, float]) -> str:
    return f"<tr><td>{escape(name)}<td>{one['value']:.4g}<td>{one['low']:.4g} to {one['high']:.4g}</tr>"


def _article(plan: Run, item: Item, row: dict[str, Any]) -> str:
    """One item; "other" is one without a score."""
    verdict = "other" if row["score"] is None else "right" if row["score"] > 0 else "wrong"
    said = "" if row["response"] is None else f"<pre class=answer>{escape(row['response'])}</pre>"
    parsed = "" if row["parsed"] is None else f", read as {escape(_read(item, row['parsed']))}"
    note = f'<p class="note">{escape(row["note"])}</p>' if row["note"] else ""
    truth = "" if item.options else f'<p class="note">right: {escape(str(item.answer))}</p>'
    return (
        f'<article class="{verdict}"><p class="note">{escape(item.id)} {escape(item.kind)}</p>{_picture(plan, item)}'
        f"<pre>{escape(item.question)}</pre>{_options(item)}{truth}{said}"
        f"<p>{verdict if verdict != 'other' else 'no score'} ({escape(row['state'])}{parsed})</p>{note}</article>"
    )


def _read(item: Item, parsed: Any) -> str:
    return lettered(parsed) if item.options and isinstance(parsed, int) else str(parsed)


def _options(item: Item) -> str:
    if not item.options:
        return ""
    lines = [
        f"<li{' class=truth' if i == item.answer else ''}>({lettered(i)}) {escape(option)}</li>"
        for i, option in enumerate(item.options)
    ]
    return f"<ul>{''.join(lines)}</ul>"


def _picture(plan: Run, item: Item) -> str:
    """The frames side by side, or the picture, as part of the page."""
    try:
        medium = plan.media.read(item, plan.model.processor)
    except MmzooError:
        return ""
    if medium is None:
        return ""
    frames: Sequence[Any] = [medium]
    if isinstance(medium, Video):
        places = np.unique(np.linspace(0, len(medium.frames) - 1, MOST_FRAMES, dtype=int))
        frames = [Image.fromarray(medium.frames[i]) for i in places]
    width = max(1, round(frames[0].width * HEIGHT / frames[0].height))
    strip = Image.new("RGB", (len(frames) * (width + 2), HEIGHT), "white")
    for i, frame in enumerate(frames):
        strip.paste(frame.resize((width, HEIGHT)), (i * (width + 2), 0))
    held = io.BytesIO()
    strip.save(held, format="jpeg", quality=80)
    return f'<img alt="what the model saw" src="data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}">'
