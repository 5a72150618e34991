"""Notebook <-> plain text, for editing notebooks in any editor.

    python tools/nbtext.py text nbs/01_noise/01_schedule.ipynb > x.txt      # notebook to text
    python tools/nbtext.py make x.txt nbs/01_noise/01_schedule.ipynb        # text to notebook (keeps outputs of unchanged cells)
    python tools/nbtext.py run  nbs/01_noise/01_schedule.ipynb …            # execute in place and store the outputs
    python tools/nbtext.py shrink nbs/01_noise/01_schedule.ipynb …          # stored pictures with a palette, nothing executed

The text form: a line `# %%` opens a code cell, `# %% [markdown]` a markdown cell (raw markdown follows), and
`# %% tags=parameters` a code cell with a tag. Cell ids are derived from the content, so they are stable.
"""

import base64
import hashlib
import io
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

WIDGET = "application/vnd.jupyter.widget-view+json"  # needs a kernel; a page would say "Loading widget…"
INLINE = "module://matplotlib_inline.backend_inline"  # with any other backend a kernel draws figures and stores none
HEAVY, LIMIT = (
    16_000,
    40_000,
)  # characters of a stored picture: above the first fewer colours, above the second fewer pixels
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def to_text(nb):
    out = []
    for c in nb.cells:
        tags = c.metadata.get("tags")
        out.append(
            "# %%"
            + (" [markdown]" if c.cell_type == "markdown" else "")
            + (f" tags={','.join(tags)}" if tags else "")
        )
        out.append(c.source + "\n")
    return "\n".join(out)


def from_text(text, old=None):
    nb = nbformat.v4.new_notebook(metadata=KERNEL)
    kept, seen = {c.source: c for c in (old.cells if old else [])}, {}
    for head, body in re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", text, re.S | re.M):
        src, md = body.strip("\n"), "[markdown]" in head
        cell = (nbformat.v4.new_markdown_cell if md else nbformat.v4.new_code_cell)(src)
        seen[src] = seen.get(src, 0) + 1
        cell.id = hashlib.sha1(f"{src}{seen[src]}".encode()).hexdigest()[:8]
        if tags := re.search(r"tags=(\S+)", head):
            cell.metadata["tags"] = tags[1].split(",")
        if not md and src in kept and kept[src].cell_type == "code":
            cell.outputs = kept[src].outputs
        nb.cells.append(cell)
    return nb


def palette_png(png, colours=(32, 64, 128, 256), error=1.0):
    """Store a picture, the base64 text of a PNG, with the smallest palette that nobody notices.

    Nobody notices a mean error below one level of 255 in each channel. `MAXCOVERAGE` keeps rare colours, a thin line's,
    and white stays white (`FASTOCTREE` makes it 254). Pictures of few colours and those with transparency stay as they are.
    """
    page = PngImageFile(io.BytesIO(base64.b64decode(png)))
    few = page.mode == "P" and len(page.getcolors()) <= colours[0]
    if few or page.convert("RGBA").getextrema()[3][0] < 255:
        return png
    page = page.convert("RGB")
    for n in colours:
        small = page.quantize(n, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        if abs(np.asarray(small.convert("RGB"), float) - np.asarray(page)).mean((0, 1)).max() < error:
            small.save(out := io.BytesIO(), "PNG", optimize=True)
            text = base64.b64encode(out.getvalue()).decode()
            return text if len(text) < 0.95 * len(png) else png  # for less, git would keep both
    return png


def light_png(png):
    "Store a picture with a palette; a heavy one with sixty-four colours, noticed or not."
    small = palette_png(png)
    return palette_png(small, (64,), 256) if len(small) > HEAVY else small


def pictures(nb):
    "Yield the stored data of each output that has a PNG."
    for c in nb.cells:
        for o in c.get("outputs", []):
            if "image/png" in o.get("data", {}):
                yield o["data"]


def light_outputs(nb):
    "Leave out of stored outputs what pages style by themselves, and what nobody sees beside something better."
    for c in nb.cells:
        for o in c.get("outputs", []):
            if "image/png" in o.get("data", {}):
                o["data"].pop("image/jpeg", None)  # Pillow's pictures come in both
            html = o.get("data", {}).get("text/html", "")
            if "<style scoped>" in html:
                html = re.sub(r"<style scoped>.*?</style>", "", html, flags=re.S)
                o["data"]["text/plain"] = "a table"
            if 'class="dataframe"' in html:  # one line: in a notebook each line costs quotes and indents
                o["data"]["text/html"] = re.sub(r">\s+<", "><", html).strip()
    return nb


def shrink(path):
    "Make the stored outputs of a notebook lighter: tables, and pictures by a palette; say how many characters that saves."
    before = Path(path).read_text(encoding="utf-8")
    text = nbformat.writes(light_outputs(nbformat.reads(before, 4))) + "\n"
    for data in pictures(nbformat.reads(text, 4)):
        png = data["image/png"].strip()
        text = text.replace(png, light_png(png))
    if text != before:
        Path(path).write_text(text, encoding="utf-8")
    return len(before) - len(text)


def run(path, timeout=1800):
    from nbclient import NotebookClient

    from stylelora.study.study import lighter

    nb = nbformat.read(path, 4)
    os.environ["MPLBACKEND"] = INLINE
    NotebookClient(
        nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(Path(path).parent)}}
    ).execute()
    for c in nb.cells:
        c.metadata.pop("execution", None)
        if c.cell_type == "code":
            c.execution_count = None
            c.outputs = [o for o in c.outputs if WIDGET not in o.get("data", {})]
        for o in c.get("outputs", []):
            if "execution_count" in o:
                o["execution_count"] = None
    for data in pictures(nb):
        png = light_png(data["image/png"])
        data["image/png"] = png if len(png) <= LIMIT else lighter(png, LIMIT, (64,))
    nb.metadata = nbformat.from_dict(KERNEL)
    nbformat.write(light_outputs(nb), path)


if __name__ == "__main__":
    cmd, *args = sys.argv[1:] or ["help"]
    if cmd == "text":
        print(to_text(nbformat.read(args[0], 4)), end="")
    elif cmd == "make":
        old = nbformat.read(args[1], 4) if Path(args[1]).exists() else None
        Path(args[1]).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(from_text(Path(args[0]).read_text(), old), args[1])
    elif cmd == "run":
        for a in args:
            run(a)
            print("ran", a)
    elif cmd == "shrink":
        for a in args:
            print(f"{a}: {shrink(a)} characters less")
    else:
        print(__doc__)
