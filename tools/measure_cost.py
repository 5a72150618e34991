"""Time a training step and a picture on Stable Diffusion 1.5 with random weights, and keep the numbers for the plan of `sd15`.

    python tools/measure_cost.py [--device cuda] [--name "two cores of …"]

The networks have the published sizes; what the weights are does not change the time. Needs 2 GB of disk for a moment, and on a
CPU the memory that the result records as peak_mb. The result goes to reports/results/sd15_costs.json, which `stylelora study --profile sd15 --dry-run` reads on
machines that have no copy of the base.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stylelora.core import generator
from stylelora.models.base import full_base
from stylelora.models.load import save_base
from stylelora.models.tiny import randomise
from stylelora.study.cost import measure_base, record_cost


def published(folder):
    "Save a base of the published sizes: U-Net and autoencoder of SD 1.5, random weights."
    from diffusers import AutoencoderKL

    wide = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=wide,
        latent_channels=4,
        layers_per_block=2,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    randomise([vae], generator("published vae"))
    return save_base(replace(full_base("sd15"), vae=vae), folder, "float16")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", help="what to call the machine; the name of the card if left out")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        base = published(Path(d) / "stable-diffusion-v1-5")
        cost = measure_base(str(base), a.device, "cross_attention", 8, 4, "bfloat16", 4, "auto")
    if "why" in cost:
        raise SystemExit(cost["why"])
    if a.name:
        cost["device"] = a.name
    cost["weights"] = "random"
    print(record_cost(cost), cost)
