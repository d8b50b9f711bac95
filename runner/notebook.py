"""What a notebook shows of a value: the table behind every `_repr_html_`."""

from collections.abc import Iterable
from html import escape


def html_table(header: Iterable[object], rows: Iterable[Iterable[object]], note: str = "") -> str:
    """A table in HTML, every cell escaped, its `str`; below it the line `note`."""
    def cells(tag: str, line: Iterable[object]) -> str:
        return "".join(f'<{tag} style="text-align: left">{escape(str(cell))}</{tag}>' for cell in line)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"
    return table + f"<p>{escape(note)}</p>" * bool(note)
