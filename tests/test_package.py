"""What travels: the assets in the wheel, sizes in the tree, and nothing of anybody's machine or registry."""

import base64
import configparser
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import nbtext  # noqa: E402

MB = 2**20  # bytes: the unit of the 64 MiB that a checkout may have to travel to a machine with a GPU
TEXT = {
    ".py",
    ".ipynb",
    ".md",
    ".qmd",
    ".ini",
    ".yml",
    ".yaml",
    ".json",
    ".toml",
    ".txt",
    ".sh",
    ".css",
    ".bib",
    ".svg",
    "",
}
# spelled in pieces, or this file would find itself
HOSTS = re.compile(
    "|".join(
        a + r"\." + b
        for a, b in [
            ("registry", "npmjs"),
            ("npmjs", "(org|com)/"),
            ("pypi", "(org|python)"),
            ("files", "pythonhosted"),
            ("deb", "debian"),
            ("archive", "ubuntu"),
            ("download", "pytorch"),
            ("conda", "anaconda"),
            ("registry", "yarnpkg"),
            ("artifactory", ""),
        ]
    )
)
MACHINE = re.compile(r"(?<![\w.~/-])/(?:tmp|work|root|home/\w+|Users/\w+)/[\w.]")


def tracked():  # files that are, or would be, committed
    got = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip("not a git checkout: " + got.stderr.strip()[:100])
    return [p for p in (ROOT / line for line in got.stdout.splitlines()) if p.is_file()]


def texts():  # (path relative to the root, text) of tracked text files, without pictures inside notebooks
    for p in tracked():
        if p.suffix in TEXT and p.stat().st_size < 3 * MB:
            yield (
                str(p.relative_to(ROOT)),
                re.sub(r'"image/(png|jpeg)": ?"[^"]*"', "", p.read_text(encoding="utf-8", errors="replace")),
            )


