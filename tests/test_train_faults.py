"""Faults of a training, with real processes: kill -9 at random moments, Ctrl-C, damaged files, bad parameters.

The notebooks break the training loop with exceptions; here a second process trains, and dies as processes die.
"""
import os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
ADAPTER, CHECKPOINT, STEPS = 'pytorch_lora_weights.safetensors', 'checkpoint.safetensors', 12

CHILD = '''
import os, sys, signal, torch
torch.set_num_threads(1)
from stylelora import train as loop
from stylelora.base import encode_text, tiny_base
from stylelora.core import generator
folder, die_at, how, changes = sys.argv[1], int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
base = tiny_base()
data = torch.randn(6, 4, 8, 8, generator=generator('pictures')), encode_text(base, list('abcdef'))

def on_step(row):
    print('step', row['step'], flush=True)
    if row['step'] == die_at and how == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    if row['step'] == die_at and how == 'interrupt': os.kill(os.getpid(), signal.SIGINT)

if how == 'kill while writing':                       # dies with the new checkpoint written but not yet in place
    replace = os.replace
    def die(a, b):
        if str(b).endswith('checkpoint.safetensors') and die.left == 0: os.kill(os.getpid(), signal.SIGKILL)
        die.left -= 1
        replace(a, b)
    die.left, os.replace = die_at, die

values = dict(steps=12, batch_size=2, lr=1e-2, rank=2, targets='attention', ema=.9, lora_dropout=.1, warmup=2, val_every=4,
              save_every=3) | changes
loop.train(base, *data, config=loop.make_config(**values), val=(data[0][:2], data[1][:2]), on_step=on_step, folder=folder,
           progress=False)
'''


def command(folder, die_at=0, how='', **changes): return [sys.executable, '-c', CHILD, str(folder), str(die_at), how, repr(changes)]


def environment(): return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONHASHSEED='0')


def run(folder, die_at=0, how='', **changes):
    "Train in a second process; return its exit status and what it said."
    p = subprocess.run(command(folder, die_at, how, **changes), env=environment(), capture_output=True, text=True, timeout=600)
    return p.returncode, p.stdout + p.stderr


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Train without a fault and return the bytes of the adapter."
    folder = tmp_path_factory.mktemp('whole')
    status, said = run(folder)
    assert status == 0, said
    return (folder/ADAPTER).read_bytes()


def test_killed_at_random_steps_it_ends_with_the_same_bytes(whole, tmp_path):
    steps = sorted(random.Random(20261121).sample(range(1, STEPS), 2))
    for k in steps: assert run(tmp_path, k, 'kill')[0] == -signal.SIGKILL
    status, said = run(tmp_path)
    assert status == 0, said
    kept = (steps[-1] - 1)//3*3                                               # it dies before the step is saved
    assert f'step {kept + 1}\n' in said and f'step {kept}\n' not in said      # it went on, it did not start again
    assert (tmp_path/ADAPTER).read_bytes() == whole


def test_killed_from_outside_at_any_moment(whole, tmp_path):
    "The parent kills without knowing what the child is doing: loading, stepping, measuring or writing."
    child = subprocess.Popen(command(tmp_path), env=environment(), stdout=subprocess.PIPE, text=True)
    while 'step 4' not in child.stdout.readline(): assert child.poll() is None
    time.sleep(random.Random(1).random()*.2)
    child.kill(); child.wait()
    status, said = run(tmp_path)
    assert status == 0, said
    assert (tmp_path/ADAPTER).read_bytes() == whole


def test_killed_while_the_checkpoint_is_written(whole, tmp_path):
    assert run(tmp_path, 1, 'kill while writing')[0] == -signal.SIGKILL       # the second checkpoint is never put in place
    left = [f.name for f in tmp_path.iterdir()]
    assert CHECKPOINT in left and ADAPTER not in left and len(left) == 2      # the old one, and a hidden temporary file
    status, said = run(tmp_path)
    assert status == 0, said
    assert 'step 4' in said and 'step 3\n' not in said
    assert (tmp_path/ADAPTER).read_bytes() == whole


def test_ctrl_c_keeps_the_step_and_says_so(whole, tmp_path):
    status, said = run(tmp_path, 5, 'interrupt')
    assert status in (1, 130, -signal.SIGINT) and 'stopped after step 5 of 12; the same call goes on here' in said
    assert 'step 6' not in said and (tmp_path/CHECKPOINT).exists()
    status, said = run(tmp_path)
    assert status == 0 and 'step 6' in said and 'step 5\n' not in said
    assert (tmp_path/ADAPTER).read_bytes() == whole


def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_cure(whole, tmp_path):
    run(tmp_path, 5, 'kill')
    file = tmp_path/CHECKPOINT
    good = file.read_bytes()
    middle = bytearray(good); middle[len(good)*3//4] ^= 16                    # one bit, far from the header
    for bad in (good[:len(good)//2], bytes(middle), b''):
        file.write_bytes(bad)
        status, said = run(tmp_path)
        assert status == 1 and 'damaged' in said and 'delete it to start this training from step 0' in said, said
        assert 'step ' not in said.split('Traceback')[0]                      # refused before any work
    file.write_bytes(good)
    status, said = run(tmp_path, rank=3)
    assert status == 1 and 'belongs to another training: rank was 2, is 3' in said and not (tmp_path/ADAPTER).exists()


@pytest.mark.parametrize('changes, part', [
    (dict(rnak=4), "did you mean 'rank'?"), (dict(lr='1e-4'), 'in YAML write 1.0e-4'), (dict(steps=0), 'steps=0'),
    (dict(precision='float16'), "use 'bfloat16'"), (dict(targets='atention'), "targets='atention' matches no")])
def test_bad_parameters_stop_before_any_work(changes, part, tmp_path):
    import torch
    from stylelora.base import encode_text, tiny_base
    from stylelora.train import make_config, train
    base, steps = tiny_base(), []
    data = torch.zeros(2, 4, 8, 8), encode_text(base, ['a', 'b'])
    with pytest.raises(ValueError) as e:
        train(base, *data, config=make_config(**(dict(steps=2) | changes)), on_step=steps.append, folder=tmp_path, progress=False)
    assert part in str(e.value) and not steps and not list(tmp_path.iterdir())
