"""Small parts of a self-contained HTML page: escaped text, bars, tables, pictures as data; and the page around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_JPEG_QUALITY = 82

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1d1f21; --quiet: #6b7075; --line: #dcdedf;
  --bar: #6d95c4; --alarm: #c2342b; --alarm-ground: #fbe4e1; --badge: #e9eef4; }
@media (prefers-color-scheme: dark) { :root { --ground: #17191b; --card: #202326; --ink: #e6e7e8; --quiet: #9aa0a6;
  --line: #373b3f; --bar: #5c85b6; --alarm: #ff8b7e; --alarm-ground: #4a2420; --badge: #2d3640; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } .quiet { color: var(--quiet); font-weight: normal; }
table { border-collapse: collapse; } th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); } th { font-weight: 600; } td.number, th.number { text-align: right; }
.scroll { overflow-x: auto; }
.bars { display: grid; grid-template-columns: max-content max-content minmax(4rem, 30rem); gap: .1rem .7rem;
  align-items: center; font-size: .87rem; } .bars .count { text-align: right; color: var(--quiet); }
.bars i { display: block; height: .8rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
.bars i.alarm { background: var(--alarm); } .bars .label { overflow-wrap: anywhere; max-width: 22rem; }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 4rem; }
.notes { padding: .6rem 1rem .6rem 2rem; background: var(--alarm-ground); border-radius: 6px; }
.sheet { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; max-width: 100%; border-radius: 3px; }
figcaption { font-size: .8rem; margin-top: .35rem; overflow-wrap: anywhere; }
.name { font-weight: 600; } .caption { max-height: 9.5em; overflow-y: auto; margin-top: .2rem; white-space: pre-wrap; }
del { color: var(--alarm); } .alarm { color: var(--alarm); }
.badge { display: inline-block; padding: 0 .4em; margin: .15rem .2rem 0 0; border-radius: 3px; background: var(--badge);
  font-size: .74rem; }
"""


def text(value: object) -> str:
    """Returns a value as HTML text; characters that are no Unicode, as in foreign file names, become ``?``."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def bars(rows: Iterable[tuple[str, int, bool]]) -> str:
    """Returns a histogram.

    Args:
        rows: label, count, and whether it is a cause for concern.
    """
    rows = list(rows)
    largest = max((count for _, count, _ in rows), default=0) or 1
    parts = [
        f'<span class="label">{text(label)}</span><span class="count">{count}</span>'
        f'<i{" class=alarm" if alarm else ""} style="width:{100 * count / largest:.2f}%"></i>'
        for label, count, alarm in rows
    ]
    return f'<div class="bars">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table; whole numbers stand to the right."""
    rows = [list(row) for row in rows]
    is_number = [bool(rows) and all(isinstance(row[column], int) for row in rows) for column in range(len(head))]

    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{text(value)}</{tag}>"
            for value, number in zip(values, is_number, strict=True)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def picture(image: Image.Image, description: str) -> str:
    """Returns an ``img`` element that holds the picture itself."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/jpeg;base64,{content}" width="{image.width}" height="{image.height}"'
        f' alt="{text(description)}">'
    )


def page(title: str, parts: Iterable[str]) -> str:
    """Returns the whole page; it needs no other file and no network."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
