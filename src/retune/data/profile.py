"""The profile page: one HTML file for a person, drawn from preprocessing's report alone. No scripts, no dates, the same bytes each time."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from retune.config import Prompt
from retune.data.split import SPLITS

__all__ = ["profile_page"]

_SHOWN = 50
_WIDTH, _HEIGHT = 560, 190

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #d7dce3; --page: #ffffff; --panel: #f5f7fa;
  --a: #2f6db5; --b: #d98032; --c: #3f8f5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adbb; --line: #39414d; --page: #14181e; --panel: #1d232b;
  --a: #79aee8; --b: #eba766; --c: #7cc79a; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } p { color: var(--soft); margin: .2rem 0 .8rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.cards div { background: var(--panel); border-radius: .5rem; padding: .6rem 1rem; }
.cards b { display: block; font-size: 1.3rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { color: var(--soft); }
.scroll { margin-top: .8rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: .92em; } th, td { border-bottom: 1px solid var(--line);
  padding: .25rem .7rem; text-align: left; vertical-align: top; overflow-wrap: break-word; }
td.n, th.n { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
svg { background: var(--panel); border-radius: .5rem; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.train { fill: var(--a); } .validation { fill: var(--b); } .test { fill: var(--c); } .axis { stroke: var(--line); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin: 0 .3em 0 .9em; }
"""


