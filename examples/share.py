"""From a folder of your own colour pictures to a pipeline of diffusers, in about a minute.

    python examples/share.py [PICTURES] [OUT]

Trains a tiny model on the pictures, writes a shared folder with a model card and a pipeline, and
draws the same noises in 1, 2 and 4 steps with diffusers. Without a folder it paints discs of three
colours, a class each. Needs `pip install 'anystep[share,diffusers]'`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from anystep import save_pretrained
from anystep.config import LogConfig, OptimizerConfig
from anystep.data.folder import Folder
from anystep.export.diffusers import Diffusers
from anystep.interop.diffusers import AnyStepPipeline
from anystep.networks.dit import DiTConfig
from anystep.presets import preset
from anystep.train import train


def paint(folder: Path, n: int = 60, side: int = 16) -> None:
    """Write n pictures of discs for each of three colours, a subfolder a colour."""
    generator = torch.Generator().manual_seed(0)
    for colour in ("crimson", "gold", "royalblue"):
        (folder / colour).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            x, y, radius = torch.rand(3, generator=generator).tolist()
            centre, r = (4 + x * (side - 8), 4 + y * (side - 8)), 2 + 3 * radius
            picture = Image.new("RGB", (side, side), "black")
            ImageDraw.Draw(picture).circle(centre, r, fill=colour)
            picture.save(folder / colour / f"{k}.png")


def main(pictures: Path, out: Path) -> None:
    """Train, share, load with diffusers, draw."""
    config = replace(
        preset("folder"),
        data=Folder(path=pictures, size=(16, 16)),
        network=DiTConfig(patch=4, width=64, depth=3, heads=4),
        optimizer=OptimizerConfig(lr=4e-3, betas=(0.9, 0.99), warmup=100, decay="cosine"),
        log=LogConfig(look_every=0, trackers=()),
        out=out / "run",
        steps=1500,
        batch=64,
    )
    train(config)
    save_pretrained(config.out, out / "shared")
    Diffusers(out / "shared", out / "pipe").write()

    pipe = AnyStepPipeline.from_pretrained(out / "pipe")
    classes = pipe.transformer.spec.num_classes
    given = {"class_labels": [k % classes for k in range(9)]} if classes else {"batch_size": 9}
    for steps in (1, 2, 4):
        generator = torch.Generator().manual_seed(0)
        images = pipe(num_inference_steps=steps, generator=generator, **given).images
        strip = Image.new("RGB", (9 * 64, 64))
        for k, image in enumerate(images):
            strip.paste(image.resize((64, 64), Image.Resampling.NEAREST), (64 * k, 0))
        strip.save(out / f"{steps}-steps.png")
    print(f"{out}: run, shared/README.md, pipe, 1-steps.png, 2-steps.png, 4-steps.png")


if __name__ == "__main__":
    place = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/share")
    if len(sys.argv) < 2:
        paint(place / "pictures")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else place / "pictures", place)
