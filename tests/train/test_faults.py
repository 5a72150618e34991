"""Faults of a training, with real processes: kill -9 at random moments, Ctrl-C, damaged files, bad parameters.

The notebooks break the training loop with exceptions; here a second process trains, and dies as processes die.
"""

import multiprocessing
import os
import random
import signal
import time

import pytest

ADAPTER, CHECKPOINT, STEPS = "pytorch_lora_weights.safetensors", "stylelora-training.safetensors", 12
HEAVY = [
    "stylelora.train.loop",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]


def training(folder, on_step=None, **changes):
    "Train on six invented pictures, with everything switched on."
    import torch

    from stylelora.core import generator
    from stylelora.models.base import encode_text, tiny_base
    from stylelora.train.loop import train
    from stylelora.train.step import make_config

    torch.set_num_threads(1)  # other numbers of threads, other last bits
    base = tiny_base()
    data = torch.randn(6, 4, 8, 8, generator=generator("pictures")), encode_text(base, list("abcdef"))
    values = dict(
        train_steps=STEPS,
        batch_size=2,
        lr=1e-2,
        rank=2,
        target_modules="attention",
        ema=0.9,
        lora_dropout=0.1,
        warmup_steps=2,
        val_every=4,
        save_every=3,
    )
    return train(
        base,
        *data,
        config=make_config(**(values | changes)),
        val=(data[0][:2], data[1][:2]),
        on_step=on_step,
        folder=folder,
        progress=False,
    )


def child(log, folder, die_at, how, changes):
    "Train in a process of its own, and die as told."
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores Ctrl-C; a shell does not

    def on_step(row):
        print("step", row["step"], flush=True)
        if row["step"] == die_at and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if row["step"] == die_at and how in ("interrupt", "terminate"):
            os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGTERM)

    if how == "kill while writing":
        os.replace = _deadly(os.replace, die_at)
    training(folder, on_step, **changes)


def _deadly(replace, good):
    "Make an os.replace that puts `good` checkpoints in place and dies on the next one."
    left = [good]

    def deadly(a, b):
        if str(b).endswith(CHECKPOINT):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return replace(a, b)

    return deadly


def spawn(folder, die_at=0, how="", **changes):
    "Start a training in a second process; the fork server imports the heavy libraries once."
    context, log = multiprocessing.get_context("forkserver"), folder.with_name(folder.name + ".log")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=child, args=(str(log), str(folder), die_at, how, changes))
    process.start()
    return process, log


def run(folder, die_at=0, how="", **changes):
    "Train in a second process; return its exit status and what it said."
    process, log = spawn(folder, die_at, how, **changes)
    process.join(600)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Train without a fault and return the bytes of the adapter."
    folder = tmp_path_factory.mktemp("whole")
    status, said = run(folder)
    assert status == 0, said
    return (folder / ADAPTER).read_bytes()


def test_killed_at_random_steps_it_ends_with_the_same_bytes(whole, tmp_path):
    steps = sorted(random.Random(20261121).sample(range(1, STEPS), 3))
    for k in steps:
        assert run(tmp_path, k, "kill")[0] == -signal.SIGKILL
    status, said = run(tmp_path)
    assert status == 0, said
    kept = (steps[-1] - 1) // 3 * 3  # it dies before the step is saved
    assert f"step {kept + 1}\n" in said and f"step {kept}\n" not in said  # it went on, it did not start again
    assert (tmp_path / ADAPTER).read_bytes() == whole


def test_killed_from_outside_at_any_moment(whole, tmp_path):
    "The parent kills without knowing what the child is doing: loading, stepping, measuring or writing."
    process, log = spawn(tmp_path)
    while process.is_alive() and not (log.exists() and "step 4" in log.read_text()):
        time.sleep(0.002)
    time.sleep(random.Random(1).random() * 0.2)
    process.kill()
    process.join()
    status, said = run(tmp_path)
    assert status == 0, said
    assert (tmp_path / ADAPTER).read_bytes() == whole


def test_killed_while_the_checkpoint_is_written(whole, tmp_path):
    assert (
        run(tmp_path, 1, "kill while writing")[0] == -signal.SIGKILL
    )  # the second checkpoint is never put in place
    left = {f.name for f in tmp_path.iterdir()} - {".lock"}
    assert (
        CHECKPOINT in left and ADAPTER not in left and len(left) == 2
    )  # the old one, and a hidden neighbour
    status, said = run(tmp_path)
    assert status == 0, said
    assert "step 4\n" in said and "step 3\n" not in said
    assert (tmp_path / ADAPTER).read_bytes() == whole
    assert {f.name for f in tmp_path.iterdir()} == {CHECKPOINT, ADAPTER}  # what was half written is swept


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_ctrl_c_and_sigterm_keep_the_step_and_say_so(how, whole, tmp_path):
    status, said = run(tmp_path, 5, how)
    assert status != 0 and f"stopped after step 5 of {STEPS}; the same call goes on here" in said, said
    assert "step 6\n" not in said and (tmp_path / CHECKPOINT).exists()
    status, said = run(tmp_path)
    assert status == 0 and "step 6\n" in said and "step 5\n" not in said
    assert (tmp_path / ADAPTER).read_bytes() == whole


def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_cure(tmp_path):
    run(tmp_path, 5, "kill")
    file, steps = tmp_path / CHECKPOINT, []
    good = file.read_bytes()
    middle = bytearray(good)
    middle[len(good) * 3 // 4] ^= 16  # one bit, far from the header
    step = good.index(b'"step\\": ') + len(b'"step\\": ')
    edited = good[:step] + b"9" + good[step + 1 :]  # it says that it stands at another step
    assert edited != good
    for bad in (good[: len(good) // 2], bytes(middle), b"", edited):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged.*delete it to start this training from step 0"):
            training(tmp_path, steps.append)
    file.write_bytes(good)
    with pytest.raises(ValueError, match="belongs to another training: rank was 2, is 3"):
        training(tmp_path, steps.append, rank=3)
    assert not steps and not (tmp_path / ADAPTER).exists()  # refused before any work


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(rnak=4), "did you mean 'rank'?"),
        (dict(lr="1e-4"), "in YAML write 1.0e-4"),
        (dict(train_steps=0), "train_steps=0"),
        (dict(mixed_precision="float16"), "use 'bfloat16'"),
        (dict(target_modules="atention"), "target_modules='atention' matches no"),
    ],
)
def test_bad_parameters_stop_before_any_work(changes, part, tmp_path):
    steps = []
    with pytest.raises(ValueError) as e:
        training(tmp_path, steps.append, **changes)
    assert part in str(e.value) and not steps and not list(tmp_path.iterdir())


def test_the_last_update_may_be_the_one_that_breaks(tmp_path, monkeypatch):
    "All losses are fine, the weights after the last step are not: nothing is written, and the last checkpoint goes on."
    from stylelora.train import loop

    real = loop.advance

    def advance(run, *args):
        row = real(run, *args)
        if run.step == STEPS:
            next(iter(run.params.values())).data.view(-1)[0] = float("nan")
        return row

    monkeypatch.setattr(loop, "advance", advance)
    with pytest.raises(
        FloatingPointError, match="adapter after step 12: 1 of .*nothing is written; lower lr"
    ):
        training(tmp_path, save_every=5)
    assert not (tmp_path / ADAPTER).exists()
    monkeypatch.undo()
    steps = []
    training(tmp_path, lambda row: steps.append(row["step"]), save_every=5)
    assert steps == [11, 12] and (tmp_path / ADAPTER).exists()
