"""What readers write, pages read; what readers draw, stored pages link."""

import json
import re

from stylelora.core import root


def cells(notebook):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


def test_the_guide_has_the_columns_that_its_page_shows():
    page = (root() / "reports" / "guide.qmd").read_text()
    asked = {
        k
        for t in re.findall(r"{{table guide\.json (.*?)}}", page)
        for k in re.findall(r"(?:^| )(\w+)(?::[^= ]*)?=", t)
    }
    code = "\n".join("".join(c["source"]) for c in cells(root() / "nbs/experiments/read/summary.ipynb"))
    written = {*re.findall(r"(\w+)=", code), *re.findall(r'\["(\w+)"\] =', code)}
    assert len(asked) > 5 and asked <= written, asked - written


def test_stored_readers_link_the_figures_that_they_save():
    "A figure that is a file of its own is not stored a second time in the page."
    linked = 0
    for page in sorted((root() / "reports" / "runs").glob("E[0-9]/E*.ipynb")):
        for c in cells(page):
            if "save_figure(" in "".join(c["source"]) and c["outputs"]:
                kinds = [k for o in c["outputs"] for k in o.get("data", {})]
                assert "image/png" not in kinds, f"{page.name}: {''.join(c['source'])[-200:]}"
                linked += "![Figure" in json.dumps(c["outputs"])
    assert linked > 20


def test_letters_of_stored_figures_are_nine_pixels_in_the_text_column():
    "A figure is shown at 655 pixels, or at its own size where that is smaller; a tenth is lost in rounding."
    seen = {}
    for figure in sorted((root() / "reports" / "figures").glob("*.svg")):
        text = figure.read_text()
        shown = min(655 / float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1]), 4 / 3)
        seen[figure.name] = shown * min(map(float, re.findall(r"font-size: ?([\d.]+)px", text)))
    assert len(seen) > 20
    assert {name: round(size, 1) for name, size in seen.items() if size < 8.9} == {}
