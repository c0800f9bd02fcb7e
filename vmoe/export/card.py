"""The model card of a shared model, made from its checkpoint and its run's records."""

import hashlib
from contextlib import suppress
from pathlib import Path

import yaml

from vmoe.checkpoints import RunFolder, TrainedModel, shared_config
from vmoe.checkpoints.run_folder import loads_in, metrics_of
from vmoe.data.samples import PHOTOGRAPHS, credit, load_photograph
from vmoe.explain.heatmap.figure import PANEL, draw_layer, draw_overview
from vmoe.explain.heatmap.routed import route_image
from vmoe.figures.style import Page
from vmoe.models.cost import count_parameters, flops_per_image
from vmoe.moe import moe_layers
from vmoe.sizes import size_text
from vmoe.text import counted
from vmoe.version import __version__

PICTURE = "routing.png"
_TASK = "image-classification"
_SHOWN = PHOTOGRAPHS[0]
_NAMELESS = {
    "folder": "a folder of images",
    "table": "a table of images",
    "huggingface": "a data set of Hugging Face's datasets",
    "npz": "arrays of images",
    "webdataset": "tar shards of images",
}
_FITTED = {
    "centre": "the largest central part of this shape, resized",
    "squash": "resized, whatever their shape",
    "letterbox": "resized to fit, between stripes of grey",
}
_ONE_CLASS = "The model names every picture as one of its classes ({count} in all), also one that shows none of them."
_SEVERAL_CLASSES = (
    "A picture may have several of the {count} classes, or none: each logit is of a sigmoid of its own, and a class "
    "counts from its threshold on, which was chosen on validation images and stands in model.safetensors."
)
_TRANSFORMERS = """\
transformers opens it, too, once vmoe is imported:

```python
import vmoe
from transformers import pipeline

pipeline("image-classification", model="USER/NAME")("photo.jpg")  # or a folder
```
"""
_OF_CHANNELS = """\
Pictures are read by their {channels}, at the depth of their files; `vmoe.load("hf-hub:USER/NAME").predict(files)` does
it. The pipelines of transformers read RGB alone.
"""
_TEMPLATE = """\
---
{front_matter}
---

# {title}

{what}

| | |
|---|---|
| images | {size} pixels, {channels}; {fitted} |
| classes | {classes} |
| parameters | {total:,} in all, {active:,} active for one token |
| FLOPs per image | {flops:,} (a multiply-add counts 2) |
| trained on | {data}, {epochs}, {steps}, seed {seed} |
| test {metric} | {accuracy} |

## Load it

```python
import timm
import vmoe  # makes timm know the architecture: pip install vmoe

model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
```

{transformers}
`vmoe predict USER/NAME photo.jpg` names what is in a picture.

{routing}## Recipe

The run's whole config:

```yaml
{recipe}```

## Licence

{license}

## Limits

{answers} What it does
with pictures unlike those it was trained on, or how fairly it treats them, was not measured.

Written by vmoe {version}.
"""


# The end of an untouched card. A card without it has been completed by its owner and is not overwritten.
_END_MARK = "\n<!-- as vmoe wrote it: "
_PICTURE = f"""\
![Which expert takes which patch of a photograph]({PICTURE})

*Which expert takes which patch, layer by layer; {credit([_SHOWN])}.*

"""


def has_picture(checkpoint: TrainedModel) -> bool:
    """Whether there is a picture to draw: not of a dense model, nor where images are routed as a whole, nor where they
    are no RGB, as the sample photograph is.
    """
    layers = moe_layers(checkpoint.model)
    return bool(layers) and layers[0][1].images is None and checkpoint.channels is None


def draw_routing(checkpoint: TrainedModel) -> Page:
    """The card's picture: where a V-MoE sends the patches of a sample photograph."""
    prepared = checkpoint.image_size, checkpoint.mean, checkpoint.std
    image = route_image(checkpoint.model, load_photograph(_SHOWN), *prepared, PANEL, checkpoint.crop)
    layers = list(image.layers)
    predicted = f"predicted: {checkpoint.class_names[image.predicted]} ({image.probabilities.max():.0%})"
    if len(layers) == 1:
        title = f"Which expert takes which patch of {_SHOWN}"
        return draw_layer(image, layers[0], title, f"{predicted} · {layers[0]}", [credit([_SHOWN])])
    title = f"Which expert takes which patch of {_SHOWN}, layer by layer"
    return draw_overview(
        image, layers, title, f"{predicted} · first choices in {len(layers)} MoE layers", [credit([_SHOWN])]
    )


