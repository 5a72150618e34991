"""Two processes train what one process trains, stop together, and go on where they were."""

import os
import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import load_file

SCRIPT = """
    import os, signal, sys, warnings
    import torch
    from stylelora.models.base import encode_text, tiny_base
    from stylelora.core import generator
    from stylelora.train.step import TrainConfig
    from stylelora.train.loop import train
    torch.set_num_threads(1)
    def say(text): os.write(1, f"{text}\\n".encode())              # at once: two processes share the pipe
    folder, stop_at, rank = sys.argv[1], int(sys.argv[2]), int(os.environ.get("RANK", 0))
    base = tiny_base()
    data = torch.randn(8, 4, 8, 8, generator=generator("data")), encode_text(base, [f"thing {i}" for i in range(8)])
    config = TrainConfig(train_steps=6, lr=1e-2, rank=2, batch_size=5, target_modules="attention", caption_dropout=.3, val_every=2,
                         save_every=2, gradient_accumulation_steps=2)
    def tell(step, base):
        say(f"rank {rank} sample {step}")
    if stop_at and rank == 1:                                    # only the second process is interrupted
        import stylelora.train.loop as t
        plain = t.advance
        def advance(run, *a):
            if run.step == stop_at: signal.raise_signal(signal.SIGINT)
            return plain(run, *a)
        t.advance = advance
    try:
        table = train(base, *data, config=config, val=data, folder=folder, on_sample=tell, progress=False)
        say(f"rank {rank} ends after {len(table)} rows, loss {table.loss.iloc[-1]:.4f}")
    except KeyboardInterrupt as e: say(f"rank {rank} {e}")
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def go(folder, processes, stop_at=0):
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [sys.executable, *(many if processes > 1 else []), str(script), str(folder), str(stop_at)]
        done = subprocess.run(
            words, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"), timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))

    return go


def adapter(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_two_processes_train_what_one_trains(launch, tmp_path):
    alone, both = launch(tmp_path / "one", 1), launch(tmp_path / "two", 2)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-4  # the order of additions
    assert any(v.abs().max() > 0.01 for k, v in one.items() if "lora_B" in k or "up" in k)
    last = alone[0].split("loss")[1]
    assert [line.split("loss")[1] for line in both if "ends" in line] == [last, last]
    assert not any(line.startswith("rank 1 sample") for line in both)  # one process draws and writes


def test_an_interrupted_process_takes_the_other_along(launch, tmp_path):
    launch(tmp_path / "whole", 2)
    said = launch(tmp_path / "cut", 2, stop_at=3)
    assert [line[:31] for line in said if "stopped" in line] == [
        f"rank {r} stopped after step 4 of 6"[:31] for r in (0, 1)
    ]
    assert not (tmp_path / "cut" / "pytorch_lora_weights.safetensors").exists()
    said = launch(tmp_path / "cut", 2)
    assert [line.split(",")[0] for line in said if "ends" in line] == [
        f"rank {r} ends after 7 rows" for r in (0, 1)
    ]
    assert (tmp_path / "cut" / "pytorch_lora_weights.safetensors").read_bytes() == (
        tmp_path / "whole" / "pytorch_lora_weights.safetensors"
    ).read_bytes()


def test_too_many_processes_for_the_batch():
    from stylelora.train.checkpoint import Processes

    them = Processes()
    them.count = 8
    with pytest.raises(ValueError, match="batch_size=4 for 8 processes"):
        them.mine(4)
