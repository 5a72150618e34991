"""A profile of one's own, as a person writes one: a copy, a file somewhere, a slip of the pen. Nothing is executed here."""

import shutil
import time

import pandas as pd
import pytest

from stylelora.apps.cli import main
from stylelora.core import root
from stylelora.report.pages import read_results
from stylelora.study.plan import plan_runs, read_profile, store_plan
from stylelora.study.results import append_results, load_results

OWN = """experiment: E1
shared: embedded
recipes: [L1]
train: {style: ink, n_images: 10, train_seed: 0}
evaluate: {sampler: ddim}
"""


@pytest.fixture
def own(tmp_path):
    "A function that writes a profile with a change, and gives its file."

    def write(old="", new=""):
        assert old in OWN
        (tmp_path / "mine.yaml").write_text(OWN.replace(old, new))
        return tmp_path / "mine.yaml"

    return write


def study(capsys, *words):
    "Run `stylelora study … --dry-run`; give exit code, and what it said."
    code = main(["study", "--dry-run", *map(str, words)])
    said = capsys.readouterr()
    return code, (said.out + said.err).strip()


def test_a_profile_may_be_a_file_and_uses_the_recipes_of_the_repository(own, capsys):
    code, said = study(capsys, "--profile", own())
    assert code == 0 and "profile mine: 4 runs, 0 of them complete" in said
    assert "this is no published profile: results go to reports/own/mine" in said


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("style: ink", "style: opemoji", "did you mean 'openmoji'"),
        ("style: ink", "style: folder/nowhere_at_all", "nowhere_at_all"),
        ("sampler: ddim", "sampler: dpmpp_3m", "did you mean 'dpmpp_2m'"),
        ("sampler: ddim", "smapler: ddim", "did you mean 'sampler'"),
        ("train_seed: 0", "train_seed: 0, batch_size: -3", "batch_size=-3"),
        ("train_seed: 0", "train_seed: 0, lr: .nan", "lr=nan is no finite number"),
        ("n_images: 10", "n_images: 5000", "n_images=5000"),
        ("[L1]", "[L11]", "did you mean 'L1'"),
        ("[L1]", "L1", "recipes is 'L1'; want a list"),
        ("shared: embedded", "shared: embeded", "did you mean 'embedded'"),
        ("recipes", "recipies", "did you mean 'recipes'"),
        ("{sampler: ddim}", "{sampler: [ddim", "mine.yaml: while parsing"),
        ("{sampler: ddim}", "[ddim]", "evaluate is ['ddim']; want a mapping"),
        ("sampler: ddim", "mode: smaple", "did you mean 'sample'"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would_refuse(own, capsys, old, new, part):
    code, said = study(capsys, "--profile", own(old, new))
    assert code == 1 and part in said and "mine.yaml" in said and "\n" not in said, said


@pytest.mark.parametrize("name, meant", [("stdy", "study"), ("ful", "full"), ("sd51", "sd15")])
def test_a_wrong_name_gets_a_suggestion(capsys, name, meant):
    code, said = study(capsys, "--profile", name)
    assert code == 1 and f"profile {name!r} does not exist" in said and f"did you mean {meant!r}" in said


def test_ninety_thousand_runs_are_refused_at_once(own, capsys):
    grid = f"train_seed: {list(range(300))}, lr: {[1e-5 * k for k in range(1, 301)]}"
    start = time.process_time()
    code, said = study(capsys, "--profile", own("train_seed: 0", grid))
    assert code == 1 and "90,000 runs, more than 10,000; divide the grid" in said
    file = own("train_seed: 0", f"train_seed: {list(range(99))}")
    file.write_text(file.read_text().replace("ddim", f"ddim, num_inference_steps: {list(range(1, 300))}"))
    code, said = study(capsys, "--profile", file)
    assert code == 1 and "99 trainings with 299 evaluations each are more than 10,000" in said
    assert time.process_time() - start < 60  # expanded, it took hours


def test_a_copied_profile_leaves_the_published_results_alone(tmp_path):
    shutil.copy(root() / "reports" / "params" / "study.yaml", tmp_path / "faster.yaml")
    copy, original = read_profile(tmp_path / "faster.yaml"), read_profile("study")
    assert (copy["out"], original["out"]) == ("reports/own/faster", "reports")
    assert [r.id for r in plan_runs(copy)] == [r.id for r in plan_runs(original)]


def test_whoever_was_told_to_write_there_still_does_not_change_a_page(tmp_path):
    "Rows of an own profile in the published table: the table has them, the page has not."
    results = root() / "reports" / "results"
    for name in ("E5.parquet", "plans.parquet"):
        shutil.copy(results / name, tmp_path / name)
    before = read_results(tmp_path / "E5.parquet")
    rows = load_results("E5", folder=tmp_path).head(3).assign(run_id="e5-mine-0123456789", value=2.0**20)
    append_results(rows, tmp_path)
    mine = next(r for r in plan_runs(read_profile("full_E5")))
    store_plan(dict(name="mine", evaluator="x"), [mine], tmp_path)
    assert load_results("E5", folder=tmp_path).value.max() == 2.0**20
    after, columns = read_results(tmp_path / "E5.parquet"), [*before]
    in_order = [t.sort_values(columns, ignore_index=True) for t in (after[columns], before)]
    pd.testing.assert_frame_equal(*in_order)  # appending sorts the table
