"""Train style adapters (LoRA) for latent diffusion models, draw with them, and measure what they learned.

Ten to fifty pictures in one style become a small file. Loaded into the model that it was trained on, it draws new
things in that style. From a folder of pictures to a picture:

    import stylelora as sl

    base = sl.load_base("embedded")          # or a diffusers folder, a .safetensors file, a hub id
    done = sl.train_folder(base, "my_pictures", "my_style.safetensors")
    print(done.history.loss.iloc[-1])        # a row per step: loss, learning rate, seconds

    base = sl.load_base("embedded")          # later, or on another machine
    sl.load_adapter(base, "my_style.safetensors", scale=0.8)
    drawn = sl.generate(base, "<s1> emoji of red apple", seeds=range(4), num_inference_steps=20)
    drawn.save("apples")                     # four pictures, with a table of what made each

`load_base`     reads a model, frozen, from wherever it is; "embedded" travels with this package.
`train_folder`  trains an adapter on a folder of pictures and captions; killed, it continues to the same bytes.
`load_adapter`  puts an adapter file of diffusers, PEFT or kohya into a base.
`generate`      draws one picture for every prompt and seed.
`save_adapter`  writes an adapter for diffusers, PEFT or kohya (AUTOMATIC1111, Forge, ComfyUI).

There is no `sl.train`: that name belongs to the sub-package with the training loop, `stylelora.train`.

Where to read on
    nbs/00_start_here.ipynb      the map of all chapters, a training in one page, the glossary
    nbs/demo/own_style.ipynb     your own pictures, step by step
    stylelora --help             the same on the command line
    stylelora.data, .train, …    one sub-package a chapter: nbs/05_train/01_step.ipynb is stylelora.train.step
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; at run time `__getattr__` imports a name when it is first used
    from .adapters.files import load_adapter, save_adapter
    from .models.load import load_base
    from .sample.generate import generate
    from .train.from_folder import train_folder

__version__ = "0.1.0"
__all__ = ["load_base", "train_folder", "load_adapter", "generate", "save_adapter"]

_ROOMS = {  # name -> the module that defines it
    "load_base": "models.load",
    "train_folder": "train.from_folder",
    "load_adapter": "adapters.files",
    "generate": "sample.generate",
    "save_adapter": "adapters.files",
}


def __getattr__(name):
    "Import one of the offered names when it is first used, so that `import stylelora` needs no torch."
    if name not in _ROOMS:
        raise AttributeError(f"module 'stylelora' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    return value


def __dir__():
    "List what is here and what is offered."
    return sorted({*globals(), *__all__})
