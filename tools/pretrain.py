"""Run one pretraining notebook:  python tools/pretrain.py nbs/pretrain/10_unet.ipynb device=cuda size=128

Parameters that this notebook does not declare are skipped (another step of the pretraining may declare them), and
said. The real budgets stand in nbs/pretrain/budget.yaml, those of the second base in second.yaml (say budget=second); pairs
given here win over them. The executed copy goes to reports/runs/_pretrain/. Each notebook resumes from its own checkpoints.

plain=1 runs the code cells in this process, without jupyter: for a lent machine that has none.
"""

import json
import os
import sys
from pathlib import Path

import yaml

from stylelora.study.params import Loader  # knows that 8e-4 is a number

ROOT = Path(__file__).resolve().parent.parent


def code_cells(notebook):
    "Yield source and tags of each code cell."
    for c in json.loads(Path(notebook).read_text())["cells"]:
        if c["cell_type"] == "code":
            yield "".join(c["source"]), c["metadata"].get("tags", [])


def declared(notebook):
    "Name the parameters that a notebook declares."
    names = {}
    for source, tags in code_cells(notebook):
        if "parameters" in tags:
            exec(source, names)
    return set(names) - {"__builtins__"}


def run_plain(notebook, used):
    "Run a notebook's code in this process; the figures are drawn and dropped."
    import torch

    os.environ.setdefault("MPLBACKEND", "agg")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    os.chdir(Path(notebook).parent)
    scope = dict(display=print, __name__="__main__")
    for source, tags in code_cells(Path(notebook).name):
        exec(compile(source, Path(notebook).name, "exec"), scope)
        if "parameters" in tags:
            scope.update(used)


def main(notebook, *pairs):
    if bad := [p for p in pairs if "=" not in p]:
        sys.exit(f"{bad[0]!r} is not name=value, such as size=128")
    pairs = {k: yaml.load(v, Loader) for k, v in (p.split("=", 1) for p in pairs)}
    file, plain = pairs.pop("budget", "budget"), pairs.pop("plain", False)
    budget = yaml.load((Path(notebook).parent / f"{file}.yaml").read_text(), Loader).get(
        Path(notebook).stem, {}
    )
    given, known = budget | pairs, declared(notebook)
    used = {k: v for k, v in given.items() if k in known}
    print(
        "parameters:",
        used or "the notebook's own",
        "| not declared here:",
        sorted(set(given) - set(used)) or "none",
    )
    if plain:
        return run_plain(notebook, used)
    import papermill

    out = ROOT / "reports" / "runs" / "_pretrain" / Path(notebook).name
    out.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        notebook,
        str(out),
        used,
        kernel_name="python3",
        cwd=str(Path(notebook).parent),
        progress_bar=sys.stderr.isatty(),
        log_output=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else print(__doc__)
