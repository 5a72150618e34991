"""Run one pretraining notebook:  python tools/pretrain.py nbs/pretrain/06_unet.ipynb device=cuda size=128

Parameters that this notebook does not declare are skipped (another step of the pretraining may declare them), and
said. The real budgets stand in nbs/pretrain/budget.yaml; pairs given here win over them. The executed copy goes to reports/runs/_pretrain/. Each notebook resumes from its own checkpoints.
"""

import sys
from pathlib import Path

import papermill
import yaml

from stylelora.study.params import Loader  # knows that 8e-4 is a number

ROOT = Path(__file__).resolve().parent.parent


def main(notebook, *pairs):
    if bad := [p for p in pairs if "=" not in p]:
        sys.exit(f"{bad[0]!r} is not name=value, such as size=128")
    budget = yaml.safe_load((Path(notebook).parent / "budget.yaml").read_text()).get(Path(notebook).stem, {})
    given = budget | {k: yaml.load(v, Loader) for k, v in (p.split("=", 1) for p in pairs)}
    known = papermill.inspect_notebook(notebook)
    used = {k: v for k, v in given.items() if k in known}
    print(
        "parameters:",
        used or "the notebook's own",
        "| not declared here:",
        sorted(set(given) - set(used)) or "none",
    )
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
