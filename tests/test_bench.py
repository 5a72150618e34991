"""The benchmark runs: both libraries do the same work, and the table says what was measured. It is no test of speed."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_two_rounds_on_a_tiny_base(bench, tmp_path, capsys):
    bench.main(["--base", "tiny", "--rounds", "2", "--threads", "1", "--out", str(tmp_path / "bench.json")])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found) == len(bench.ROWS) + 1 == len(capsys.readouterr().out.splitlines()) - 1
    for r in found:
        assert 0 < r["low"] <= r["ratio"] <= r["high"] and r["rounds"] == 2
        assert (
            r["ours"] > 0
            and r["theirs"] > 0
            and r["threads"] == 1
            and {"torch", "diffusers", "peft"} < set(r)
        )


def test_the_ratio_is_theirs_to_ours(bench):
    spin = lambda n: lambda: sum(i * i for i in range(n))
    row = bench.Row("spin", spin(100_000), spin(800_000), {})
    assert bench.measure(row, 3)["ratio"] > 2
