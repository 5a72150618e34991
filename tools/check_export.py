"""Is the package what the notebooks export?  python tools/check_export.py

Exports nbs/ into an empty copy of the project and compares the modules byte by byte, both ways: a module that was
edited by hand, one that was not exported again, and one whose notebook is gone are all named.
"""
import os, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def modules(folder):  # {relative path: bytes} of the Python files of a package
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.py"))
            if not {"assets", "__pycache__"} & set(p.relative_to(folder).parts)}

def clean_export(folder):  # export the notebooks of this checkout into `folder`, which is empty
    for name in ("settings.ini", "setup.py"): shutil.copy(ROOT/name, folder)
    skip = shutil.ignore_patterns("node_modules", ".ipynb_checkpoints")
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=skip)
    (folder/"stylelora").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(XDG_CONFIG_HOME=str(folder))
    got = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                         cwd=folder, env=env, capture_output=True, text=True)
    if got.returncode: raise RuntimeError(f"nbdev_export failed:\n{got.stderr[-2000:]}")
    return folder/"stylelora"

def differences():  # one line per module that is not what the notebooks say
    with tempfile.TemporaryDirectory() as tmp:
        want, have = modules(clean_export(Path(tmp))), modules(ROOT/"stylelora")
    lines = [f"{m}: no notebook exports it; delete it" for m in have if m not in want]
    lines += [f"{m}: exported by a notebook, but not in stylelora/" for m in want if m not in have]
    return lines + [f"{m}: differs from its notebook" for m in want if m in have and want[m] != have[m]]

if __name__ == "__main__":
    found = differences()
    for line in found: print(line)
    if found: sys.exit("run `make export` and commit what changes; edit notebooks, never stylelora/*.py")
    print("every module is what its notebook exports")
