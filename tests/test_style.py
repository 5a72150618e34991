"""The house style, as rules that a machine can check: budgets of cells, prose, directives, documentation.

Run it on single notebooks while writing:  python tests/test_style.py nbs/01_noise/01_schedule.ipynb
"""

import ast
import io
import json
import re
import statistics
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_CELLS, MAX_CELL_LINES, MAX_HIDDEN_LINES, MAX_WIDTH = 90, 25, 12, 110
MAX_PARAMETERS = 30  # a parameters cell is a table: one literal and its meaning a line
MAX_EXPORTED_LINES, MAX_BYTES, MAX_HIDDEN_SHARE, MAX_DEF, MAX_MEDIAN_BODY = 400, 200 * 1024, 0.10, 40, 10
DIRECTIVES = {
    "export",
    "exporti",
    "hide",
    "slow",
    "cuda",
    "eval",
    "default_exp",
    "label",
    "fig-cap",
    "fig-alt",
    "tbl-cap",
    "echo",
    "output",
    "warning",
    "code-fold",
    "code-summary",
    "include",
}
NEEDS_VALUE = DIRECTIVES - {"export", "exporti", "hide", "slow", "cuda"}
MACHINE = re.compile(r"(?<![\w.~/-])/(?:tmp|work|root|home/\w+|Users/\w+)/[\w.]")


@dataclass
class Kind:
    prose: tuple  # smallest and largest share of prose
    library: bool = False  # exports must be tested, the head and tail have a form
    exports: bool = False  # may export at all
    parameters: bool = False  # needs exactly one cell tagged "parameters"


KINDS = {
    "library": Kind((0.25, 0.75), library=True, exports=True),
    "pretrain": Kind((0.25, 1), exports=True),
    "experiments": Kind((0.40, 1), parameters=True),
    "demo": Kind((0.40, 1)),
    "start": Kind((0.25, 1)),
}


# ---------------------------------------------------------------------------------- reading


class Cell:
    def __init__(self, raw):
        self.raw, self.id = raw, raw.get("id", "")
        self.source = "".join(raw["source"])
        self.is_code, self.lines = raw["cell_type"] == "code", self.source.splitlines()
        self.directives = [line for line in self.lines if re.match(r"#\s*\|", line)] if self.is_code else []
        names = {m[1] for d in self.directives if (m := re.match(r"#\|\s*([\w-]+)", d))}
        self.export, self.hide = bool(names & {"export", "exporti"}), "hide" in names
        self.code = [line for line in self.lines if not re.match(r"#\s*\|", line)]
        self.tags = raw.get("metadata", {}).get("tags", [])
        self.test = (
            self.is_code
            and not self.export
            and any(re.match(r"\s*(test_\w+\(|assert\b|with ExceptionExpected)", x) for x in self.lines)
        )

    def __str__(self):
        return f"cell {self.id}: {next(iter(self.code), '')[:60]!r}"


def read(path):
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    return raw, [Cell(c) for c in raw["cells"]]


def kind_name(path):
    "Tell from its folder what kind of notebook this is."
    parts = Path(path).resolve().parts
    below = parts[len(parts) - parts[::-1].index("nbs") : -1] if "nbs" in parts[:-1] else parts[-2:-1]
    if not below:
        return "start"
    return "library" if re.match(r"\d\d_", below[0]) else below[0]


def kind_of(path):
    return KINDS[kind_name(path)]


def notebooks():
    return [
        p
        for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if not re.search(r"(^|/)[._]", str(p.relative_to(ROOT)))
    ]


def prose_share(cells):
    words = [(c.is_code, len(c.source.split())) for c in cells]
    return sum(n for code, n in words if not code) / max(1, sum(n for _, n in words))


# ---------------------------------------------------------------------------------- rules: each yields complaints


