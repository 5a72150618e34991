"""What can go wrong with a run, and must not: kills, failures, half-written folders, wrong parameters.

The notebooks that are executed here count to a few; nothing of torch is needed to see that a kill is survived.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from stylelora.core import root
from stylelora.study.params import read_runs, replay
from stylelora.study.plan import known_runs, plan_runs, read_profile
from stylelora.study.runs import is_complete, main, report, run_batch, run_one

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = """steps = 3           # how far to count
rate = 1e-3         # a number
name = "count"      # a text
fail_at = 0         # fail at this count on the first attempt; 0 is never
pause = 0.0         # seconds per count
train_seed = 0
run_folder = ""     # set by the runner"""
COUNT = """import json, os, random, time
from pathlib import Path
state = Path(run_folder)/'state.json'
n, attempts, total = json.loads(state.read_text()) if state.exists() else (0, 0, 0)
attempts += 1
while n < steps:
    n, total = n + 1, total + random.Random(f'{train_seed} {n + 1}').randrange(1000)
    part = state.with_suffix('.part'); part.write_text(json.dumps([n, attempts, total])); os.replace(part, state)
    print(f'progress {n}/{steps}', flush=True)
    if n == fail_at and attempts == 1: raise RuntimeError('as told')
    time.sleep(pause)
print('counted', total)"""


def write_notebook(path, parameters=PARAMETERS, code=COUNT):
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    cells = [new_code_cell(parameters, metadata=dict(tags=["parameters"])), new_code_cell(code)]
    nbformat.write(new_notebook(metadata=kernel, cells=cells), path)
    return path


@pytest.fixture
def place(tmp_path):
    "A folder with a notebook, and a function that writes parameter files for it."
    notebook = write_notebook(tmp_path / "count.ipynb")

    def params(recipe="L1", **values):
        path = tmp_path / f"{recipe}.yaml"
        path.write_text(
            json.dumps(dict(notebook=str(notebook), experiment="E0", recipe=recipe, parameters=values))
        )
        return path

    params.folder, params.notebook = tmp_path / "runs", notebook
    return params


def state(folder, run):
    return json.loads((folder / run.id / "state.json").read_text())


def hush(line):
    pass


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(stepz=3), "'stepz' is unknown; did you mean 'steps'"),
        (dict(train_sead=[0, 1]), "'train_sead' is unknown; did you mean 'train_seed'"),
        (dict(steps="3"), "steps='3' is str, want int"),
        (dict(steps=3.5), "steps=3.5 is float, want int"),
        (dict(steps=True), "steps=True is bool, want int"),
        (dict(rate="fast"), "rate='fast' is str, want float"),
        (dict(name=7), "name=7 is int, want str"),
        (dict(train_seed=[0, "one"]), "train_seed='one' is str, want int"),
        (dict(steps=[]), "empty list"),
        (dict(run_folder="elsewhere"), "'run_folder' is unknown"),
    ],
)
def test_wrong_parameters_stop_before_anything_runs(place, capsys, values, message):
    good, bad = place("good"), place("bad", **values)
    assert main([str(good), str(bad), "--folder", str(place.folder)]) == 2
    assert message in capsys.readouterr().err
    assert not place.folder.exists()


def test_wrong_files_and_notebooks(place, tmp_path):
    path = place()
    path.write_text(path.read_text().replace('"parameters"', '"params"'))
    with pytest.raises(ValueError, match="'params' is unknown; did you mean 'parameters'"):
        read_runs(path)
    path.write_text("notebook: [")
    with pytest.raises(ValueError, match="L1.yaml"):
        read_runs(path)
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        read_runs(tmp_path / "nowhere.yaml")
    write_notebook(place.notebook, PARAMETERS + "\ntwice = 2*steps")
    with pytest.raises(ValueError, match="no literal"):
        read_runs(place())
    write_notebook(place.notebook, "steps = 3")
    with pytest.raises(ValueError, match="run_folder"):
        read_runs(place())


