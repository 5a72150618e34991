"""Layers: a module imports only from chapters and sections before its own, by name, and leaks nothing."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "stylelora"
FORBIDDEN = {
    "nbdev",
    "fastcore",
    "execnb",
    "pickle",
    "cPickle",
    "dill",
    "peft",
    "k_diffusion",
    "IPython",
}  # at run time


def modules():
    "List the generated modules: name relative to the package -> path."
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
        for p in sorted(PACKAGE.rglob("*.py"))
        if not p.name.startswith("_")
    }


def notebook_of(name):
    "Find the notebook that a module was generated from: its path below nbs/."
    head = modules()[name].read_text(encoding="utf-8")[:2000]
    found = re.search(r"File to edit: (?:\.\./)+nbs/(\S+\.ipynb)", head)
    assert found, f"{name} was not generated from a notebook"
    return found[1]


def place_of(notebook):
    "Give the place of a notebook in the order of reading: (chapter, section); pretraining stands on top of the library."
    found = re.fullmatch(r"(?:(\d\d)_\w+|(pretrain))/(\d\d)_\w+\.ipynb", notebook)
    assert found, f"{notebook} is no section of a chapter"
    return (99 if found[2] else int(found[1])), int(found[3])


def place(name):
    return place_of(notebook_of(name))


def imports(tree, name):
    "Yield (module of ours, imported names) for every import of our own, also inside functions."
    ours = set(modules())
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] == "stylelora":
                    yield a.name.partition(".")[2], [a.name]
        if isinstance(node, ast.ImportFrom):
            if node.level:
                target = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            elif (node.module or "").split(".")[0] == "stylelora":
                target = node.module.split(".")[1:]
            else:
                continue
            target, names = ".".join(filter(None, target)), [a.name for a in node.names]
            if target in ours:
                yield target, names
            else:
                yield from ((".".join(filter(None, [target, n])), [n]) for n in names if n != "__version__")


def tree(name):
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", modules())
def test_imports_go_downward(name):
    for target, _ in imports(tree(name), name):
        assert target in modules(), f"{name} imports {target!r}, which is no module of ours"
        assert place(target) < place(name), (
            f"{name} {place(name)} imports upward from {target} {place(target)}"
        )


@pytest.mark.parametrize("name", modules())
def test_imports_are_explicit_and_allowed(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in [a.name for a in node.names], f"{name}: star import"
        found = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        bad = {m.split(".")[0] for m in found} & FORBIDDEN
        assert not bad, f"{name} imports {bad}: allowed in tests only"
        if isinstance(node, ast.Call):
            assert not unpickles(node), f"{name}: {ast.unparse(node)[:80]} unpickles"


def unpickles(call):
    "Say whether a call could run code out of a file: torch.load must state weights_only=True, np.load no allow_pickle."
    what, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    if what == "torch.load":
        return keywords.get("weights_only") != "True"
    return (
        what == "torch.save"
        or what in ("np.load", "numpy.load")
        and keywords.get("allow_pickle", "False") != "False"
    )


@pytest.mark.parametrize("name", modules())
def test_no_mutable_globals(name):
    for node in tree(name).body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        value = getattr(node, "value", None)
        mutable = (
            isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))
            or isinstance(value, ast.Call)
            and ast.unparse(value.func) in ("list", "dict", "set")
        )
        for t in targets:
            constant = ast.unparse(t).strip("_").isupper() or ast.unparse(t) in ("__all__", "_all_")
            assert not mutable or constant, (
                f"{name}: {ast.unparse(t)} is a mutable global; constants are spelled in capitals"
            )
    assert not [n for n in ast.walk(tree(name)) if isinstance(n, ast.Global)], f"{name}: global statement"


def test_no_leaked_or_unused_names():
    "A name that only an unexported cell defines would be undefined in the package."
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--isolated",
            "--select",
            "F821,F811,F401",
            "--output-format",
            "concise",
            str(PACKAGE),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------- do the rules bite?


def test_relative_and_absolute_imports_are_seen():
    source = "from .core import root\nfrom stylelora.plots import curve\ndef f():\n    import stylelora.adapters.lora\n"
    assert [t for t, _ in imports(ast.parse(source), "schedule")] == ["core", "plots", "adapters.lora"]
    deep = "from ..core import root\nfrom . import loop\n"
    assert [t for t, _ in imports(ast.parse(deep), "pretrain.unet")] == ["core", "pretrain.loop"]


def test_unpickling_is_seen():
    calls = {
        "torch.load('x')": True,
        "torch.load('x', weights_only=True)": False,
        "np.load('x')": False,
        "np.load('x', allow_pickle=True)": True,
        "torch.save(1, 'x')": True,
        "json.load('x')": False,
    }
    for source, bad in calls.items():
        assert bool(unpickles(ast.parse(source).body[0].value)) == bad, source


def test_places_are_the_folders_numbers():
    assert (
        place("core")
        == (0, 1)
        < place("plots")
        < place("noise.schedule")
        == (1, 1)
        < place("noise.objective")
    )
    assert place("adapters.lora")[0] == 2 and place("pretrain.loop")[0] == 99


# ---------------------------------------------------------------------------------- rooms have names and an order

LIBRARY = sorted(p for p in (ROOT / "nbs").glob("[0-9]*/*.ipynb") if not p.name.startswith(("_", ".")))
NEIGHBOUR = re.compile(
    r"\b(next|previous|following|preceding) notebook\b|\bnotebook (before|after) this\b", re.I
)


def cells(path, kind):
    "List the sources of a notebook's cells of one kind."
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_module_bears_the_name_of_its_notebook(path):
    chapter, section = path.parent.name[3:], path.stem[3:]
    want = section if chapter == "tools" else f"{chapter}.{section}"
    assert f"#| default_exp {want}" in cells(path, "code")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_tests_and_pictures_of_a_notebook_import_downward_too(path):
    here, own = place_of(f"{path.parent.name}/{path.name}"), f"{path.parent.name}/{path.name}"
    for source in cells(path, "code"):
        try:
            found = ast.parse(source)
        except SyntaxError:
            continue
        for target, _ in imports(found, "notebook"):
            if target not in modules() or notebook_of(target) == own:
                continue
            assert place(target) < here, f"{own} imports upward from {target}: {source.splitlines()[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_neighbours_are_called_by_their_title(path):
    "Next and previous depend on the viewer; a link by title does not."
    for source in cells(path, "markdown"):
        assert not (hit := NEIGHBOUR.search(source)), f"{hit[0]!r} in {path.name}"


def test_the_site_lists_the_chapters_in_the_order_of_their_numbers():
    said = re.findall(
        r"^\s+- nbs/(\d\d_\w+)/\*\.ipynb$", (ROOT / "_quarto.yml").read_text(encoding="utf-8"), re.M
    )
    assert said == sorted({p.parent.name for p in LIBRARY})


def test_the_readme_lists_the_chapters_in_the_same_order():
    row = next(
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "00_tools" in line
    )
    assert re.findall(r"`(\d\d_\w+)`", row) == sorted({p.parent.name for p in LIBRARY})
