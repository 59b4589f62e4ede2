"""A document of headings, facts and tables, written as Markdown or as one self-contained, printable HTML page.

All text is data: nothing in it becomes a tag, a link or formatting of its own. The same blocks give the same bytes.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

__all__ = ["Block", "Bullets", "Code", "Facts", "Heading", "Inline", "Link", "Signature", "Table", "Text", "html", "markdown"]


@dataclass(frozen=True)
class Code:
    """A hash or an id, letter by letter."""

    text: str


@dataclass(frozen=True)
class Link:
    """Plain text where the address is neither http(s) nor a #place in the document."""

    text: str
    address: str


Inline = str | Code | Link


@dataclass(frozen=True)
class Heading:
    level: Literal[2, 3, 4]
    text: str
    place: str = ""
    """What a Link to `#place` leads to."""


@dataclass(frozen=True)
class Text:
    parts: Sequence[Inline]
    tone: Literal["plain", "good", "bad"] = "plain"


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Inline]


@dataclass(frozen=True)
class Facts:
    """Names and values; a value may have several parts."""

    rows: Sequence[tuple[str, Sequence[Inline]]]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[Inline]]


@dataclass(frozen=True)
class Signature:
    """Lines to fill in by hand."""

    names: Sequence[str]


Block = Heading | Text | Bullets | Facts | Table | Signature

_ADDRESS = re.compile(r"(https?://|#)[^\s<>]+")

# The palette is that of the profile page (retune.data.profile).
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #d7dce3; --page: #ffffff; --panel: #f5f7fa;
  --a: #2f6db5; --good: #2f7d4f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adbb; --line: #39414d; --page: #14181e; --panel: #1d232b;
  --a: #79aee8; --good: #7cc79a; --bad: #ff8a80; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 72rem; overflow-wrap: break-word; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
h3 { border-top: 1px solid var(--line); font-size: 1.1rem; margin: 2rem 0 .5rem; padding-top: 1rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, ul { margin: .3rem 0 .8rem; } a { color: var(--a); }
.good, .bad { background: var(--panel); border-left: .3rem solid var(--good); padding: .6rem 1rem; }
.bad { border-color: var(--bad); color: var(--bad); font-weight: 600; }
.scroll { margin: .6rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: .92em; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
.facts th { color: var(--soft); font-weight: 400; min-width: 6rem; } .facts td { overflow-wrap: anywhere; }
td.n, th.n { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
code { font: .92em ui-monospace, monospace; }
.sign { display: flex; flex-wrap: wrap; gap: 2.5rem 2rem; margin-top: 3rem; }
.sign div { border-top: 1px solid var(--ink); color: var(--soft); flex: 1 1 12rem; padding-top: .2rem; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --panel: #fff; --a: #000; --good: #000; --bad: #000; }
  body { font-size: 9.5pt; max-width: none; padding: 0; } .scroll { overflow: visible; } tr, .sign, .good, .bad { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; } }
"""


def markdown(title: str, blocks: Iterable[Block]) -> str:
    """CommonMark with pipe tables."""
    return "\n\n".join([f"# {_plain(title)}", *(_markdown_block(block) for block in blocks)]) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Text():
            text = _markdown_parts(block.parts)
            return text if block.tone == "plain" else f"> **{text}**"
        case Bullets():
            return "\n".join(f"- {_markdown_parts([item])}" for item in block.items)
        case Facts():
            return "\n".join(f"- **{_plain(name)}**: {_markdown_parts(parts)}" for name, parts in block.rows)
        case Table():
            head = [[_plain(title) for title in block.head], ["---"] * len(block.head)]
            rows = [[_markdown_parts([cell]) for cell in row] for row in block.rows]
            return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])
        case Signature():
            return "\n\n".join(f"{_plain(name)}: {'_' * 40}" for name in block.names)


def _markdown_parts(parts: Sequence[Inline]) -> str:
    return "".join(_markdown_part(part) for part in parts)


def _markdown_part(part: Inline) -> str:
    match part:
        case Code():
            text = " ".join(part.text.replace("`", "'").split()).replace("|", "\\|")
            return f"`{text}`" if text else ""
        case Link() if part.address.startswith("http") and _ADDRESS.fullmatch(part.address):
            return f"[{_plain(part.text)}](<{part.address.replace('|', '%7C')}>)"
        case Link():
            return _plain(part.text)
        case str():
            return _plain(part)


def _plain(text: str) -> str:
    """Text on one line in which no character means anything to Markdown."""
    line = re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"[|\[\]`*~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"^[#>+=-]", r"\\\g<0>", line)


def html(title: str, blocks: Iterable[Block]) -> str:
    """One file without scripts, that loads nothing: light or dark as the reader's system, black on white on paper."""
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    match block:
        case Heading():
            place = f' id="{escape(block.place)}"' if block.place else ""
            return f"<h{block.level}{place}>{escape(block.text)}</h{block.level}>"
        case Text():
            marked = {"plain": "", "good": ' class="good"', "bad": ' class="bad" role="alert"'}[block.tone]
            return f"<p{marked}>{_html_parts(block.parts)}</p>"
        case Bullets():
            return f"<ul>{''.join(f'<li>{_html_parts([item])}</li>' for item in block.items)}</ul>"
        case Facts():
            rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{_html_parts(parts)}</td></tr>\n' for name, parts in block.rows)
            return f'<div class="scroll"><table class="facts">\n{rows}</table></div>'
        case Table():
            right = [all(_numeric(row[place]) for row in block.rows) for place in range(len(block.head))]
            head = _html_row("th", block.head, right)
            return f'<div class="scroll"><table>\n{head}{"".join(_html_row("td", row, right) for row in block.rows)}</table></div>'
        case Signature():
            return f'<div class="sign">{"".join(f"<div>{escape(name)}</div>" for name in block.names)}</div>'


def _html_row(tag: str, cells: Sequence[Inline], right: Sequence[bool]) -> str:
    marked = ((cell, ' class="n"' if numeric else "") for cell, numeric in zip(cells, right, strict=True))
    return "<tr>" + "".join(f"<{tag}{kind}>{_html_parts([cell])}</{tag}>" for cell, kind in marked) + "</tr>\n"


def _numeric(cell: Inline) -> bool:
    return isinstance(cell, str) and (not cell or re.fullmatch(r"[+-]?[\d,.]+(e[+-]\d+)?( to [+-]?[\d,.]+(e[+-]\d+)?)?", cell) is not None)


def _html_parts(parts: Sequence[Inline]) -> str:
    return "".join(_html_part(part) for part in parts)


def _html_part(part: Inline) -> str:
    match part:
        case Code():
            return f"<code>{escape(part.text)}</code>"
        case Link() if _ADDRESS.fullmatch(part.address):
            return f'<a href="{escape(part.address)}">{escape(part.text)}</a>'
        case Link():
            return escape(part.text)
        case str():
            return escape(part)