def test_grid_runs_once_and_is_skipped_afterwards(place):
    runs = read_runs(place(train_seed=[0, 1]))
    assert len({r.id for r in runs}) == 2
    first, second = (run_batch(runs + runs, place.folder, hush) for _ in range(2))
    assert list(first.status) == ["done", "done"] and list(second.status) == ["skipped", "skipped"]
    assert state(place.folder, runs[0])[2] != state(place.folder, runs[1])[2]  # the seed arrived
    forced = run_batch(runs[:1], place.folder, hush, force=True)
    assert list(forced.status) == ["done"] and is_complete(place.folder / runs[0].id)


def test_one_failure_does_not_stop_the_batch_and_is_told_at_the_end(place, capsys):
    files = [place("bad", fail_at=2), place("good")]
    status = main([*map(str, files), "--folder", str(place.folder)])
    out = capsys.readouterr().out
    assert status == 1 and "1 done, 0 skipped, 1 failed" in out and "RuntimeError: as told" in out
    bad, good = (read_runs(f)[0] for f in files)
    assert is_complete(place.folder / good.id) and not (place.folder / bad.id).exists()
    partial = place.folder / f".{bad.id}.partial"
    assert "as told" in (partial / "error.txt").read_text()
    assert main([*map(str, files), "--folder", str(place.folder)]) == 0  # the second attempt resumes
    assert (
        state(place.folder, bad)[:2] == [3, 2] and state(place.folder, bad)[2] == state(place.folder, good)[2]
    )
    assert not partial.exists()


def test_a_notebook_that_kills_its_kernel_is_a_failure_too(place):
    write_notebook(place.notebook, code="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    outcome = run_one(read_runs(place())[0], place.folder, hush)
    assert outcome["status"] == "failed" and outcome["error"]


def test_a_killed_runner_resumes_to_the_same_result(place):
    (run,) = read_runs(place(steps=6, pause=0.3))
    words = [
        sys.executable,
        "-c",
        "import sys; from stylelora.study.runs import main; sys.exit(main(sys.argv[1:]))",
        str(place(steps=6, pause=0.3)),
        "--folder",
        str(place.folder),
    ]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    runner = subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = place.folder / f".{run.id}.partial" / "state.json"
    for _ in range(1200):
        if part.exists() and json.loads(part.read_text())[0] >= 2:
            break
        time.sleep(0.1)
    family = psutil.Process(runner.pid).children(recursive=True)  # the kernel, and what it was copied from
    assert family
    said = []
    threading.Timer(0.5, runner.kill).start()  # while we wait for it
    assert run_one(run, place.folder, said.append)["status"] == "done"
    runner.wait()
    assert not psutil.wait_procs(family, 60)[1]
    assert f"is being executed by process {runner.pid}; waiting" in said[0]
    (undisturbed,) = read_runs(place("other", steps=6))
    assert run_one(undisturbed, place.folder, hush)["status"] == "done"
    assert state(place.folder, run) == [6, 2, state(place.folder, undisturbed)[2]]  # resumed, same result


STUDY = """
import sys
from stylelora.processes import interruptible
from stylelora.study.params import read_runs
from stylelora.study.workers import run_parallel
with interruptible():
    print(run_parallel(read_runs(sys.argv[1]), sys.argv[2], jobs=2).status.tolist())"""


def wait_for(condition, seconds=300):
    "Wait until a condition holds, and give what it says; a loaded machine is slow, so the limit is far away."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def start_study(params, folder):
    "Start a study on two workers in a process of its own; give it, and its children once both notebooks are counting."
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    study = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(params), str(folder)],
        env=env,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        **pipes,
    )
    wait_for(lambda: study.poll() is not None or len(list(folder.glob(".*.partial/state.json"))) == 2)
    return study, psutil.Process(study.pid).children(recursive=True)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_and_kernels_end_with_the_study_and_a_restart_finishes(place, sign):
    params = place(train_seed=[0, 1], steps=4000, pause=0.05)
    study, family = start_study(params, place.folder)
    assert len(family) >= 4 and all(p.is_running() for p in family)  # two workers, two kernels
    study.send_signal(sign)
    study.communicate()
    assert (
        study.returncode and not psutil.wait_procs(family, 60)[1]
    )  # their notebooks would have taken minutes
    left = [json.loads(f.read_text())[0] for f in place.folder.glob(".*.partial/state.json")]
    assert len(left) == 2 and max(left) < 4000
    write_notebook(place.notebook, code=COUNT.replace("time.sleep(pause)", "steps = min(steps, n + 2)"))
    outcomes = run_batch(read_runs(params), place.folder, hush)
    assert list(outcomes.status) == ["done", "done"]
    assert sorted(p.name for p in place.folder.iterdir()) == sorted(outcomes.id)  # and no debris