def rule_cells(path, raw, cells):
    "Number, length and width of cells; hidden cells; no two exports in a row."
    if len(cells) > MAX_CELLS:
        yield f"{len(cells)} cells, at most {MAX_CELLS}"
    for c in cells:
        limit = MAX_PARAMETERS if "parameters" in c.tags else MAX_CELL_LINES
        if c.is_code and len(c.code) > limit:
            yield f"{c}: {len(c.code)} lines, at most {limit}"
        if c.hide and len(c.code) > MAX_HIDDEN_LINES:
            yield f"{c}: hidden and {len(c.code)} lines, at most {MAX_HIDDEN_LINES}"
        for line in c.lines:
            free = (
                not c.is_code or line.startswith(("#| fig-", "#| tbl-")) or "http" in line
            )  # prose wraps by itself
            if len(line) > MAX_WIDTH and not free:
                yield f"{c}: {len(line)} columns: {line[:50]}…"
    hidden = sum(c.hide for c in cells)
    if hidden > max(1, MAX_HIDDEN_SHARE * len(cells)):
        yield f"{hidden} hidden cells of {len(cells)}"
    if kind_of(path).exports:
        for a, b in zip(cells, cells[1:]):
            if a.export and b.export:
                yield f"{b}: two exports in a row; put prose or a test between"


def rule_prose(path, raw, cells):
    "Share of words that are prose."
    (low, high), share = kind_of(path).prose, prose_share(cells)
    if not low <= share <= high:
        yield f"prose share {share:.2f}, should be {low:.2f} to {high:.2f}"


def rule_directives(path, raw, cells):
    "One directive is one line with a known name; a trailing colon would swallow the next line of code."
    for c in cells:
        for d in c.directives:
            m = re.fullmatch(r"#\| ([\w-]+)(?: (\S.*)|: (\S.*))?", d.rstrip())
            if d.rstrip().endswith(":"):
                yield f"{c}: directive ends in a colon: {d}"
            elif not m:
                yield f"{c}: malformed directive (or several lines): {d}"
            elif m[1] not in DIRECTIVES:
                yield f"{c}: unknown directive: {d}"
            elif m[1] in NEEDS_VALUE and not (m[2] or m[3]):
                yield f"{c}: directive without its value: {d}"
        after = c.lines[len(c.directives) :] if c.is_code else []
        if any(re.match(r"#\s*\|", line) for line in after):
            yield f"{c}: directives belong on top of the cell"
        if c.export and not kind_of(path).exports:
            yield f"{c}: notebooks of this folder export nothing"


def rule_ids(path, raw, cells):
    "Unique ids make the export stable."
    ids = [c.id for c in cells]
    if raw["nbformat"] != 4 or raw["nbformat_minor"] < 5:
        yield "nbformat must be 4.5 or later"
    if not all(ids) or len(set(ids)) != len(ids):
        yield "cell ids are missing or repeated"
    if raw["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "kernelspec.name must be python3 (papermill needs it)"


def rule_outputs(path, raw, cells):
    "Stored outputs hold no errors and no traces of the machine, and the file stays small."
    for c in cells:
        for o in c.raw.get("outputs", []):
            if o["output_type"] == "error":
                yield f"{c}: stored error {o.get('ename')}"
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {}):
                yield f"{c}: a widget that no page can show"
            if o.get("name") == "stderr":
                yield f"{c}: stored stderr: {''.join(o['text'])[:80]!r}"
    for c in cells:
        text = c.source + json.dumps([o for o in c.raw.get("outputs", [])])
        if m := MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", text)):
            yield f"{c}: a path of this machine: {m[0]}"
    size = Path(path).stat().st_size
    if kind_of(path).library and size > MAX_BYTES:
        yield f"{size // 1024} KB, at most {MAX_BYTES // 1024}"


def rule_head_and_tail(path, raw, cells):
    "Library notebooks open with their module, title and sentence, and close with what was checked."
    if not kind_of(path).library:
        return
    if not re.fullmatch(r"#\| default_exp [\w.]+", cells[0].source.strip()):
        yield "the first cell must be #| default_exp"
    if not re.match(r"# \S.*\n+> \S.*\.\n", cells[1].source):
        yield 'the second cell must be a title and "> one sentence."'
    if "What we checked" not in cells[-1].source:
        yield 'the last cell must list "What we checked"'
    if any("nbdev_export(" in c.source for c in cells):
        yield "exporting is the Makefile's job; remove nbdev_export()"


def rule_tests(path, raw, cells):
    "At least as many tests as exports, and a readable amount of exported code."
    if not kind_of(path).library:
        return
    exports, tests = sum(c.export for c in cells), sum(c.test for c in cells)
    if tests < exports:
        yield f"{tests} test cells for {exports} export cells"
    lines = sum(len(c.code) for c in cells if c.export)
    if lines > MAX_EXPORTED_LINES:
        yield f"{lines} exported lines, at most {MAX_EXPORTED_LINES}; split the notebook"


