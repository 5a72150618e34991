"""Words: captions and prompts that the embedded base does not understand are named, and the README's example gets no warning."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylelora.adapters.files import read_adapter, save_adapter
from stylelora.apps.cli import main

ROOT = Path(__file__).resolve().parents[2]
THINGS = ("red cup", "boat", "old mill", "cat")
FAST = ("--train-steps", "1", "--set", "val_every=0")
ONE = ("--n", "1", "--num-inference-steps", "1", "--guidance-scale", "1")


def write(folder, captions):
    folder.mkdir()
    for i, text in enumerate(captions):
        x = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(x).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


def warned(capsys, *words):  # the warnings of a command that succeeds
    assert main([str(w) for w in words]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("warning", "note"))]


def example():
    "Read the commands of the README's section on a style of one's own, without their comments."
    text = (ROOT / "README.md").read_text().split("## A style of your own")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", text, re.S)[1]
    return [
        shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("stylelora ")
    ]


def test_the_example_of_the_readme_is_whole(tmp_path, monkeypatch, capsys):
    write(tmp_path / "my_folder", THINGS)  # what is shown, as the README says
    monkeypatch.chdir(tmp_path)
    check, train, sample = example()
    assert (check[-1], train[0], sample[0]) == ("--check", "train", "sample")
    assert warned(capsys, *check) == []
    assert warned(capsys, *train, *FAST) == []
    assert warned(capsys, *sample, *ONE) == []
    assert (tmp_path / sample[sample.index("--out") + 1]).exists()


def test_plain_captions_are_named_before_they_train_to_nonsense(tmp_path, capsys):
    plain = write(tmp_path / "plain", THINGS)
    (told,) = warned(capsys, "train", plain, "--check")
    assert "4 of 4 captions are not of the form '<style> emoji of <thing>', such as 'red cup'" in told
    cure = shlex.split(told.split("nothing else: ")[1])
    assert warned(capsys, "train", plain, "--check", *cure) == []  # the cure cures
    (told,) = warned(capsys, "train", plain, "--check", "--template", "emoji of {caption}")
    assert "4 of 4 captions are without a style word" in told
    told = warned(capsys, "train", plain, "--check", "--style", "<s2>")
    assert any("the style word '<s2>' is used nowhere" in line for line in told)
    told = warned(capsys, "train", plain, "--check", "--template", "{style} emoji of {caption}")
    assert any("has {style}, and no style word is given" in line for line in told)


def test_other_bases_take_any_text(tmp_path, capsys):
    plain = write(tmp_path / "plain", ("cup", "cat"))
    assert warned(capsys, "train", plain, "--check", "--base", "tiny") == [
        "note: the folder: no word is common to all captions, so none will call the style"
    ]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    home = tmp_path_factory.mktemp("adapter")
    words = ("--style", "<s1>", "--template", "{style} emoji of {caption}")
    folder = write(home / "mine", THINGS)
    assert main(["train", str(folder), *words, "--out", str(home / "a.safetensors"), *FAST]) == 0
    return home / "a.safetensors"


def test_prompts_are_held_against_base_and_adapter(adapter, capsys, tmp_path):
    def said(prompt, *more):
        return warned(capsys, "sample", prompt, *ONE, "--force", "--out", tmp_path / "g.png", *more)

    assert said("<s1> emoji of fox", "--lora", adapter) == said("noto emoji of fox") == []
    assert "not of the form '<style> emoji of <thing>'" in said("a red apple")[0]
    assert "without a style word" in said("emoji of red apple")[0]
    lacks = said("noto emoji of fox", "--lora", adapter)
    assert (
        len(lacks) == 1 and "lacks '<s1>', which calls the adapter, as in '<s1> emoji of red cup'" in lacks[0]
    )
    long = said("noto emoji of " + "very " * 30 + "red apple")
    assert len(long) == 1 and "has 67 tokens, the base reads 24; shorten it" in long[0]


def test_negative_prompts_are_cut_too(capsys, tmp_path):
    how = ("--n", "1", "--num-inference-steps", "1", "--out", tmp_path / "g.png")
    told = warned(capsys, "sample", "noto emoji of fox", *how, "--negative-prompt", "blurry " * 30)
    assert len(told) == 1 and "92 tokens" in told[0]


def test_an_adapter_remembers_how_it_is_called(adapter, tmp_path):
    found = read_adapter(adapter)
    call = found.manifest["call"]
    assert {k: call[k] for k in ("trigger", "template", "example", "captions")} == dict(
        trigger="<s1>", template="{style} emoji of {caption}", example="<s1> emoji of red cup", captions=4
    )
    counts = dict.fromkeys([f"<s1> emoji of {t}" for t in THINGS], 1)
    for layout in ("kohya", "diffusers"):
        save_adapter(found.state, tmp_path / f"{layout}.safetensors", layout, found.manifest)
        header = read_adapter(tmp_path / f"{layout}.safetensors").metadata
        assert json.loads(header["ss_tag_frequency"]) == {"stylelora": counts}
        assert header["modelspec.trigger_phrase"] == "<s1>"


def test_training_says_how_to_call_it(tmp_path, capsys):
    folder = write(tmp_path / "mine", ["<s3> emoji of cat's hat"])
    out = tmp_path / "a.safetensors"
    assert main(["train", str(folder), "--out", str(out), *FAST]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last.split("as in: ")[1])
    assert words == ["stylelora", "sample", "<s3> emoji of cat's hat", "--lora", str(out)]
