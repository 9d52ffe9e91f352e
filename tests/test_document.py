"""One document as HTML, Markdown, CSV and LaTeX: what a cell holds is what is read, whatever its signs."""

import base64
import csv
import html.parser
import re

import pytest
from matplotlib.figure import Figure

from vit_hf.analysis.document import Heading, Picture, Table, write_document

HARD = ["a|b", "x < y > z", "R&D", "drop_path 10 %", "0.93 ± 0.01", r"\n {#1} $5 ~^", "two\nlines", 'say "hi", ok']


class Page(html.parser.HTMLParser):
    """Texts of the cells, every tag, and every address that a page would load."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.tags, self.addresses, self._cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self._cell = tag in ("td", "th")
        self.cells += [""] * self._cell

    def handle_endtag(self, tag):
        self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.cells[-1] += data


@pytest.fixture
def table():
    return Table("numbers", "50 % of <all> & more_", ["run"] * len(HARD), [HARD, [""] * len(HARD)])


@pytest.fixture
def written(tmp_path, table):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    blocks = [Heading("Part <1>"), "A paragraph & more.", table, Picture("curve", "A < B", figure, dpi=50)]
    write_document(tmp_path / "new/folder", "report", "Title & <b>", blocks)
    return tmp_path / "new/folder"


def test_csv_gives_the_cells_back(table):
    assert list(csv.reader(table.csv().splitlines(keepends=True))) == [table.columns, *table.rows]


def test_markdown_keeps_one_line_a_row_and_one_cell_a_cell(table):
    lines = table.markdown().splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1  # padded
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", lines[2])[1:-1]]
    assert cells[:2] == [r"a\|b", r"x \< y > z"] and cells[6] == "two lines" and len(cells) == len(HARD)


def test_latex_has_no_sign_with_a_meaning(table):
    text = table.latex()
    (row,) = [line for line in text.splitlines() if line.startswith("a")]
    cells = row.split(" & ")
    assert cells[:5] == ["a$|$b", "x $<$ y $>$ z", r"R\&D", r"drop\_path 10 \%", r"0.93 $\pm$ 0.01"]
    assert cells[5] == r"\textbackslash{}n \{\#1\} \$5 \textasciitilde{}\textasciicircum{}"
    assert r"\caption{50 \% of $<$all$>$ \& more\_}" in text and rf"\begin{{tabular}}{{{'l' * len(HARD)}}}" in text


def test_html_gives_the_cells_back_and_loads_nothing(written, table):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.cells == [*table.columns, *table.rows[0], *table.rows[1]]
    assert "<h1>Title &amp; &lt;b&gt;</h1>" in text and "<h2>Part &lt;1&gt;</h2>" in text
    assert not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text and "@import" not in text
    (address,) = page.addresses
    kind, picture = address.split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(picture) == (written / "curve.png").read_bytes()


def test_the_files_beside_it(written, table):
    assert {path.name for path in written.iterdir()} == {
        "report.html", "report.md", "curve.png", "numbers.csv", "numbers.tex"
    }  # fmt: skip
    text = (written / "report.md").read_text()
    assert text.startswith("# Title & <b>\n\n## Part <1>\n\nA paragraph & more.\n\n")
    assert table.markdown() in text and "![A < B](curve.png)" in text
    assert (written / "numbers.csv").read_text() == table.csv() and (written / "curve.png").read_bytes()[1:4] == b"PNG"


def test_formats_can_be_chosen(tmp_path, table):
    write_document(tmp_path, "report", "Title", [table], formats=("md",))
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