def profile_page(report: Mapping[str, Any], prompt: Prompt) -> str:
    """The page for the report of `retune.data.preprocess.preprocess`."""
    name, description = prompt.name, prompt.description
    splits = report["splits"]
    body = [
        f"<h1>Data of {escape(name)}</h1><p>{escape(description)}</p>",
        _cards(report),
        "<h2>Splits</h2>",
        _table(
            ["split", "rows", "inputs", "share", "groups"],
            [[name, split["rows"], split["inputs"], f"{split['share']:.1%}", split["groups"]] for name, split in splits.items()],
        ),
        *_shares("Labels", "Share of each label in each split.", {split: splits[split]["labels"] for split in SPLITS}),
    ]
    for column in splits["train"]["slices"]:
        counts = {split: splits[split]["slices"][column] for split in SPLITS}
        body += _shares(f"Slice: {column}", f"Share of each {column} in each split.", counts)
    body += _lengths(report)
    body += [
        "<h2>Rows by landed object</h2><p>rows = kept + duplicates + near-duplicates</p>",
        _table(
            ["object", "rows", "kept", "duplicates", "near-duplicates"],
            [[row["object"], row["rows"], row["kept"], row["duplicates"], row["near_duplicates"]] for row in report["objects"]],
        ),
        *_listed(
            "Contradictory labels",
            "The same text landed with two labels; the later one counts.",
            ["row", "label", "later row", "later label"],
            [[row["id"], row["label"], row["later_id"], row["later_label"]] for row in report["contradictions"]],
        ),
        *_listed(
            "Near-duplicates removed",
            "A text close to an earlier one in another split leaves, so that no test row has been trained on.",
            ["row", "split", "near to", "in", "similarity", "text", "near text"],
            [
                [row["id"], row["split"], row["near_id"], row["near_split"], f"{row['similarity']:.2f}", row["text"], row["near_text"]]
                for row in report["near_duplicate_rows"]
            ],
        ),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>Data of {escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _cards(report: Mapping[str, Any]) -> str:
    figures = [
        ("rows landed", report["rows"]),
        ("kept", report["kept"]),
        ("exact duplicates", report["duplicates"]),
        ("near-duplicates removed", report["near_duplicates"]),
        ("contradictory labels", len(report["contradictions"])),
    ]
    if report.get("augmented"):
        figures.append(("noisy training copies", report["augmented"]))
    if report["longer_than_max_tokens"] is not None:
        figures.append((f"longer than {report['max_tokens']} tokens", report["longer_than_max_tokens"]))
    return '<div class="cards">' + "".join(f"<div><b>{value:,}</b>{escape(what)}</div>" for what, value in figures) + "</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def numeric(value: Any) -> bool:
        return isinstance(value, int | float) or str(value).rstrip("%").replace(".", "", 1).isdecimal()

    def cell(tag: str, value: Any, right: bool) -> str:
        text = f"{value:,}" if isinstance(value, int | float) else escape(str(value))
        return f'<{tag} class="n">{text}</{tag}>' if right else f"<{tag}>{text}</{tag}>"

    listed = list(rows)
    right = [all(numeric(row[place]) for row in listed) for place in range(len(head))]
    titles = "".join(cell("th", title, side) for title, side in zip(head, right, strict=True))
    lines = "".join("<tr>" + "".join(cell("td", *pair) for pair in zip(row, right, strict=True)) + "</tr>\n" for row in listed)
    return f'<div class="scroll"><table>\n<tr>{titles}</tr>\n{lines}</table></div>'


def _listed(title: str, words: str, head: Sequence[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return [f"<h2>{title}</h2><p>None.</p>"]
    more = f" The first {_SHOWN} of {len(rows):,}." if len(rows) > _SHOWN else ""
    return [f"<h2>{title}</h2><p>{words}{more}</p>", _table(head, rows[:_SHOWN])]


def _shares(title: str, words: str, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A plot of shares per split, with the counts in a table beside it."""
    values = list(dict.fromkeys(value for split in SPLITS for value in counts[split]))
    if not values:
        return []
    totals = {split: sum(counts[split].values()) or 1 for split in SPLITS}
    shown = values[:12]
    shares = {split: [counts[split].get(value, 0) / totals[split] for value in shown] for split in SPLITS}
    table = _table(
        [title.removeprefix("Slice: "), *SPLITS], [[value, *(counts[split].get(value, 0) for split in SPLITS)] for value in values[:_SHOWN]]
    )
    keys = "".join(f'<svg class="key" viewBox="0 0 1 1"><rect class="{split}" width="1" height="1"/></svg>{split}' for split in SPLITS)
    plot = _grouped_bars(shown, shares, f"{title}: share per split")
    return [f"<h2>{escape(title)}</h2><p>{escape(words)}{keys}</p>", f'<div class="plots"><figure>{plot}</figure>{table}</div>']


def _svg(label: str, shapes: Iterable[str]) -> str:
    opening = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(label)}">'
    return opening + "".join(shapes) + "</svg>"


def _grouped_bars(values: Sequence[str], shares: Mapping[str, Sequence[float]], label: str) -> str:
    left, bottom, top = 40, _HEIGHT - 30, 12
    highest = max((share for split in shares.values() for share in split), default=0.0) or 1.0
    slot = (_WIDTH - left - 10) / len(values)
    bar = min(slot / 4, 34)
    shapes = [
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{_WIDTH - 10}" y2="{bottom}"/>',
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{highest:.0%}</text>',
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>',
    ]
    for place, value in enumerate(values):
        middle = left + slot * (place + 0.5)
        for number, split in enumerate(SPLITS):
            height = (bottom - top) * shares[split][place] / highest
            x = middle + (number - 1.5) * bar
            title = f"<title>{escape(value)}, {split}: {shares[split][place]:.1%}</title>"
            place_of = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{bar - 1:.1f}" height="{height:.1f}"'
            shapes.append(f'<rect class="{split}" {place_of}>{title}</rect>')
        letters = max(3, int(slot / 6.5))
        shown = value if len(value) <= letters else value[: letters - 1] + "…"
        shapes.append(f'<text x="{middle:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(shown)}</text>')
    return _svg(label, shapes)


def _lengths(report: Mapping[str, Any]) -> list[str]:
    lengths = {unit: value for unit, value in report["lengths"].items() if value["counts"]}
    if not lengths:
        return []
    figures = [f"<figure>{_histogram(value, unit)}<figcaption>{unit} per text</figcaption></figure>" for unit, value in lengths.items()]
    quantiles = list(next(iter(lengths.values()))["quantiles"])
    head = ["unit", *(f"{float(quantile):.0%}" for quantile in quantiles)]
    rows = [[unit, *(f"{value['quantiles'][quantile]:g}" for quantile in quantiles)] for unit, value in lengths.items()]
    words = "Kept rows of all splits. The last bar holds everything longer. Below: quantiles."
    return ["<h2>Lengths</h2>", f"<p>{words}</p>", f'<div class="plots">{"".join(figures)}</div>', _table(head, rows)]


def _histogram(value: Mapping[str, Any], unit: str) -> str:
    left, bottom, top = 40, _HEIGHT - 30, 12
    counts, edges = value["counts"], value["edges"]
    highest = max(counts) or 1
    scale = (_WIDTH - left - 10) / max(edges[-1] - edges[0], 1)
    shapes = [
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{_WIDTH - 10}" y2="{bottom}"/>',
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{highest:,}</text>',
    ]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        height = (bottom - top) * count / highest
        x, width = left + (low - edges[0]) * scale, (high - low) * scale
        shapes.append(
            f'<rect class="train" x="{x:.1f}" y="{bottom - height:.1f}" width="{max(width - 1, 1):.1f}" height="{height:.1f}">'
            f"<title>{low} to {high} {unit}: {count:,} rows</title></rect>"
        )
    for share in (0, 0.25, 0.5, 0.75, 1):
        edge = round(edges[0] + share * (edges[-1] - edges[0]))
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        shapes.append(f'<text x="{left + (edge - edges[0]) * scale:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{edge:,}</text>')
    return _svg(f"Histogram of {unit} per text", shapes)
