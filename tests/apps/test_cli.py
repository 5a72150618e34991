"""The command as a person uses it: help at once, mistakes in one line, and a tiny adapter from folder to picture."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylelora.apps.cli import main
from stylelora.core import assets
from stylelora.models.load import load_base
from stylelora.sample.generate import generate, write_grid

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("study", "train", "sample", "report", "merge", "resize", "convert", "extract", "inspect")


def run(*words, **more):  # the command in a fresh process
    return subprocess.run(
        [sys.executable, "-m", "stylelora.apps.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=more.pop("cwd", ROOT),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


def fails(capsys, *words, code=1):  # what the command says when it refuses: 1 a told error, 2 wrong words
    got = main([str(w) for w in words])
    said = capsys.readouterr()
    assert got == code, (got, said)
    assert said.err.count("\n") == 1 and "Traceback" not in said.err, said.err
    return said.err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):  # a folder of twelve pictures with captions
    folder = tmp_path_factory.mktemp("pictures")
    dice = np.random.default_rng(0)
    for i in range(12):
        a = np.full((20, 20, 3), 255, np.uint8)
        x, y = dice.integers(2, 12, 2)
        a[y : y + 6, x : x + 6] = dice.integers(0, 200, 3)
        Image.fromarray(a).save(folder / f"p{i:02d}.png")
        (folder / f"p{i:02d}.txt").write_text(f"emoji of square {i}")
    return folder


def test_help_comes_at_once_and_is_worth_reading():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0 and all(c in done.stdout for c in COMMANDS)
    code = "import sys, stylelora.apps.cli as c; c.main(['--help']); print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
    assert spent < 1.5, spent  # seconds of the processor, 0.5 as a rule; a busy machine does not count


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_options(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.split()) > 40
    assert max(map(len, text.splitlines())) <= 110


def test_mistakes_of_the_command_line(capsys):
    assert main([]) == 0 and "study" in capsys.readouterr().out  # no words: the help
    for words, said in (
        (("dance",), "No such command 'dance'"),
        (("smaple", "x"), "Did you mean 'sample'"),
        (("sample", "x", "--smapler", "ddim"), "--sampler"),
        (("sample", "x", "--num-inference-steps", "many"), "--num-inference-steps"),
        (("sample", "x", "--guidance-scale", "nan"), "not a finite number"),
        (("sample", "x", "--lora-scale", "inf"), "not a finite number"),
        (("sample", "x", "--n", 0), "--n"),
        (("sample", "x", "--eta", 2), "--eta"),
        (("sample", "x", "--eta", "much"), "--eta"),
        (("sample", "x", "--guidance_rescale", -1), "--guidance-rescale"),
        (("sample", "x", "--batch-size", 0), "--batch-size"),
        (("sample",), "prompt"),
        (("train", "x", "--lr", "nan"), "not a finite number"),
        (("resize", "x", "--rank", 0), "--rank"),
        (("merge",), "adapter"),
    ):
        assert said in fails(capsys, *words, code=2), words


def test_names_are_completed_from_the_tables():
    def completed(*words):
        line = " ".join(["stylelora", *words])
        more = dict(_STYLELORA_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
        code = "from stylelora.apps.cli import main; main([])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **more}
        )
        return done.stdout

    assert "study" in completed("st")
    assert "--guidance-scale" in completed("sample", "x", "--guid")
    assert "dpmpp_2m_sde" in completed("sample", "x", "--sampler", "dpm")
    assert "high_noise" in completed("train", "x", "--timestep-sampling", "high")
    assert "min_snr" in completed("train", "x", "--loss-weighting", "min")
    assert "cross_attention" in completed("train", "x", "--target-modules", "cross")


def test_mistakes_in_the_values(capsys, tmp_path):
    tiny = ("--base", "tiny", "--out", tmp_path / "g.png")
    assert "ddim" in fails(capsys, "sample", "x", *tiny, "--sampler", "dpm9000")
    assert "absent" in fails(capsys, "sample", "x", *tiny, "--lora", tmp_path / "absent.safetensors")
    assert "does not exist" in fails(capsys, "sample", "x", "--base", "nobase", "--out", tmp_path / "g.png")
    assert "vae 'nowhere' does not exist" in fails(capsys, "sample", "x", *tiny, "--vae", "nowhere")
    assert "does not fit base" in fails(capsys, "sample", "x", *tiny, "--vae", assets() / "base")
    assert "--image" in fails(capsys, "sample", "x", *tiny, "--image", tmp_path / "absent.png")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    fails(capsys, "sample", "x", *tiny, "--lora", tmp_path / "bad.safetensors")
    assert not (tmp_path / "g.png").exists()


def test_settings_are_checked_before_the_model_is_loaded(capsys, tmp_path, pictures, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("stylelora.models.load.load_base", never)
    image = ("--image", pictures / "p00.png")
    for words, said in (
        (("--sampler", "dpm9000"), "unipc"),
        (("--timestep-spacing", "kerras"), "karras"),
        (("--num-inference-steps", 0), "num_inference_steps=0"),
        (("--num-inference-steps", 0, "--timestep-spacing", "karras"), "num_inference_steps=0"),
        (("--eta", 0.5, "--sampler", "unipc"), "no fresh noise"),
        (("--negative-prompt", "red", "--guidance-scale", 1), "no effect"),
        (("--mixed-precision", "float8"), "bfloat16"),
        ((*image, "--strength", 0), "strength=0.0"),
        ((*image, "--strength", 0.1, "--num-inference-steps", 5), "no step at all"),
        (("--image", tmp_path / "x.png"), "--image"),
        (("--lora", tmp_path / "x.safetensors"), "does not exist"),
    ):
        assert said in fails(capsys, "sample", "x", "--out", tmp_path / "g.png", *words), words
    with pytest.raises(AssertionError):
        main(["sample", "x"])


def test_every_setting_reaches_the_drawing(tmp_path, pictures):
    words = [
        "sample",
        "a cat",
        "--base",
        "tiny",
        "--n",
        "2",
        "--num-inference-steps",
        "6",
        "--guidance-scale",
        "3",
        "--sampler",
        "ddim",
        "--force",
        "--out",
        str(tmp_path / "g.png"),
    ]

    def drawn(*more):
        assert main([*words, *map(str, more)]) == 0
        return (tmp_path / "g.png").read_bytes()

    options = dict(
        sampler="euler_ancestral",
        eta=0.5,
        timestep_spacing="karras",
        guidance_rescale=0.9,
        negative_prompt="red",
        mixed_precision="bfloat16",
    )
    plain, start = drawn(), ("--image", pictures / "p00.png")
    seen = [drawn(f"--{k}", v) for k, v in options.items()] + [
        drawn(*start),
        drawn(*start, "--strength", 0.4),
    ]
    assert len({plain, *seen}) == 1 + len(seen)  # each changes the picture, each in its own way
    made = generate(
        load_base("tiny"),
        "a cat",
        range(2),
        num_inference_steps=6,
        guidance_scale=3.0,
        progress=False,
        **options,
    )
    write_grid(made.images, 2, tmp_path / "ours.png")
    assert (
        drawn(*(w for k, v in options.items() for w in (f"--{k}", v))) == (tmp_path / "ours.png").read_bytes()
    )


def test_mistakes_in_a_training(capsys, tmp_path, pictures):
    out = ("--base", "tiny", "--out", tmp_path / "a.safetensors", "--train-steps", 1)
    assert "is not a folder" in fails(capsys, "train", tmp_path / "absent", *out)
    (tmp_path / "empty").mkdir()
    fails(capsys, "train", tmp_path / "empty", *out)
    (tmp_path / "lone").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "lone" / "a.png")
    assert "no caption" in fails(capsys, "train", tmp_path / "lone", *out)
    assert "rank" in fails(capsys, "train", pictures, *out, "--rank", 0)
    assert "did you mean" in fails(capsys, "train", pictures, *out, "--set", "warmpu_steps=3")
    assert "timestep_sampling" in fails(capsys, "train", pictures, *out, "--timestep-sampling", "sideways")
    assert not (tmp_path / "a.safetensors").exists()


def test_train_and_sample(capsys, tmp_path, pictures):
    file, grid = tmp_path / "a.safetensors", tmp_path / "g.png"
    assert main(["train", str(pictures), "--check", "--base", "tiny"]) == 0
    assert "12 pictures" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                str(pictures),
                "--out",
                str(file),
                "--base",
                "tiny",
                "--train-steps",
                "4",
                "--rank",
                "2",
                "--val",
                "2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert file.exists() and "a.safetensors" in said
    words = [
        "sample",
        "emoji of square 3",
        "emoji of square 4",
        "--base",
        "tiny",
        "--n",
        "3",
        "--num-inference-steps",
        "2",
        "--force",
        "--out",
        str(grid),
    ]
    assert main([*words, "--lora", str(file)]) == 0
    assert Image.open(grid).size == (3 * 16 + 4, 2 * 16 + 2)
    with_lora = grid.read_bytes()
    assert main([*words, "--lora", str(file), "--lora-scale", "0"]) == 0
    at_zero = grid.read_bytes()
    assert main(words) == 0
    assert (
        grid.read_bytes() == at_zero != with_lora
    )  # scale zero is the base, and the adapter changes something


def test_the_same_training_gives_the_same_file(tmp_path, pictures):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for f in files:
        assert main(["train", str(pictures), "--out", str(f), "--base", "tiny", "--train-steps", "2"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_image_is_a_start(tmp_path, pictures):
    out = tmp_path / "g.png"
    assert (
        main(
            [
                "sample",
                "x",
                "--base",
                "tiny",
                "--image",
                str(pictures / "p00.png"),
                "--num-inference-steps",
                "4",
                "--n",
                "1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert Image.open(out).size == (16, 16)


def test_it_works_outside_of_the_checkout(tmp_path):
    done = run(
        "sample",
        "x",
        "--base",
        "tiny",
        "--num-inference-steps",
        "1",
        "--n",
        "1",
        "--out",
        tmp_path / "g.png",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "g.png").exists() and "1 pictures" in done.stdout


def test_report_says_what_is_missing(capsys, tmp_path, monkeypatch):
    assert "unknown" in fails(capsys, "report", "--renderer", "jekyll")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert "not made by stylelora report" in fails(capsys, "report", "--out", tmp_path / "full")


def test_a_training_that_was_stopped_goes_on(capsys, tmp_path, pictures, monkeypatch):
    import stylelora.train.loop

    after, whole, part = (
        stylelora.train.loop.after_step,
        tmp_path / "whole.safetensors",
        tmp_path / "part.safetensors",
    )
    words = ["train", str(pictures), "--base", "tiny", "--train-steps", "8", "--set", "save_every=3", "--out"]
    assert main([*words, str(whole)]) == 0

    def pulled(run, *rest):  # the plug, at step 7, when step 6 was written
        after(run, *rest)
        if run.run.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(stylelora.train.loop, "after_step", pulled)
        assert main([*words, str(part)]) == 130
    assert not part.exists() and (tmp_path / "part.work" / "stylelora-training.safetensors").exists()
    capsys.readouterr()
    assert "another training" in fails(capsys, *words, part, "--seed", 1)
    steps = []
    with monkeypatch.context() as m:
        m.setattr(
            stylelora.train.loop,
            "after_step",
            lambda run, *rest: (steps.append(run.run.step), after(run, *rest)),
        )
        assert main([*words, str(part)]) == 0
    assert steps == [7, 8] and part.read_bytes() == whole.read_bytes()
    made = ["part.safetensors", "part_report", "whole.safetensors", "whole_report"]
    assert sorted(f.name for f in tmp_path.iterdir()) == made


def test_nothing_is_replaced_or_computed_in_vain(capsys, tmp_path, pictures, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("stylelora.models.load.load_base", never)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"hours of work")
    assert "--force" in fails(capsys, "train", pictures, "--out", file)
    assert "end in .png" in fails(capsys, "sample", "x", "--out", file)
    assert file.read_bytes() == b"hours of work"
    monkeypatch.undo()
    assert "a.safetensors" in fails(
        capsys, "train", pictures, "--base", "tiny", "--out", file / "b.safetensors"
    )
    assert (
        main(["train", str(pictures), "--base", "tiny", "--train-steps", "1", "--out", str(file), "--force"])
        == 0
    )
    assert file.read_bytes() != b"hours of work"


def test_evaluate_frames_an_adapter_between_the_base_and_the_pictures(
    capsys, tmp_path, pictures, monkeypatch
):
    from stylelora.measure import card

    def vectors(x):  # judges of a toy world: colours are style, brightness is content
        import torch

        flat = torch.from_numpy(x.reshape(len(x), -1, 3).astype("float32")).mean(1) / 255 + 0.1
        return torch.nn.functional.normalize(flat, dim=1)

    monkeypatch.setattr(
        card, "judges_for", lambda base, folder=None: card.Judges(vectors, vectors, None, "toy")
    )
    made, table = tmp_path / "a.safetensors", tmp_path / "e.csv"
    assert main(["train", str(pictures), "--base", "tiny", "--train-steps", "2", "--out", str(made)]) == 0
    words = [
        "evaluate",
        str(made),
        "--data",
        str(pictures),
        "--base",
        "tiny",
        "--n",
        "2",
        "--out",
        str(table),
    ]
    assert main([*words, "--lora-scale", "0.5", "--lora-scale", "1"]) == 0
    rows = __import__("pandas").read_csv(table)
    assert rows.name.tolist() == [
        "the bare base",
        "a, strength 0.5",
        "a, strength 1",
        "the pictures themselves",
    ]
    assert (
        rows.style_share.iloc[0] == 0
        and rows.style_share.iloc[-1] == 1
        and table.with_suffix(".html").exists()
    )
    capsys.readouterr()
    assert "not a finite number" in fails(capsys, *words, "--lora-scale", "nan", code=2)