def model_card(checkpoint: TrainedModel, source: str | Path, license: str | None) -> str:
    """README.md of a shared model.

    Args:
        checkpoint: The model.
        source: The run's folder, for its summary.json and metrics.csv; or a file.
        license: The weights' licence, by its name on the hub, or None.
    """
    config, classes = checkpoint.config, checkpoint.class_names
    channels = None if checkpoint.channels is None else counted(checkpoint.channels, "channel")
    parameters = count_parameters(checkpoint.model)
    accuracy = metrics_of(RunFolder(Path(source)).read_summary()).get(
        "test/mAP" if checkpoint.multi_label else "test/top1"
    )
    data = config.get("data", {}).get("name", "images of its own")
    title = f"{config['model']['name']} for {_classes(classes) if data in _NAMELESS else data}"
    card = _TEMPLATE.format(
        front_matter=_front_matter(title, data, accuracy, license, checkpoint.multi_label),
        metric="mAP" if checkpoint.multi_label else "top-1",
        answers=(_SEVERAL_CLASSES if checkpoint.multi_label else _ONE_CLASS).format(count=len(classes)),
        title=title,
        what=_what(checkpoint),
        size=size_text(checkpoint.image_size),
        channels=channels or "RGB",
        transformers=_TRANSFORMERS if channels is None else _OF_CHANNELS.format(channels=channels),
        fitted=_FITTED[checkpoint.crop],
        classes=f"{len(classes)}: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}",
        total=parameters.total,
        active=parameters.active,
        flops=flops_per_image(checkpoint.model, checkpoint.image_size),
        data=_NAMELESS.get(data, f"`{data}`"),
        epochs=counted(checkpoint.epoch, "epoch"),
        steps=counted(checkpoint.step, "update"),
        seed=config.get("seed", "unknown"),
        accuracy="unknown: the run left no summary.json" if accuracy is None else f"{accuracy:.2%} (one run)",
        routing=_routing_section(checkpoint, Path(source)),
        recipe=yaml.safe_dump(shared_config(config), sort_keys=False),
        license=f"The weights: {license}." if license else "The owner of the weights has not named one.",
        version=__version__,
    )
    return card + _END_MARK + _mark(card)


def _front_matter(title: str, data: str, accuracy: float | None, license: str | None, multi_label: bool = False) -> str:
    """The card's metadata for the hub: tags and, if known, the test accuracy as a model-index.

    With several classes per image the metric is mAP.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if accuracy is not None:
        set_of = _NAMELESS.get(data, data)
        results = [
            EvalResult(
                task_type=_TASK,
                dataset_type=data,
                dataset_name=set_of,
                dataset_split="test",
                metric_type="mean_average_precision" if multi_label else "accuracy",
                metric_name="mAP" if multi_label else "top-1 accuracy",
                metric_value=accuracy,
            )
        ]
    facts = ModelCardData(
        tags=[_TASK, "timm", "transformers", "vmoe", "mixture-of-experts"],
        library_name="timm",
        pipeline_tag=_TASK,
        license=license,
        model_name=None if accuracy is None else title,
        eval_results=results,
    )
    return facts.to_yaml()


def is_untouched(card: str) -> bool:
    """Whether a README.md is still as `model_card` wrote it."""
    text, found, mark = card.rpartition(_END_MARK)
    return bool(found) and mark == _mark(text)


def _mark(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def _classes(names: list[str]) -> str:
    """A text such as "5 classes: daisy, rose, tulip, ..."."""
    return f"{counted(len(names), 'class', 'classes')}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _what(checkpoint: TrainedModel) -> str:
    layers = moe_layers(checkpoint.model)
    if not layers:
        return f"A dense `{checkpoint.config['model']['name']}` of timm, the twin of a V-MoE, for classifying images."
    moe = layers[0][1].config
    chooses = "whose slots mix tokens" if moe.router == "soft" else f"routed by {moe.router.replace('_', ' ')}"
    per_token = "" if moe.fills_slots else f", {moe.top_k} for each {'image' if moe.route == 'image' else 'token'}"
    experts = counted(moe.num_experts, "expert")
    places = ", ".join(f"`{name}`" for name, _ in layers)
    return (
        f"A vision mixture of experts (V-MoE, https://arxiv.org/abs/2106.05974) for classifying images: "
        f"`{checkpoint.config['model']['name']}` of timm with {experts}{per_token}, {chooses}, "
        f"in the place of the MLPs {places}."
    )


def _routing_section(checkpoint: TrainedModel, source: Path) -> str:
    """The section with a V-MoE's picture and, if recorded, each expert's load in the last epoch."""
    parts = [_PICTURE] if has_picture(checkpoint) else []
    parts += _loads(source)
    return "".join(["## Routing\n\n", *parts]) if parts else ""


def _loads(source: Path) -> list[str]:
    """A table of each expert's load in the last epoch; empty if the run has not recorded it."""
    with suppress(OSError, StopIteration):
        loads = next(filter(None, map(loads_in, reversed(RunFolder(source).read_metrics()))))
        lines = [f"| `{block}` | {' | '.join(f'{load:.2f}' for load in each)} |" for block, each in loads.items()]
        experts = max(map(len, loads.values()))
        head = [f"| layer | {' | '.join(f'expert {index}' for index in range(experts))} |", f"|---{'|---' * experts}|"]
        caption = "Load of each expert in the last epoch, 1 being its fair share."
        return ["\n".join([caption, "", *head, *lines, "", ""])]
    return []
