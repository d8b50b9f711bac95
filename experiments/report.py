"""A report as one HTML file: text, tables and pictures, nothing loaded from elsewhere."""

import base64
from collections.abc import Container, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TypeVar

AnyPath = TypeVar("AnyPath", str, Path)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5b5b5b; --line: #d9d9d9; --warn: #8a3b00; --paper: #ffffff;
        --link: #00568a; --code: #f6f6f6 }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #b4b4b4; --line: #444444;
        --warn: #ffb68a; --paper: #17191c; --link: #8cc4ef; --code: #23262b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem }
h1, h2 { line-height: 1.2 } h2 { border-top: 1px solid var(--line); padding-top: 1.2rem }
p { max-width: 46rem; margin: .4rem 0 } a { color: var(--link) }
nav { margin: 1rem 0 } nav p { font-weight: 600 } nav ol { margin: .3rem 0; padding-left: 1.6rem }
figure { margin: 1rem 0 } figure img { max-width: 100%; height: auto; display: block; background: #ffffff }
dl { max-width: 46rem; font-size: .9rem; color: var(--soft) } dl div { margin: .15rem 0 } dt { display: inline;
     font-weight: 600; color: var(--ink) } dt::after { content: ": " } dd { display: inline; margin: 0 }
figcaption { max-width: 46rem; color: var(--soft); font-size: .92rem; margin-top: .3rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0 }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child, td.words, th.words { text-align: left } th { font-weight: 600 }
td:first-child { white-space: nowrap }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem }
tr.warn td, .warn { color: var(--warn); font-weight: 600 } tr.warn td:first-child::before { content: "! " }
pre { overflow-x: auto; background: var(--code); padding: .8rem; font-size: .82rem; line-height: 1.35 }
@media print { :root { color-scheme: light } body { max-width: none; padding: 0; font-size: 11pt }
               figure, tr, dl div { break-inside: avoid } h1, h2, caption { break-after: avoid } thead { display:
               table-header-group } figure img { max-height: 22cm; width: auto } .scroll { overflow: visible }
               table { font-size: 8pt } th, td { padding: .15rem .3rem } a { color: inherit; text-decoration: none }
               pre { white-space: pre-wrap; font-size: 8pt } }
@page { margin: 1.5cm }
"""


class Report:
    """Collects sections and writes them as one HTML file that needs no other file and no network.

    Text is escaped; a picture is a PNG file, which goes in as it is. Each method returns the report.

    Args:
        title: the heading; `subtitle` is the line under it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self.sections: list[str] = []
        self.parts: list[str] = []

    def section(self, heading: str) -> "Report":
        """Begin a section; the headings make the contents at the top."""
        self.sections.append(heading)
        self.parts.append(f'<h2 id="s{len(self.sections)}">{escape(heading)}</h2>')
        return self

    def text(self, *paragraphs: str, warn: bool = False) -> "Report":
        """Paragraphs; those with `warn` stand out."""
        self.parts += [f"<p{' class=warn' * warn}>{escape(p)}</p>" for p in paragraphs]
        return self

    def picture(self, path: str | Path, caption: str) -> "Report":
        """The PNG at `path`; the caption says what to see in it, and stands for it where it can't be seen."""
        data = base64.b64encode(Path(path).read_bytes()).decode()
        self.parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
                          f"<figcaption>{escape(caption)}</figcaption></figure>")
        return self

    def table(self, header: Iterable[object], rows: Iterable[Iterable[object]], caption: str = "", *,
              words: Container[int] = (), warn: Container[int] = (),
              explained: Mapping[str, str] | None = None) -> "Report":
        """A table; the columns at the indices `words` hold text, the rows at the indices `warn` stand out.

        `explained` says of each column, by its heading, in a line what it is; the lines stand below the table.
        """
        def cells(tag: str, line: Iterable[object]) -> str:
            return "".join(f"<{tag}{' class=words' * (i in words)}>{escape(str(cell))}</{tag}>"
                           for i, cell in enumerate(line))
        body = "".join(f"<tr{' class=warn' * (i in warn)}>{cells('td', row)}</tr>" for i, row in enumerate(rows))
        self.parts.append(f'<div class="scroll"><table>{f"<caption>{escape(caption)}</caption>" * bool(caption)}'
                          f"<thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table></div>")
        if explained:
            self.parts.append("<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
                                               for name, text in explained.items()) + "</dl>")
        return self

    def code(self, text: str) -> "Report":
        """Text in a fixed width, line by line."""
        self.parts.append(f"<pre>{escape(text)}</pre>")
        return self

    def html(self) -> str:
        """The page."""
        contents = "".join(f'<li><a href="#s{i + 1}">{escape(h)}</a></li>' for i, h in enumerate(self.sections))
        if contents: contents = f'<nav aria-label="Contents"><p>Contents</p><ol>{contents}</ol></nav>\n'
        return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f'<link rel="icon" href="data:,">\n'
                f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
                f"<h1>{escape(self.title)}</h1>\n<p>{escape(self.subtitle)}</p>\n{contents}"
                + "\n".join(self.parts) + "\n</body>\n</html>\n")

    def write(self, path: AnyPath) -> AnyPath:
        """Write the page to `path` and return that."""
        Path(path).write_text(self.html(), encoding="utf-8")
        return path
