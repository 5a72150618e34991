"""Render the store of treated drawings:  python tools/pretrain_render.py FOLDER ARTWORK [size=128] [jobs=2] [most=0]

ARTWORK is a node_modules folder (see nbs/pretrain/package.json) or a file that `pack` wrote; a FOLDER that ends in .xz
is such a file to write, and nothing is rendered. Kill it and start it again at will; it goes on where it was, and a plan
that has grown at its end goes on as well. `most` limits the number of drawings of each role (0: all).
"""

import json
import multiprocessing
import sys
from pathlib import Path

import pandas as pd

from stylelora.core import write_atomic
from stylelora.pretrain.store import concept_info, make_plan, open_store, pack, render, sources, unpack

ROOT = Path(__file__).resolve().parent.parent


def artwork(path):
    if Path(path).suffix == ".xz":
        return unpack(path)
    splits = json.loads((ROOT / "nbs" / "pretrain" / "splits.json").read_text())
    return sources(path, splits), concept_info(path, splits)


def main(folder, path, size=128, jobs=2, most=0):
    drawings, info = artwork(path)
    if str(folder).endswith(".xz"):
        return pack(folder, drawings, info)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(drawings)
    if most:
        few = plan.drop_duplicates("drawing").groupby("role").head(most).drawing
        plan = plan[plan.drawing.isin(few)].reset_index(drop=True)
    keep, old = (
        folder / "plan.parquet",
        pd.read_parquet(folder / "plan.parquet") if (folder / "plan.parquet").exists() else plan[:0],
    )
    if not plan[: len(old)].equals(old) and len(old):
        sys.exit(f"{keep.name} is another plan: use a new folder")
    write_atomic(folder / "concepts.json", json.dumps(info))
    open_store(folder, len(plan), size)
    plan.to_parquet(keep)
    print(len(drawings), "drawings,", len(plan), "pictures")
    print(plan.groupby(["role", "maker"]).size(), flush=True)
    each = [
        multiprocessing.Process(target=render, args=(folder, drawings, plan, size, k, jobs))
        for k in range(jobs)
    ]
    for p in each:
        p.start()
    for p in each:
        p.join()
    sys.exit(max(abs(p.exitcode) for p in each))


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if "=" not in a]
    if len(args) == 2:
        main(*args, **{k: int(v) for k, v in (a.split("=") for a in sys.argv[1:] if "=" in a)})
    else:
        print(__doc__)