def rule_stars(path, raw, cells):
    "No star imports, but for fastcore.test in a hidden cell."
    for c in cells:
        for line in c.code if c.is_code else []:
            if re.match(r"\s*from \S+ import \*", line) and not (c.hide and "fastcore.test" in line):
                yield f"{c}: {line.strip()}"


def rule_parameters(path, raw, cells):
    "An experiment has one parameters cell of literals, each with a comment; nobody else has any."
    tagged, want = [c for c in cells if "parameters" in c.tags], int(kind_of(path).parameters)
    if kind_of(path).library and tagged or want and len(tagged) != want:
        yield f"{len(tagged)} cells tagged parameters, not {want}"
    for c in tagged:
        for node in ast.parse(c.source).body:
            name = ast.unparse(node).split("=")[0].strip()
            try:
                ast.literal_eval(node.value)
            except (ValueError, AttributeError):
                yield f"parameter {name}: only literals, values derived from them go to the next cell"
            if want and "#" not in c.lines[node.end_lineno - 1]:
                yield f"parameter {name}: say meaning and unit in a comment"


def rule_documentation(path, raw, cells):
    "Public definitions have a docstring, and a comment for each parameter."
    for c in cells:
        if not c.export:
            continue
        source = "\n".join(c.lines)
        comments = {
            t.start[0]
            for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body:
            yield from (f"{c}: {p}" for p in _undocumented(node, comments))


def _undocumented(node, comments, method=False):
    if (
        not isinstance(node, (ast.FunctionDef, ast.ClassDef))
        or node.name.startswith("_")
        and node.name != "__init__"
    ):
        return
    if node.name != "__init__":
        first = (ast.get_docstring(node) or "").split("\n")[0]
        trivial = method and (node.end_lineno - node.lineno < 1 or node.name == "forward")
        if not first and not trivial:
            yield f"{node.name} has no docstring"
        if first and not first.endswith((".", "?")):
            yield f"docstring of {node.name} must end with a full stop"
        if len(first) > 90:
            yield f"docstring of {node.name}: {len(first)} columns, at most 90"
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from _undocumented(inner, comments, method=True)
    elif not method:
        a = node.args
        for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]:
            told = arg.annotation and "help=" in ast.unparse(arg.annotation)  # an option of a command
            if arg.lineno not in comments and not told:
                yield f"{node.name}: say in a comment what {arg.arg} is"


SILENT_HEADING = re.compile(r"what we checked", re.I)


def shows(cell):
    "Say whether a code cell has a visible result: a picture, a table, a value or a printed line."
    for o in cell.raw.get("outputs", []):
        if o["output_type"] in ("display_data", "execute_result"):
            return True
        if o.get("name") == "stdout" and "".join(o.get("text", "")).strip():
            return True
    return False


def sections(cells):
    "Cut a notebook at its first- and second-level headings: (heading, cells)."
    head, inside = None, []
    for c in cells:
        found = None if c.is_code else re.search(r"^##? (.*)$", c.source, re.M)
        if found:
            yield head, inside
            head, inside = found[1], []
        inside.append(c)
    yield head, inside


def rule_visible(path, raw, cells):
    "Every section with code shows something: whoever scrolls without reading code still learns what it does."
    if kind_name(path) == "experiments":  # they show what a run has found, and are stored without
        return
    for head, inside in sections(cells):
        code = [c for c in inside if c.is_code]
        if head and code and not SILENT_HEADING.search(head) and not any(map(shows, code)):
            yield f"section {head!r} shows nothing"


def rule_hints(path, raw, cells):
    "Public functions have a type hint for every argument, and for the result unless there is none."
    for c in cells:
        for node in ast.parse("\n".join(c.lines)).body if c.export else ():
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                a = node.args
                named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
                bare = [arg.arg for arg in named if arg.annotation is None]
                if bare:
                    yield f"{node.name}: no type hint for {', '.join(bare)}"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def tangled(node):
    "Say what makes a statement hard to read at once, or nothing."
    for n in ast.walk(node):
        if isinstance(n, COMPREHENSIONS) and any(
            isinstance(m, COMPREHENSIONS) for m in ast.walk(n) if m is not n
        ):
            return "nested comprehensions"
        if isinstance(n, COMPREHENSIONS) and sum(isinstance(m, ast.IfExp) for m in ast.walk(n)) > 1:
            return "two conditions inside a comprehension"
        if (
            isinstance(n, ast.Assign)
            and isinstance(n.value, ast.Tuple)
            and isinstance(n.targets[0], ast.Tuple)
        ):
            if any(isinstance(v, ast.IfExp) for v in n.value.elts):
                return "a tuple assignment with a condition"
        values = n.values if isinstance(n, ast.Dict) else []
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "dict":
            values = [k.value for k in n.keywords]
        if sum(isinstance(v, ast.Lambda) for v in values) > 2:
            return "a dict of lambdas; write a table of named functions"
    return ""


