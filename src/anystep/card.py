"""The model card: what a shared model was trained on and by, what it cost, how good it is."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anystep
from anystep import checkpoint
from anystep.evaluate import Row
from anystep.registry import NAME, flatten, from_json
from anystep.report import save_grid, table
from anystep.sampling import may_guide
from anystep.spec import Model, ModelSpec

CARD, GRID = "README.md", "grid.png"
GRID_STEPS = (1, 4, 32)

USAGE = """```
anystep sample {name} --steps {steps} --n 16 --out samples.png
```

```python
import torch
import anystep

model = anystep.from_pretrained({name!r})
x0 = torch.randn(16, *model.spec.shape, generator=torch.Generator().manual_seed(0))
x1 = anystep.sample(model, x0, steps={steps}{cond})
```
"""
DECODE = """```python
from anystep.interop.vae import recorded

pictures = recorded(model.spec.vae).decode(x1)  # (16, 3, H, W) in [-1, 1]
```
"""
DIFFUSERS = """```python
import torch
from anystep.interop.diffusers import AnyStepPipeline

pipe = AnyStepPipeline.from_pretrained({name!r})
generator = torch.Generator().manual_seed(0)
images = pipe({given}, num_inference_steps={steps}, generator=generator).images
```

Needs `pip install 'anystep[diffusers]'`. The scheduler is diffusers' own
`FlowMapEulerDiscreteScheduler`; any step count will do.
"""


def write_card(
    folder: Path,
    name: str,
    model: Model,
    info: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    usage: str | None = None,
) -> None:
    """Write the model card and its picture, the same noises at a few step counts.

    Args:
        folder: where; its autoencoder, if it holds one, decodes the picture.
        name: what the model is called, and loaded by.
        model: the model.
        info: the content of its `model.json`.
        quality: what `anystep eval` says of it, rows of this model alone.
        usage: how to sample, in Markdown; by anystep when None.
    """
    drawn = Model(model.net, checkpoint.with_own_vae(model.spec, folder))
    save_grid(folder / GRID, drawn, GRID_STEPS)
    (folder / CARD).write_text(card(name, model, info, quality, usage))


def card(
    name: str,
    model: Model,
    info: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    usage: str | None = None,
) -> str:
    """The model card, as Markdown under the metadata that the hub reads."""
    spec = from_json(ModelSpec, info["spec"])  # the model's own may name a folder of this machine
    config = info["training"].get("config") or {}
    counts = ", ".join(map(str, GRID_STEPS))
    parts = [
        metadata(spec, config),
        f"# {name}",
        f"{opening(spec, config)}\n\n![the same noises in {counts} steps]({GRID})",
        f"## How to sample\n\n{usage or sampling(name, spec)}",
        f"## What it may be asked\n\n{bullets(allowed(spec))}",
        f"## Training\n\n{bullets(trained(model, info))}",
    ]
    if quality is not None:
        rows = [Row(**row) for row in quality["rows"]]
        scores = table(rows, quality["semigroup_gap"], quality["notes"])
        parts.append(f"## Quality by steps\n\n{scores}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def metadata(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """The YAML block at the head of a card; JSON values are YAML."""
    method = config.get("objective", {}).get(NAME, "")
    data = config.get("data", {})
    facts: dict[str, Any] = {"library_name": "anystep"}
    if len(spec.shape) == 3:
        facts["pipeline_tag"] = "unconditional-image-generation"
    facts["tags"] = ["anystep", "few-step", *([method.replace("_", "-")] if method else [])]
    path = str(data.get("path"))
    if data.get(NAME) == "hub" and "/" in path and not Path(path).exists():  # no folder here
        facts["datasets"] = [path]
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    return "\n".join(["---", *lines, "---"])


def opening(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """What it is, in a sentence."""
    method = config.get("objective", {}).get(NAME, "").replace("_", " ")
    kind = f"{spec.num_classes} classes" if spec.num_classes else "no classes"
    what = "latents" if spec.vae else "pictures" if len(spec.shape) == 3 else "vectors"
    return (
        f"A generative model of {what} {size(spec.shape)} with {kind}"
        f"{f', trained by {method}' if method else ''}. Its number of sampling steps is chosen "
        "when it is sampled: one set of weights, any number of steps."
    )


def sampling(name: str, spec: ModelSpec) -> str:
    """How to sample it, on the command line and in Python."""
    cond = f", cond=torch.arange(16) % {spec.num_classes}" if spec.num_classes else ""
    usage = USAGE.format(name=name, steps=usual_steps(spec), cond=cond)
    return usage + (f"\nThe samples are latents:\n\n{DECODE}" if spec.vae else "")


def sampling_with_diffusers(name: str, spec: ModelSpec) -> str:
    """How to sample its pipeline of diffusers."""
    some = [k % spec.num_classes for k in range(4)] if spec.num_classes else []
    given = f"class_labels={some}" if some else "batch_size=4"
    return DIFFUSERS.format(name=name, given=given, steps=usual_steps(spec))


def usual_steps(spec: ModelSpec) -> int:
    """Few steps, of those for which the method claims good samples."""
    return next((n for n in (4, *spec.claims) if n and spec.in_regime(n)), 4)


def allowed(spec: ModelSpec) -> dict[str, str]:
    """What the spec says of steps, guidance and the autoencoder."""
    fewest, most = spec.claims
    facts = {
        "steps": f"{fewest} {'or more' if most is None else f'to {most}'}; {step_sizes(spec)}",
        "prediction": f"{'velocity u' if spec.predicts == 'u' else 'noise'}, "
        f"sampled by {spec.sampler}",
        "guidance": guidance(spec),
    }
    if spec.vae is not None:
        where = f"{spec.vae.subfolder}/ here" if spec.vae.name == "." else f"`{spec.vae.name}`"
        facts["autoencoder"] = (
            f"{where} (weights `{spec.vae.weights}`, scale {spec.vae.scale:g}, "
            f"shift {spec.vae.shift:g})"
        )
    return facts


def step_sizes(spec: ModelSpec) -> str:
    """What the network is told of the step, and which sizes it was trained on."""
    if spec.step_input == "zero":
        return "the network is not told the step"
    if spec.step_input == "flag":
        return f"the network is told whether the step is larger than 1/{spec.finest}"
    sizes = [f"1/{2**j}" + (" and less" if 2**j == spec.finest else "") for j in spec.levels]
    return f"trained step sizes {', '.join(sizes)}"


def guidance(spec: ModelSpec) -> str:
    """Where guidance is baked in, and where it may be applied at sampling."""
    if not spec.num_classes:
        return "none: there are no classes"
    baked = (
        f"{spec.guidance:g} is baked into step sizes "
        f"{', '.join(f'1/{2**j}' for j in spec.guided_levels)}"
        if spec.guided_levels
        else "none is baked in"
    )
    counts = [2**j for j in range(spec.finest.bit_length())]
    free = [n for n in counts if may_guide(spec, 1 / n)]
    if not free:
        return f"{baked}; none may be applied at sampling"
    where = "at any step count" if free == counts else f"in {min(free)} steps or more"
    return f"{baked}; at sampling it may be applied {where}"


def trained(model: Model, info: Mapping[str, Any]) -> dict[str, str]:
    """Data, method with its constants, network and compute, as far as they are recorded."""
    training = info["training"]
    config = training.get("config") or {}
    parameters = sum(p.numel() for p in model.net.parameters())
    facts = {"network": f"{constants(info['network'])}; {parameters:,} parameters"}
    if config:
        digest = f"; digest `{training['data']}`" if training.get("data") else ""
        facts = {
            "data": f"{constants(config['data'])}{digest}",
            "method": constants(config["objective"]),
            **facts,
            "optimizer": f"AdamW, {constants(config['optimizer'])}; EMA {config['ema']}",
            "steps": f"{training['step']:,} of {config['batch']} examples, seed {config['seed']}",
        }
    if "forwards" in training:
        facts["compute"] = (
            f"{training['forwards']:,} forward-equivalents (rows through a network; a backward "
            f"counts as two), {training.get('seconds', 0):,.0f} seconds"
        )
    teacher = training.get("teacher") or {}
    if teacher:
        facts["teacher"] = (
            f"`{teacher.get('model')}`, {teacher.get('forwards', 0):,} forward-equivalents"
        )
    return facts | {"written by": f"anystep {anystep.__version__}"}


def constants(config: Mapping[str, Any]) -> str:
    """A config in a line: its name, then each constant."""
    flat = {key: value for key, value in flatten(config).items() if key != NAME}
    values = ", ".join(f"{key} {show(value)}" for key, value in flat.items())
    return f"{config[NAME]}: {values}" if NAME in config else values


def show(value: Any) -> str:
    """A constant as it is shown."""
    if isinstance(value, list):
        return f"({', '.join(map(show, value))})"
    if isinstance(value, str):
        return f"`{value}`"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def bullets(facts: Mapping[str, str]) -> str:
    """The facts as a list."""
    return "\n".join(f"* **{key}**: {value}" for key, value in facts.items())


def size(shape: Iterable[int]) -> str:
    """(3, 32, 32) as 3x32x32."""
    return "x".join(map(str, shape))