def test_two_studies_at_once_execute_each_run_once(place):
    "Two processes that want the same runs: neither calls a run failed, and none is executed twice."
    code = COUNT.replace("attempts += 1", "attempts += 1; print('executed', train_seed, flush=True)")
    write_notebook(place.notebook, code=code.replace("print('counted', total)", "time.sleep(0.5)"))
    params = place(train_seed=[0, 1, 2])
    words = [sys.executable, "-c", STUDY, str(params), str(place.folder)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    both = [
        subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [p.communicate() for p in both]
    found = [json.loads(out.splitlines()[-1].replace("'", '"')) for out, _ in said]
    assert all({a, b} == {"done", "skipped"} for a, b in zip(*found)), said
    runs = read_runs(params)
    assert [state(place.folder, r)[1] for r in runs] == [1, 1, 1]  # attempts
    assert sorted(p.name for p in place.folder.iterdir()) == sorted(r.id for r in runs)


@pytest.mark.parametrize("damage", ["manifest", "half", "missing", "short", "unfinished"])
def test_a_half_written_folder_never_counts_as_complete(place, damage):
    (run,) = read_runs(place())
    run_one(run, place.folder, hush)
    folder = place.folder / run.id
    manifest = folder / "manifest.json"
    if damage == "manifest":
        manifest.unlink()
    if damage == "half":
        manifest.write_text(manifest.read_text()[:100])
    if damage == "missing":
        (folder / "state.json").unlink()
    if damage == "short":
        (folder / "state.json").write_text("[")
    if damage == "unfinished":
        manifest.write_text(manifest.read_text().replace('"complete"', '"started"'))
    assert not is_complete(folder)
    assert run_one(run, place.folder, hush)["status"] == "done" and is_complete(folder)
    assert sorted(p.name for p in place.folder.iterdir()) == [run.id]  # no debris


def test_manifest_tells_the_whole_story_and_replays(place, tmp_path):
    (run,) = read_runs(place(train_seed=7))
    run_one(run, place.folder, hush)
    manifest = json.loads((place.folder / run.id / "manifest.json").read_text())
    assert manifest["parameters"]["steps"] == 3 and manifest["seeds"] == dict(train_seed=7)
    for key in "versions git device python seconds peak_memory_mb started attempts inputs code files".split():
        assert key in manifest, key
    assert replay(place.folder / run.id).id == run.id
    assert main(["--replay", str(place.folder / run.id), "--folder", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / run.id / "state.json").read_bytes() == (
        place.folder / run.id / "state.json"
    ).read_bytes()


def test_results_known_elsewhere_count_as_done(place):
    runs = read_runs(place(train_seed=[0, 1]))
    outcomes = run_batch(runs, place.folder, hush, done={runs[0].id})
    assert list(outcomes.status) == ["skipped", "done"] and "1 done, 1 skipped" in report(outcomes)


def test_a_foreign_kernel_of_the_same_name_is_not_used(place, tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(dict(argv=["/nowhere/python", "{connection_file}"], display_name="x", language="python"))
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_notebook(place.notebook, code="import sys; print('python', sys.executable)")
    lines = []
    assert run_one(read_runs(place())[0], place.folder, lines.append)["status"] == "done"
    assert lines == [f"python {sys.executable}"]


@pytest.mark.parametrize("part", read_profile("full")["parts"])
def test_every_run_of_the_full_study_is_in_the_committed_results(part, tmp_path):
    "A fresh clone repeats nothing; a change that makes the results stale is noticed here."
    profile = read_profile(part)
    plan, results = plan_runs(profile), root() / profile["out"] / "results"
    assert {r.id for r in plan} == known_runs(plan, results, tmp_path)
    assert not plan or profile["trust"]