def rule_lines(path, raw, cells):
    "Exported lines read at once."
    for c in cells:
        for node in ast.parse("\n".join(c.lines)).body if c.export else ():
            for inner in ast.walk(node):
                if isinstance(inner, ast.stmt) and not hasattr(inner, "body") and (what := tangled(inner)):
                    yield f"{c}, line {inner.lineno}: {what}"


OLD_WORDS = re.compile(
    r"\b(vendors?|arms?|cfg_scale|cfg|adapter_scale|remap|law|grad_clip|checkpointing|style_dose"
    r"|appoint|settle|heights|spellings?|peers?|house|houses)\b"
)


def rule_words(path, raw, cells):
    "One word for a thing: the glossary's. Words that were replaced stay away from code and prose."
    for c in cells:
        if hit := OLD_WORDS.search(c.source):
            yield f"{c}: {hit[0]!r} is not a word of the glossary"


RULES = [
    rule_cells,
    rule_prose,
    rule_directives,
    rule_ids,
    rule_outputs,
    rule_head_and_tail,
    rule_tests,
    rule_stars,
    rule_parameters,
    rule_documentation,
    rule_visible,
    rule_hints,
    rule_lines,
    rule_words,
]


def lint(path):
    "Collect all complaints about one notebook."
    raw, cells = read(path)
    return [f"{rule.__name__[5:]}: {complaint}" for rule in RULES for complaint in rule(path, raw, cells)]


# ---------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_keeps_the_house_style(path):
    complaints = lint(path)
    assert not complaints, "\n" + "\n".join(complaints)


def test_there_are_notebooks_of_each_kind():
    assert {kind_name(p) for p in notebooks()} == set(KINDS)


def test_labels_are_unique_over_all_notebooks():
    labels = {}
    for path in notebooks():
        for c in read(path)[1]:
            for d in c.directives:
                if m := re.match(r"#\| label: (\S+)", d):
                    labels.setdefault(m[1], []).append(path.name)
    assert not {k: v for k, v in labels.items() if len(v) > 1}
    assert all(re.match(r"(fig|tbl|eq|sec|lst)-", label) for label in labels), sorted(labels)


def test_module_names_are_unique_and_numbers_too():
    numbers, modules = {}, {}
    for path in notebooks():
        numbers.setdefault((path.parent.name, path.name.split("_")[0]), []).append(path.name)
        if m := re.search(r"^#\| default_exp (\S+)", "\n".join(c.source for c in read(path)[1]), re.M):
            modules.setdefault(m[1], []).append(path.name)
    assert not {k: v for k, v in modules.items() if len(v) > 1}
    assert not {k: v for k, v in numbers.items() if re.match(r"\d\d_", k[0]) and len(v) > 1}