def test_the_tree_is_small():
    sizes = {str(p.relative_to(ROOT)): p.lstat().st_size for p in tracked()}
    assert sum(sizes.values()) <= 58 * MB, sorted(((n // 1000, f) for f, n in sizes.items()), reverse=True)[
        :10
    ]
    assert {f: n for f, n in sizes.items() if n >= 36 * MB} == {}
    links = [
        p for p in tracked() if p.is_symlink()
    ]  # they count as what git stores, and lead to a tracked file
    assert {p.resolve() for p in links} <= {p for p in tracked() if not p.is_symlink()}, links


def test_no_registry_is_named():
    assert [(f, m[0]) for f, t in texts() for m in [HOSTS.search(t)] if m] == []


def test_nothing_of_a_machine_is_in_the_tree():
    assert [
        (f, m[0]) for f, t in texts() if f != "tests/test_package.py" for m in [MACHINE.search(t)] if m
    ] == []


def test_no_pickle_and_no_junk():
    bad = {".pt", ".pth", ".ckpt", ".pkl", ".bin", ".pyc", ".log", ".whl"}
    assert [str(p.relative_to(ROOT)) for p in tracked() if p.suffix in bad or "__pycache__" in p.parts] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):  # names in a wheel that is built from the tracked files alone
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for p in tracked():
        name = p.relative_to(ROOT)
        if name.parts[0] in ("stylelora", "settings.ini", "setup.py", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(p) if name.parts[0] == "stylelora" else (source / name).write_bytes(
                p.read_bytes()
            )
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(out.glob("*.whl"))) as z:
        return {i.filename: i.file_size for i in z.infolist()}, z.filename, out


def test_the_assets_travel_in_the_wheel(wheel):
    names, _, _ = wheel
    have = {
        str(p.relative_to(ROOT)): p.stat().st_size
        for p in tracked()
        if p.relative_to(ROOT).parts[:2] == ("stylelora", "assets")
    }
    assert {f: names.get(f) for f in have} == have
    folders = {Path(f).parts[2] for f in have}
    assert {"base", "grid", "grid-cc-by-sa"} <= folders, folders
    assert any(len(Path(f).parts) > 4 for f in have)  # nested folders, such as base/unet/


def test_modules_and_command_travel_in_the_wheel(wheel):
    names, _, out = wheel
    assert {
        str(p.relative_to(ROOT))
        for p in tracked()
        if p.relative_to(ROOT).parts[0] == "stylelora" and p.suffix == ".py"
    } <= set(names)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as z:
        info = {
            n.split("/")[-1]: z.read(n).decode()
            for n in z.namelist()
            if ".dist-info/" in n
            and not n.endswith("/")
            and n.split("/")[-1] in ("METADATA", "entry_points.txt")
        }
    assert "stylelora = stylelora.apps.cli:main" in info["entry_points.txt"]
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", info["METADATA"], re.M))
    assert extras == {"study", "dev"} and "stylelora/py.typed" in names


def test_the_core_is_asked_for_in_ranges_and_stays_small():
    core = settings()["requirements"].split()
    assert [
        r for r in core if "==" in r
    ] == []  # an exact version keeps the package out of other environments
    names = {re.split(r"[<>=!]", r)[0] for r in core}
    assert not names & {
        "papermill",
        "jupyter",
        "statsmodels",
        "scipy",
        "matplotlib",
        "ipywidgets",
        "lpips",
        "smalldocs",
    }


def test_every_requirement_has_a_tested_version():
    locked = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    asked = [
        r for k in ("requirements", "study_requirements", "dev_requirements") for r in settings()[k].split()
    ]
    names = {re.split(r"[<>=!]", r)[0].lower().replace("_", "-") for r in asked} - {"setuptools"}
    assert names <= locked, names - locked


def test_drawings_under_share_alike_have_their_licence_beside_them():
    folder = ROOT / "stylelora" / "assets" / "grid-cc-by-sa"
    assert "creativecommons.org/licenses/by-sa/4.0" in (folder / "LICENCE.txt").read_text()
    assert {p.name.split("-")[0] for p in folder.glob("*.webp")} == {"openmoji"}
    assert not list((ROOT / "stylelora" / "assets" / "grid").glob("openmoji*"))


def test_every_style_is_attributed():
    import json

    text = (ROOT / "ATTRIBUTION.md").read_text()
    for name, v in json.loads((ROOT / "stylelora" / "assets" / "grid" / "index.json").read_text())[
        "styles"
    ].items():
        assert f"| `{name}` |" in text and v["url"] in text and v["author"].split()[0] in text, name


def settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_locks_come_from_a_filelock_that_notices_a_removed_file():
    "Before 3.21 two processes could hold a lock whose file the one before them had removed."
    (wanted,) = (r for r in settings()["requirements"].split() if r.startswith("filelock"))
    assert tuple(map(int, wanted.removeprefix("filelock>=").split("."))) >= (3, 21)


def test_settings_hold_what_setup_needs():
    cfg = settings()
    assert not [k for k, v in cfg.items() if "example." in v], "a placeholder address"
    assert (
        cfg["update_pyproject"] == "False" and not (ROOT / "pyproject.toml").exists()
    )  # nbdev 2 reads settings.ini
    assert cfg["allowed_cell_metadata_keys"] == "tags"
    assert tuple(map(int, cfg["min_python"].split("."))) >= (
        3,
        11,
    )  # diffusers, transformers and torch of today need it
    for pin in ("nbdev==2.", "execnb==0.", "fastcore==1.", "ghapi==1."):
        assert pin in cfg["dev_requirements"]


def test_make_and_ci_agree():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    made = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "study"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0 and "stylelora study --profile study" in made.stdout


@pytest.mark.parametrize(
    "name", ["CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "ruff.toml", ".pre-commit-config.yaml"]
)
def test_a_newcomer_finds_what_projects_have(name):
    assert (ROOT / name).stat().st_size > 200


def test_yaml_files_for_other_programs_are_yaml():
    import yaml

    for name in ("CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/test.yml"):
        assert isinstance(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")), dict), name
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == settings()["version"]


def test_the_list_of_rooms_is_that_of_the_notebooks():
    done = subprocess.run(
        [sys.executable, "tools/rooms.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def _png(a):
    Image.fromarray(a).save(out := io.BytesIO(), "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA"), float)


def _page():
    "Draw rings of some hundred colours on white, and a spot of a colour that is nowhere else."
    y, x = np.mgrid[-30:30, -45:45]
    r = np.hypot(y, x) / 9
    page = np.full((100, 130, 3), 255, np.uint8)
    page[20:80, 20:110] = 127 + 60 * np.stack([np.sin(r), np.cos(r), np.sin(r / 2)], -1)
    page[10:12, 30:34] = 255, 0, 0
    return page


def test_a_stored_picture_gets_a_palette_only_where_nobody_notices():
    page = _page()
    small = nbtext.palette_png(_png(page))
    got = _pixels(small)[..., :3]
    assert Image.open(io.BytesIO(base64.b64decode(small))).mode == "P" and len(small) < len(_png(page))
    assert abs(got - page).mean((0, 1)).max() < 1
    assert (got[0, 0] == 255).all() and abs(got[11, 31] - [255, 0, 0]).max() < 8, (
        "white and a rare colour stay"
    )
    assert nbtext.palette_png(small) == small, "done once, it stays"


def test_noise_and_transparent_pictures_stay_as_they_are_until_they_are_heavy():
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    light, clear = _png(noise[:40, :60]), _png(np.dstack([_page(), _page()[..., 0]]))
    assert nbtext.light_png(light) == light and nbtext.light_png(clear) == clear
    small = nbtext.light_png(_png(noise))
    assert len(_png(noise)) > nbtext.HEAVY and len(np.unique(_pixels(small).reshape(-1, 4), axis=0)) == 64


def test_shrinking_a_notebook_touches_its_pictures_and_nothing_else(tmp_path):
    path = tmp_path / "x.ipynb"
    shown = [nbformat.v4.new_output("display_data", {"image/png": _png(_page()), "text/plain": "a figure"})]
    cells = [nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("1", outputs=shown)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = nbformat.read(path, 4)
    assert nbtext.shrink(path) > 0
    after = nbformat.read(path, 4)
    one, two = (next(nbtext.pictures(nb)) for nb in (before, after))
    gap = abs(_pixels(one.pop("image/png")) - _pixels(two.pop("image/png")))
    assert before == after and gap.mean((0, 1)).max() < 1
    stamp = path.read_bytes()
    assert nbtext.shrink(path) == 0 and path.read_bytes() == stamp
