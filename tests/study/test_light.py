"""Reading results and filling pages needs no network."""

import subprocess
import sys

from stylelora.core import root

LIGHT = "stylelora.study.results", "stylelora.report.pages", "stylelora.study.params"
NETWORKS = "diffusers transformers".split()  # torch itself comes with stylelora.core
NETWORKS += [f"stylelora.measure.{m}" for m in ("embedders", "perceptual", "evaluate", "distribution")]


def test_results_and_pages_import_no_network():
    code = f"import sys, {', '.join(LIGHT)}; print(*sorted(set({NETWORKS!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
