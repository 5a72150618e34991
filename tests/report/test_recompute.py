"""Every number of the front page, computed again from the tables: pandas and scipy alone, nothing of the package in this process."""

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "reports" / "results", (ROOT / "index.qmd").read_text()
TAG = re.compile(r"\{\{(\w+)\s+([^{}]*?)\s*\}\}")
NUMBER = r"[+−-]?\d+(?:\.\d+)?"
PERCENT = {"style_at_1", "content_at_1", "lite0_style_at_1"}
ORDER = [f"L{n}" for n in range(1, 8)]


@functools.cache
def filled():
    "What the site makes of the page, made in another process."
    code = "import sys; from stylelora.report.pages import fill; print(fill(sys.stdin.read(), 'reports/results'))"
    done = subprocess.run([sys.executable, "-c", code], input=PAGE, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def printed():
    "The placeholders of the page, each with the text that stands in its place."
    literals, tags = TAG.split(PAGE)[::3], [m for m in TAG.finditer(PAGE)]
    found = re.match("(.*?)".join(map(re.escape, literals)), filled(), re.S)
    assert found, "the page differs from its source outside of the placeholders"
    return [(tag[1], shlex.split(tag[2]), text) for tag, text in zip(tags, found.groups())]


@functools.cache
def table(name):
    "A table of results with what its runs know beside it."
    rows, runs = (pd.read_parquet(RESULTS / f"{n}.parquet") for n in (name, "runs"))
    given = {i: json.loads(p) for i, p in zip(runs.run_id, runs.parameters) if isinstance(p, str)}
    ids = rows.run_id.unique()
    made = {i: given.get(given[i].get("adapter", ""), {}) for i in ids}
    more = pd.DataFrame({
        "source": {i: given[i].get("source", "") for i in ids},
        "lora_scale": {i: float(given[i].get("lora_scale", 1)) for i in ids},
        "train_steps": {i: made[i].get("train_steps", 0) for i in ids},
    })  # fmt: skip
    return rows.join(more, on="run_id")


def grid(rows):
    "Concepts by training seeds."
    return rows.pivot_table(index="concept", columns="train_seed", values="value", observed=True)


def pick(name, metric, **where):
    rows = table(name)
    rows = rows[rows.metric == metric]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows), (name, metric, where)
    return rows


def bca(d, draws=4000):
    "Mean and 95 % ends, resampling concepts and seeds (Owen 2007; Efron 1987)."
    d, rng = np.asarray(d, float), np.random.default_rng(77)
    (n, k), mean = d.shape, d.mean()
    means = np.array([d[rng.integers(0, n, n)][:, rng.integers(0, k, k)].mean() for _ in range(draws)])
    below = (means < mean).mean()
    top = bottom = 0.0
    for parts in (d.mean(1), d.mean(0)):
        if len(parts) > 1:
            pull = (parts - mean) / len(parts)
            top, bottom = top + (pull**3).sum(), bottom + (pull**2).sum()
    z, a = stats.norm.ppf(below), top / (6 * bottom**1.5)
    ends = z + stats.norm.ppf([0.025, 0.975])
    return mean, *np.quantile(means, stats.norm.cdf(z + ends / (1 - a * ends)))


def agree(text, numbers, ends_off=0.1):
    "Compare an estimate with its interval, digit by digit and end by end."
    shown = re.findall(NUMBER, text)
    assert len(shown) == len(numbers), text
    values = [float(s.replace("−", "-")) for s in shown]
    unit = 10.0 ** -len(shown[0].partition(".")[2])
    assert abs(values[0] - numbers[0]) <= 0.51 * unit, (text, numbers)
    slack = unit + ends_off * (max(numbers) - min(numbers))
    assert all(abs(v - n) <= slack for v, n in zip(values[1:], numbers[1:])), (text, numbers)


def interval(words, text):
    given = dict(w.split("==") for w in words if "==" in w)
    metric = next(w for w in words[1:] if "==" not in w)
    name = words[0].removesuffix(".parquet")
    d = grid(pick(name, metric, recipe=given["recipe"]))
    if "baseline" in given:
        d = d - grid(pick(name, metric, recipe=given["baseline"]))
        d = d.dropna(axis=1, how="all").dropna()
    agree(text, np.array(bca(d)) * (100 if metric in PERCENT else 1))


E3 = dict(name="E3", recipe="L1", sampler="ddim", num_inference_steps=25, guidance_scale=10.0, n_images=50)
E3 |= dict(lora_scale=1.0, train_steps=400)
KNOBS = dict(e3_n_images="n_images", e3_lora_scale="lora_scale", e3_guidance_scale="guidance_scale")


def swept(file, path, text):
    position, metric = path.split(".")
    where = E3 | {KNOBS[file]: float(position.replace("_", "."))}
    agree(text, np.array(bca(grid(pick(metric=metric, **where)))) * (100 if metric in PERCENT else 1))


def setting(path, text):
    sampler, steps, whole, half = re.match(r"(\w+?)_(\d+)_(\d+)_(\d+)\.GT skill", path).groups()
    where = dict(recipe="L1", sampler=sampler, num_inference_steps=int(steps), source="")
    agree(text, bca(grid(pick("E2", "gt_skill", guidance_scale=float(f"{whole}.{half}"), **where))))