def definitions():
    for path in sorted((ROOT / "stylelora").rglob("*.py")):
        if path.name.startswith("_"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path.relative_to(ROOT), node


def body_lines(node):
    "Count the lines that compute: signature with its comments and docstring left out."
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return body[-1].end_lineno - body[0].lineno + 1


def test_functions_are_short():
    long = [
        f"{p}: {n.name} has {n.end_lineno - n.lineno + 1} lines"
        for p, n in definitions()
        if n.end_lineno - n.lineno + 1 > MAX_DEF
    ]
    assert not long, "\n".join(long)
    typical = statistics.median(body_lines(n) for p, n in definitions())
    assert typical <= MAX_MEDIAN_BODY, (
        f"the median function computes in {typical} lines, at most {MAX_MEDIAN_BODY}"
    )


# ---------------------------------------------------------------------------------- does the linter bite?


def _notebook(*cells, folder, tmp_path):
    "Write a small notebook whose cells are (type, source) or (type, source, extra)."
    raw = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3")), cells=[])
    for i, (kind, source, *extra) in enumerate(cells):
        cell = dict(cell_type=kind, source=source, metadata={}, id=f"c{i}") | (
            dict(outputs=[], execution_count=None) if kind == "code" else {}
        )
        raw["cells"].append(cell | (extra[0] if extra else {}))
    path = tmp_path / folder / "10_x.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(raw))
    return path


BAD = {
    "words: cell c0": ("code", "vendor = 1"),
    "hints: f: no type hint for a": ("code", '#| export\ndef f(a):  # it\n    "Add."\n    return a'),
    "lines: cell c0: 'x = [[a for a in b] for b in c]', line 2: nested": (
        "code",
        "#| export\nx = [[a for a in b] for b in c]",
    ),
    "lines: cell c0: 'a, b = 1, 2 if c else 3', line 2: a tuple": (
        "code",
        "#| export\na, b = 1, 2 if c else 3",
    ),
    "directives: cell c0: 'x = 1': directive ends in a colon": ("code", "#| hide:\nx = 1"),
    "directives: cell c0: 'x = 1': malformed directive": ("code", '#| fig-subcap: ["a"]\n#|   - b\nx = 1'),
    "directives: cell c0: 'x = 1': unknown directive": ("code", "#| exprot\nx = 1"),
    "directives: cell c0: 'x = 1': directive without its value": ("code", "#| label\nx = 1"),
    "cells: cell c0: 'x = 1': 26 lines": ("code", "x = 1\n" * 26),
    "cells: cell c0: 'x = 1': hidden and 13 lines": ("code", "#| hide\n" + "x = 1\n" * 13),
    "stars: cell c0": ("code", "from math import *"),
    "outputs: cell c0: '1/0': stored error": (
        "code",
        "1/0",
        dict(outputs=[dict(output_type="error", ename="ZeroDivisionError")]),
    ),
    "outputs: cell c0: 'p = 1': a path of this machine": (
        "code",
        "p = 1",
        dict(outputs=[dict(output_type="stream", name="stdout", text="/" + "tmp/x")]),
    ),
    "parameters: parameter y": (
        "code",
        "x = 1 # count\ny = 2*x # count",
        dict(metadata=dict(tags=["parameters"])),
    ),
    "parameters: parameter x: say meaning": ("code", "x = 1", dict(metadata=dict(tags=["parameters"]))),
    "parameters: 0 cells tagged": ("code", "x = 1"),
    "prose: prose share 0.00": ("code", "x = 1"),
    "ids: cell ids are missing": ("code", "x = 1", dict(id="")),
    "documentation: cell c0: 'def f(a):': f has no docstring": ("code", "#| export\ndef f(a):\n    return a"),
    "documentation: cell c0: 'def f(a):': f: say in a comment what a is": (
        "code",
        '#| export\ndef f(a):\n    "Add."\n    return a',
    ),
}


@pytest.mark.parametrize("shown", [True, False])
def test_the_linter_sees_a_silent_section(shown, tmp_path):
    printed = dict(outputs=[dict(output_type="stream", name="stdout", text="3 rows\n")]) if shown else {}
    cells = ("markdown", "# Title\n\n> One sentence."), ("markdown", "## Part"), ("code", "print(x)", printed)
    found = lint(_notebook(*cells, folder="01_chapter", tmp_path=tmp_path))
    assert any("'Part' shows nothing" in f for f in found) is not shown, found


@pytest.mark.parametrize("complaint", BAD)
def test_the_linter_finds(complaint, tmp_path):
    found = lint(_notebook(BAD[complaint], folder="experiments", tmp_path=tmp_path))
    assert any(f.startswith(complaint) for f in found), found


def test_the_linter_accepts_a_good_experiment(tmp_path):
    path = _notebook(
        ("markdown", "# Title\n\nSome words that say what is asked and what is expected of the answer here."),
        ("code", "rank = 8 # rank of the adapter", dict(metadata=dict(tags=["parameters"]))),
        ("code", "#| label: fig-x\nrank"),
        folder="experiments",
        tmp_path=tmp_path,
    )
    assert lint(path) == []


if __name__ == "__main__":
    for name in sys.argv[1:] or notebooks():
        complaints = lint(name)
        print(f"{name}: " + ("fine" if not complaints else ""), *complaints, sep="\n  " if complaints else "")
