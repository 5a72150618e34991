"""Notebook <-> plain text, for editing notebooks in any editor.

    python tools/nbtext.py text nbs/01_noise/01_schedule.ipynb > x.txt      # notebook to text
    python tools/nbtext.py make x.txt nbs/01_noise/01_schedule.ipynb        # text to notebook (keeps outputs of unchanged cells)
    python tools/nbtext.py run  nbs/01_noise/01_schedule.ipynb …            # execute in place and store the outputs

The text form: a line `# %%` opens a code cell, `# %% [markdown]` a markdown cell (raw markdown follows), and
`# %% tags=parameters` a code cell with a tag. Cell ids are derived from the content, so they are stable.
"""

import hashlib
import re
import sys
from pathlib import Path

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"  # needs a kernel; a page would say "Loading widget…"
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


def run(path, timeout=1800):
    from nbclient import NotebookClient

    from stylelora.study.study import lighter

    nb = nbformat.read(path, 4)
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
            if "image/png" in o.get("data", {}):
                o["data"]["image/png"] = lighter(o["data"]["image/png"], 40_000, (64,))
    nb.metadata = nbformat.from_dict(KERNEL)
    nbformat.write(nb, path)


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
    else:
        print(__doc__)