@functools.cache
def orders(metric):
    "Mean scores of the seven recipes under five samplers, of the data and of draws."
    rows = pick("E2", metric, num_inference_steps=50, guidance_scale=7.5, source="")
    rows = rows[rows.recipe.isin(ORDER)]
    wide = rows.pivot_table(
        index="concept", columns=["recipe", "sampler", "train_seed"], values="value", observed=True
    )
    cube = wide.to_numpy(float).reshape(len(wide), len(ORDER), 5, -1)
    rng, (n, *_, k) = np.random.default_rng(5), cube.shape
    draws = [cube[rng.integers(0, n, n)][..., rng.integers(0, k, k)].mean((0, 3)) for _ in range(600)]
    return list(wide.columns.unique(1)), [cube.mean((0, 3)), *draws]


def taus(means, kept=lambda a, b: True):
    "Mean rank correlation over pairs of columns."
    pairs = [(a, b) for a in range(5) for b in range(a) if kept(a, b)]
    return np.mean([stats.kendalltau(means[:, a].round(9), means[:, b].round(9)).statistic for a, b in pairs])


def order(path, text):
    at, name = path.partition(":")[0].split(".")
    metric = {"0": "style_margin", "2": "content_rr"}[at]
    samplers, means = orders(metric)
    fresh = [s in ("euler_ancestral", "dpmpp_sde") for s in samplers]
    if name in ("low", "high"):
        end = np.quantile([taus(m) for m in means[1:]], 0.025 if name == "low" else 0.975)
        return agree(text, [end]) if abs(float(text) - end) > 0.06 else None
    kept = (lambda a, b: fresh[a] != fresh[b]) if name == "tau_apart" else (lambda a, b: True)
    agree(text, [taus(means[0], kept)])


def ink(path, text):
    "The test concepts are those that all training seeds of L1 have drawn with the searched setting."
    searched = dict(style="ink", sampler="euler_ancestral", num_inference_steps=50, guidance_scale=3.0)
    scores = grid(pick("E4", "gt_skill", recipe="L1", **searched)).dropna()
    recipe = path.split(".")[0].removeprefix("ink_")
    if recipe != "L1":
        scores = grid(pick("E4", "gt_skill", style="ink", recipe=recipe)).loc[scores.index]
    agree(text, bca(scores))


def value(words, text):
    file, path = words[0].partition(".")[0], words[-1]
    if count := re.fullmatch(r"nunique\((\w+)\)", path):
        recipe = words[1].removeprefix("recipe==")
        return agree(text, [table(file)[lambda t: t.recipe == recipe][count[1]].nunique()])
    kinds = dict(e2_settings=setting, e2_order=order, e4_own_sampler=ink)
    kinds |= {f: functools.partial(swept, f) for f in KNOBS}
    assert file in kinds, f"the page has {words}, which this test cannot compute again; add it here"
    kinds[file](path, text)


@pytest.mark.parametrize("at", range(len(TAG.findall(PAGE))))
def test_the_number_agrees(at):
    kind, words, text = printed()[at]
    dict(interval=interval, value=value)[kind](words, text)


def test_numbers_between_the_placeholders_are_those_of_the_tables():
    "Settings that the prose names are the settings of the rows, and no other number is typed."
    prose = TAG.sub(" ", PAGE.partition("::: {.answer}")[2].partition("\n:::")[0])
    prose = re.sub(
        r"DPM\+\+ 2M|[Pp]oints? \d(?: and \d)?|\]\([^)]*\)|\bL[1-7]\b|\\@1|^\d\. |\$[^$]*\$",
        " ",
        prose,
        flags=re.M,
    )
    one, two, three = table("E1"), table("E2"), table("E3")
    first = one[one.recipe == "L1"]
    ranks = {r: int(one[one.recipe == r]["rank"].max()) for r in ("L1", "L7")}
    known = {95, *ranks.values(), *first.guidance_scale, *first.num_inference_steps}
    known |= {v for v in (7.5, 50) if v in set(two.guidance_scale) | set(two.num_inference_steps)}
    known |= {v for v in (1, 1.5) if v in set(three.lora_scale)} | {
        v for v in (4, 10) if v in set(three.guidance_scale)
    }
    typed = {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", prose)}
    assert typed <= known, f"nobody explains {sorted(typed - known)}"
    assert (
        two[two.recipe.isin(ORDER)].recipe.nunique() == 7 and two[two.recipe == "L1"].sampler.nunique() == 5
    )


def test_what_the_prose_says_of_the_numbers_holds():
    "The words beside the numbers, each as a comparison."
    skill, style = (
        {r: grid(pick("E1", m, recipe=r)) for r in table("E1").recipe.unique()}
        for m in ("gt_skill", "style_score")
    )
    minus = lambda t, a, b: bca((t[a] - t[b]).dropna(axis=1, how="all").dropna())
    low, high = minus(skill, "own_schedule", "L1_remapped")[1:]
    assert low < 0 < high  # "and so does L1's own schedule when the base is told the right noise level"
    assert minus(skill, "own_schedule", "L1")[1] > 0 and minus(skill, "L1_remapped", "L1")[1] > 0
    for r in ("L5", "p2", "snr_loss"):  # "no loss weighting raises the skill or the style score"
        assert minus(skill, r, "L1")[1] < 0 and minus(style, r, "L1")[1] < 0, r
    assert minus(style, "snr_loss", "L1")[2] < 0
    trained = {r for r in skill if skill[r].columns[0] >= 0}
    best = max(skill[r].to_numpy().mean() for r in trained)
    assert best < skill["nearest_train"].to_numpy().mean() < 0  # "above that of every recipe", "below a copy"
    ends = [bca(grid(pick(metric="content_at_1", **E3 | dict(guidance_scale=g)))) for g in (10.0, 4.0)]
    assert ends[0][1] < ends[1][2] and ends[1][1] < ends[0][2]  # "which the intervals do not tell apart"
