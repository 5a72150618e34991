"""Enter what a pretraining wrote into reports/results/pretraining.json, which the model card reads.

    python tools/pretraining_log.py unet data/unet       # the log and the evaluations of one network
    python tools/pretraining_log.py unet data/unet3 578560   # the same, of a run that started from a network of so many
    python tools/pretraining_log.py attempt "what was changed and why"   # after 11_gates: gates and picture of this base

The first replaces the curve from the first logged image on (a run that goes on from an older one keeps the older part, and
counts from the drawings which that one had seen); the last adds a row to the list of attempts and keeps the picture under a name of its own.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from stylelora.pictures import open_image

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "reports" / "results", ROOT / "reports" / "figures"
PAUSE = 60.0  # seconds between two log lines that count as an interruption and not as work


def read_log(folder):
    "Rows of a run, with speed and with the losses at fixed noise where there are any."
    rows = {r["step"]: r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}
    rows = [rows[k] for k in sorted(rows)]
    fixed = {int(f.stem.split("-")[1]): json.loads(f.read_text()) for f in folder.glob("eval-*.json")}
    seconds, loss, out = 0.0, rows[0]["loss"], []
    for a, b in zip(rows, rows[1:]):
        took = b["time"] - a["time"]
        seconds += took if 0 < took < PAUSE else 0.0
        loss += 0.05 * (b["loss"] - loss)
        rate = (b["images"] - a["images"]) / took if 0 < took < PAUSE else None
        out.append(dict(step=b["step"], images=b["images"], loss=round(loss, 5), lr=b["lr"], rate=rate))
    thin = out[:: max(1, len(out) // 120)]
    for step, pair in sorted(fixed.items()):
        row = min(out, key=lambda r: abs(r["step"] - step))
        row |= dict(val=pair["left_out"], train=pair["seen"])
        if row not in thin:
            thin.append(row)
    return sorted(thin, key=lambda r: r["step"]), seconds


def enter(name, folder, book, seen_before=0):
    rows, seconds = read_log(Path(folder))
    rows = [r | dict(images=r["images"] + int(seen_before)) for r in rows]
    old = book["networks"].get(name, dict(log=[], minutes=0))
    kept = [r for r in old["log"] if r["images"] < rows[0]["images"]]
    before = old["minutes"] * (kept[-1]["images"] / old["images"] if kept else 0)
    book["networks"][name] = old | dict(
        images=rows[-1]["images"], minutes=before + seconds / 60, log=kept + rows
    )


def attempt(words, book):
    gates = {g["name"]: g for g in json.loads((RESULTS / "base_gates.json").read_text())}
    unet, tried = book["networks"]["unet"], book.setdefault("attempts", [])
    fixed = next((r for r in reversed(unet["log"]) if r.get("val")), {})
    number = len(tried) + 1
    tried.append(
        dict(
            attempt=number,
            images=unet["images"],
            minutes=unet["minutes"],
            loss_left_out=fixed.get("val"),
            loss_seen=fixed.get("train"),
            **{k: g["value"] for k, g in gates.items()},
            what=words,
        )
    )
    source = next(
        FIGURES / f for f in ("base-test-prompts.webp", "base-left-out.webp") if (FIGURES / f).exists()
    )
    page, _ = open_image(source)
    page = page.resize(
        (min(page.width, 512), page.height * min(page.width, 512) // page.width), Image.LANCZOS
    )
    page.save(FIGURES / f"base-attempt-{number}.webp", quality=80, method=6)  # a memory, not the exhibit


def main(what, value, *more):
    path = RESULTS / "pretraining.json"
    book = json.loads(path.read_text())
    attempt(value, book) if what == "attempt" else enter(what, value, book, *more)
    path.write_text(json.dumps(book, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) in (3, 4) else print(__doc__)
