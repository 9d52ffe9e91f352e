"""A short document of headings, text, tables and figures, written as HTML, Markdown, CSV and LaTeX."""

import base64
import csv
import dataclasses
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.7rem; text-align: left; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; }
figure { margin: 1.5rem 0; }
figcaption { color: #555; font-size: 0.9rem; }
"""


@dataclasses.dataclass
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass
class Table:
    """Cells are text already; `name` is that of its .csv and .tex files."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Padded, so that it reads as a table in a terminal too."""
        lines = [[_markdown_cell(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        lines.insert(1, ["-" * max(width, 3) for width in widths])
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        )

    def csv(self) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])
        return file.getvalue()

    def latex(self) -> str:
        """For a document that loads booktabs."""
        body = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in self.rows]
        head = " & ".join(_latex(cell) for cell in self.columns) + r" \\"
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.caption)}}}",
            rf"\begin{{tabular}}{{{'l' * len(self.columns)}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
            r"\end{tabular}", r"\end{table}", "",
        ])  # fmt: skip

    def html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(line(row, "td") for row in self.rows)
        return (
            f"<p>{html.escape(self.caption)}</p>\n<table><thead>{line(self.columns, 'th')}</thead>\n"
            f"<tbody>{body}</tbody></table>"
        )


@dataclasses.dataclass
class Picture:
    """A figure; `name` is that of its .png file."""

    name: str
    caption: str
    figure: Figure
    dpi: int = 120

    def png(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()


Block = Heading | Table | Picture | str  # str: a paragraph


def write_document(
    folder: Path, stem: str, title: str, blocks: list[Block], formats: tuple[str, ...] = ("html", "md", "csv", "tex")
) -> None:
    """Writes NAME.png of each picture; STEM.html, which holds its pictures in itself; STEM.md, which names the files
    beside it; and each table as NAME.csv and NAME.tex."""
    folder.mkdir(parents=True, exist_ok=True)
    page, text = [f"<h1>{html.escape(title)}</h1>"], [f"# {title}"]
    for block in blocks:
        if isinstance(block, Picture):
            png = block.png()
            (folder / f"{block.name}.png").write_bytes(png)
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            caption = html.escape(block.caption)
            page.append(f'<figure><img src="{source}" alt="{caption}">\n<figcaption>{caption}</figcaption></figure>')
            text.append(f"![{_one_line(block.caption)}]({block.name}.png)\n\n{block.caption}")
        elif isinstance(block, Table):
            page.append(block.html())
            text.append(f"{block.caption}\n\n{block.markdown()}")
            for ending, content in (("csv", block.csv), ("tex", block.latex)):
                if ending in formats:
                    (folder / f"{block.name}.{ending}").write_text(content())
        elif isinstance(block, Heading):
            page.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
            text.append(f"{'#' * block.level} {block.text}")
        else:
            page.append(f"<p>{html.escape(block)}</p>")
            text.append(block)
    if "html" in formats:
        (folder / f"{stem}.html").write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(page) + "\n</body></html>\n"
        )
    if "md" in formats:
        (folder / f"{stem}.md").write_text("\n\n".join(text) + "\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_cell(text: str) -> str:
    """A bar would begin a new cell, an angle bracket a tag."""
    return _one_line(text).replace("|", "\\|").replace("<", "\\<")


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {sign: f"${sign}$" for sign in "<>|"}  # other signs in the default encoding of fonts
    special |= {sign: rf"\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
