"""List the rooms of the house in CONTRIBUTING.md: one line a notebook, from its own title and sentence.

python tools/rooms.py            # rewrite the list between the two marks
python tools/rooms.py --check    # say whether it is up to date
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
START, END = "<!-- rooms: written by tools/rooms.py -->", "<!-- end of rooms -->"


def head_of(notebook):
    "Read title and one-sentence subtitle of a notebook."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("# "))
    title = text.splitlines()[0][2:].strip()
    said = re.search(r"^> (.+?)(?:\n\n|\Z)", text, re.S | re.M)
    return title, " ".join(said[1].replace("\n> ", " ").split()) if said else ""


def rooms():
    "Write one table row a section, in the order of reading."
    rows = ["| room | notebook | what it is for |", "| --- | --- | --- |"]
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*/*.ipynb")) + sorted(
        (ROOT / "nbs" / "pretrain").glob("*.ipynb")
    ):
        chapter, section = notebook.parent.name.split("_", 1)[-1], notebook.stem[3:]
        module = f"stylelora.{section}" if chapter == "tools" else f"stylelora.{chapter}.{section}"
        title, said = head_of(notebook)
        rows.append(f"| `{module}` | [{title}]({notebook.relative_to(ROOT).as_posix()}) | {said} |")
    return "\n".join(rows)


def page():
    "Give CONTRIBUTING.md with a fresh list."
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n\n{rooms()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    fresh = page()
    if "--check" in sys.argv:
        sys.exit(
            None
            if fresh == PAGE.read_text(encoding="utf-8")
            else "CONTRIBUTING.md is stale: python tools/rooms.py"
        )
    PAGE.write_text(fresh, encoding="utf-8")
