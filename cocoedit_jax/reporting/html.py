"""Self-contained HTML pages: everything inside one file, no address outside it, light and dark, narrow and wide."""

import base64
from collections.abc import Sequence
from html import escape

_CSS = """
:root { color-scheme: light dark; --back: #fff; --ink: #24282f; --soft: #646b76; --line: #dfe2e7; --fill: #f5f6f8;
  --good: #1d7a4d; --bad: #b3401d; }
@media (prefers-color-scheme: dark) { :root { --back: #1b1e24; --ink: #d9dde3; --soft: #98a0ac; --line: #363b45;
  --fill: #23272f; --good: #5cc794; --bad: #ee8e6c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
.missing { border-left: 3px solid var(--bad); padding-left: .7rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; margin: .5rem 0; }
caption { text-align: left; caption-side: bottom; padding-top: .4rem; }
th, td { padding: .32rem .8rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; vertical-align: top; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: .75rem 0 1.25rem; } img { max-width: 100%; height: auto; border-radius: 4px; }
.chart img { min-width: 44rem; }
pre { background: var(--fill); padding: .7rem .9rem; border-radius: 4px; overflow-x: auto; font-size: .85rem; }
code { font-size: .9em; overflow-wrap: anywhere; } details { margin: .5rem 0; } summary { cursor: pointer; }
"""


class Raw(str):
    """Markup that is inserted as it is; every other string is escaped."""


def text(value: str) -> str:
    return value if isinstance(value, Raw) else escape(value, quote=False)


def page(title: str, parts: Sequence[str], head: str = "") -> str:
    """A whole document; ``parts`` are markup, and so is ``head``, for its head."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n{head}</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def heading(title: str, level: int = 2) -> str:
    return f"<h{level}>{text(title)}</h{level}>"


def paragraph(content: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{text(content)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; its first column holds the row names."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    note = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{note}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure(light: bytes, alt: str, caption: str = "", dark: bytes | None = None, scroll: bool = False) -> str:
    """A PNG picture, with another one for dark screens if given; ``scroll``: sideways rather than made tiny."""

    def address(png: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(png).decode()

    night = f'<source media="(prefers-color-scheme: dark)" srcset="{address(dark)}">' if dark else ""
    note = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    picture = f'<picture>{night}<img src="{address(light)}" alt="{escape(alt)}"></picture>'
    if scroll:
        picture = f'<div class="wide chart">{picture}</div>'
    return f"<figure>{picture}{note}</figure>"


def code(content: str) -> str:
    return f"<pre><code>{escape(content, quote=False)}</code></pre>"


def folded(summary: str, content: str) -> str:
    """``content`` (markup) behind a line to click on."""
    return f"<details><summary>{text(summary)}</summary>\n{content}\n</details>"
