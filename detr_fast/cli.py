"""The command ``detr-fast``. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from detr_fast.config import PAPER_SCALES, LossConfig, ModelConfig, OptimConfig, TrainConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DETR, end-to-end object detection with transformers, on your images and COCO annotations.",
    epilog="Start with: detr-fast demo",
)

Device = Annotated[str, typer.Option(help="cuda, cpu, mps, or auto: cuda where there is a GPU")]
Workers = Annotated[int, typer.Option(min=0, help="processes that load images")]
Size = Annotated[int | None, typer.Option(min=1, help="shorter side in pixels; by default the checkpoint's")]
MaxSize = Annotated[int | None, typer.Option(min=1, help="longest side in pixels; by default the checkpoint's")]
Dilation = Annotated[
    bool | None, typer.Option(help="whether the last stage is dilated (DC5), where the checkpoint does not say it")
]
SharpMasks = Annotated[bool, typer.Option("--sharp-masks", help="sharpen masks by the image's colours")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, a signal ends with 128 + its number."""
    try:
        app()
    except Exception as error:
        signum = getattr(error, "signum", None)
        if signum is not None:
            sys.exit(128 + signum)
        if "--traceback" in sys.argv or not isinstance(error, _mistakes()):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _mistakes() -> tuple[type[Exception], ...]:
    """The errors whose message is all that a user needs."""
    from detr_fast.checkpoint import CheckpointError
    from detr_fast.finite import NonFiniteLossError

    return CheckpointError, NonFiniteLossError, ModuleNotFoundError, ValueError, OSError


@app.callback()
def _global_options(
    traceback: Annotated[bool, typer.Option("--traceback", help="show where an error comes from")] = False,
) -> None:
    """DETR, end-to-end object detection with transformers, on your images and COCO annotations."""


@app.command()
def info(as_json: AsJson = False) -> None:
    """Print versions, devices, and which implementation each op takes here."""
    from detr_fast.info import collect_info, render_info

    print(json.dumps(collect_info(), indent=2) if as_json else render_info())


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(min=0, help="training time")] = 10,
    output: Annotated[Path, typer.Option(help="folder for pictures, curves and checkpoint")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of the weights and the scenes")] = 0,
    device: Device = "auto",
    masks: Annotated[bool, typer.Option("--masks", help="train a mask head too, and draw segments")] = False,
) -> None:
    """Train on handwritten digits in photographs that ship with scikit-learn, and draw what was learnt."""
    from detr_fast.demo import run_demo

    run_demo(minutes=minutes, output=output, seed=seed, device=device, masks=masks)


def train(**options: Any) -> None:
    """Train on images with COCO annotations.

    The output folder gets checkpoint.pth, checkpoint_best.pth (highest AP) and log.jsonl. Ctrl-C saves, --resume
    continues. On several processes: torchrun --nproc-per-node N -m detr_fast train ...
    """
    from detr_fast.train import train as run

    run(_train_config(options))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="weights, ours or the original's")],
    images: Annotated[Path, typer.Option(help="folder of images")],
    annotations: Annotated[Path, typer.Option(help="COCO annotation file")],
    output: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images per batch and process")] = 2,
    num_workers: Workers = 2,
    device: Device = "auto",
    size: Size = None,
    max_size: MaxSize = None,
    dilation: Dilation = None,
    segments: Annotated[Path | None, typer.Option(help="folder of PNGs: measure panoptic quality")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="measure AP of masks instead of boxes")] = False,
    sharp_masks: SharpMasks = False,
) -> None:
    """Print a checkpoint's COCO AP, or its panoptic quality, on a data set.

    On several processes: torchrun --nproc-per-node N -m detr_fast eval ...
    """
    from detr_fast.checkpoint import load_checkpoint, prepare_output_folder
    from detr_fast.distributed import init_from_env, is_main
    from detr_fast.evaluate import evaluate_checkpoint
    from detr_fast.train import choose_device

    where = init_from_env(choose_device(device))
    if output is not None:
        prepare_output_folder(output.parent)
    trained = load_checkpoint(checkpoint)["args"]
    result = evaluate_checkpoint(
        checkpoint,
        images,
        annotations,
        batch_size=batch_size,
        num_workers=num_workers,
        device=where,
        size=size or max(trained.get("scales", [800])),
        max_size=max_size or trained.get("max_size", 1333),
        model_options=_model_options(dilation),
        segments=segments,
        masks=masks,
        sharp_masks=sharp_masks,
        output=output,
    )
    if is_main():
        print(result.table())


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(help="files, folders and glob patterns of images and videos")],
    checkpoint: Annotated[Path, typer.Option(help="weights, ours or the original's")],
    output: Annotated[Path, typer.Option(help="folder for pictures and predictions.json")] = Path("predictions"),
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="least score; by default 0.7, with --panoptic 0.85")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO file that gives the images' ids by file name")] = None,
    recursive: Annotated[bool, typer.Option(help="look into folders inside folders")] = False,
    attention: Annotated[bool, typer.Option(help="draw decoder and encoder attention too")] = False,
    point: Annotated[list[str] | None, typer.Option(help="X,Y in pixels: its self-attention in the encoder")] = None,
    panoptic: Annotated[
        bool, typer.Option("--panoptic", help="segments of things and stuff in place of boxes")
    ] = False,
    sharp_masks: SharpMasks = False,
    categories: Annotated[
        Path | None, typer.Option(help="COCO file that names the classes and says which are things, not the checkpoint")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="of videos: each so many-th frame")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="images per batch")] = 1,
    device: Device = "auto",
    size: Size = None,
    max_size: MaxSize = None,
    dilation: Dilation = None,
    optimized: Annotated[
        bool, typer.Option("--optimized/--not-optimized", help="run an optimised copy of the model")
    ] = True,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="run each size of batch as a CUDA graph (not tried on a GPU yet)")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or int8 (on a CPU: a ResNet's convolutions in 8-bit integers)")
    ] = "float32",
    calibration: Annotated[
        Path | None, typer.Option(help="images on which int8 finds its scales; by default the first 8 of IMAGES")
    ] = None,
) -> None:
    """Draw labelled boxes on images and write them in COCO's results format; exit code 1 where an image failed.

    With --panoptic the pictures show segments, and panoptic/ and panoptic.json are in COCO's panoptic format. A video
    gives an annotated .mp4 and a .jsonl with a line for each frame.
    """
    from detr_fast.optimize_options import optimize_options
    from detr_fast.predict import AttentionFigures
    from detr_fast.predict_video import predict_inputs
    from detr_fast.predictor import Predictor
    from detr_fast.train import choose_device

    figures = AttentionFigures(points_px=[_pair(text) for text in point]) if point else attention
    settings: dict[str, Any] = {
        name: value
        for name, value in (("size", size), ("max_size", max_size), ("threshold", threshold))
        if value is not None
    }
    if categories is not None:
        settings.update(_categories(categories))
    predictor = Predictor.from_checkpoint(
        checkpoint,
        model_options=_model_options(dilation),
        batch_size=batch_size,
        device=choose_device(device),
        optimized=optimize_options(
            optimized, cuda_graph=cuda_graph, device=choose_device(device), dtype=dtype, images=calibration or images
        ),
        sharp_masks=sharp_masks,
        **settings,
    )
    summaries = predict_inputs(
        images,
        predictor,
        output,
        recursive=recursive,
        every=every,
        panoptic=settings.get("threshold", 0.85) if panoptic else None,
        annotations=annotations,
        attention=figures,
    )
    for summary in summaries:
        print(summary.render(), file=sys.stdout if summary.ok else sys.stderr)
    if not all(summary.ok for summary in summaries):
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="weights, ours or the original's")],
    output: Annotated[Path | None, typer.Option(help="file to write; by default beside the checkpoint")] = None,
    format: Annotated[str, typer.Option(help="onnx, or torch-export (a .pt2 file)")] = "onnx",
    padding: Annotated[bool, typer.Option("--padding", help="take images of different sizes in one batch")] = False,
    opset: Annotated[int, typer.Option(help="version of ONNX's operators, 18 to 23")] = 18,
    dilation: Dilation = None,
) -> None:
    """Write a model for other runtimes, for any batch and size, and compare the file's answers with the model's.

    Input: images [B, 3, H, W], normalised; with --padding also sizes [B, 2], each image's height and width. Output:
    pred_logits, pred_boxes and, with a mask head, pred_masks. Categories and sizes are in the file's metadata.
    """
    from detr_fast.export import export_checkpoint

    options = _model_options(dilation)
    report = export_checkpoint(checkpoint, output, format=format, padding=padding, opset=opset, model_options=options)
    print(report.render())


@app.command()
def plot(
    output_dir: Annotated[Path, typer.Argument(help="output folder of a training run")],
    path: Annotated[Path | None, typer.Option("--output", help="picture to write")] = None,
) -> None:
    """Draw losses, AP and learning rate of a training run."""
    from detr_fast.plots import plot_log

    print(plot_log(output_dir, path))


@app.command("bench-report")
def bench_report(
    results: Annotated[list[Path] | None, typer.Argument(help="files; by default benchmarks/results/*.json")] = None,
    output: Annotated[Path, typer.Option(help="page to write")] = Path("report.html"),
    readme: Annotated[Path | None, typer.Option(help="write the tables between this file's markers anew")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="print two files of one machine side by side")] = False,
) -> None:
    """Turn results of the benchmarks into one HTML page, and fill the README's tables."""
    from detr_fast.bench import compare as comparison
    from detr_fast.bench import page, tables
    from detr_fast.bench.findings import read_findings
    from detr_fast.bench.results import read_all

    if compare:
        before, after = comparison.read_two(results or [])
        print(comparison.render(comparison.changes(before, after)))
        print("".join(f"{of.name}: {of.disturbance}\n" for of in (before, after) if of.disturbance), end="")
        return
    files = results or sorted(Path("benchmarks/results").glob("*.json"))
    found = read_all(files)
    if readme is not None:
        readme.write_text(tables.fill_tables(readme.read_text(), found))
    output.write_text(page.render(found, read_findings(files)))
    print(output)


@app.command("check-data")
def check_data(
    images: Annotated[Path, typer.Option(help="folder of images")],
    annotations: Annotated[Path, typer.Option(help="COCO annotation file")],
    num_queries: Annotated[int, typer.Option(min=1, help="object queries of the model to be trained")] = 100,
    as_json: AsJson = False,
) -> None:
    """Report what is wrong with a data set before the first epoch; exit code 1 where something is."""
    from detr_fast.data.check import check_dataset

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and (done % 100 == 0 or done == total):
            print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)

    report = check_dataset(images, annotations, num_queries=num_queries, progress=show)
    print(report.to_json() if as_json else report.render())
    if report.problems:
        raise typer.Exit(1)


def _model_options(dilation: bool | None) -> dict[str, Any]:
    return {} if dilation is None else {"dilation": dilation}


def _categories(path: Path) -> dict[str, dict[int, Any]]:
    """Names, and which are things, of a COCO file; one of instances does not say it, and has things alone."""
    from detr_fast.data.annotations import AnnotationError, load_json

    listed = load_json(path).get("categories")
    if not isinstance(listed, list) or not all(isinstance(c, dict) and {"id", "name"} <= c.keys() for c in listed):
        raise AnnotationError(f"{path}: 'categories' must be a list of entries with 'id' and 'name'")
    return {
        "categories": {int(category["id"]): str(category["name"]) for category in listed},
        "is_thing_map": {int(category["id"]): bool(category.get("isthing", True)) for category in listed},
    }


def _pair(text: str) -> tuple[float, float]:
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"point must be X,Y in pixels, such as 120,80, got {text!r}") from None
    return x, y


# ---- the options of `train` are the fields of TrainConfig, so each is named once, in config.py

GROUPS = {"model": ModelConfig, "loss": LossConfig, "optim": OptimConfig}
SPELLING = {"output_dir": "--output"}


def _train_options() -> Iterator[inspect.Parameter]:
    for config in (TrainConfig, *GROUPS.values()):
        panel = "Options" if config is TrainConfig else config.__name__.removesuffix("Config")
        types = get_type_hints(config)
        for field in fields(config):
            if not is_dataclass(types[field.name]):
                yield _parameter(field, str if field.name == "scales" else types[field.name], panel)


def _parameter(field: Field[Any], kind: Any, panel: str) -> inspect.Parameter:
    text = field.metadata["help"]
    names = [SPELLING[field.name]] if field.name in SPELLING else []
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if field.name == "scales":
        default, text = ",".join(str(size) for size in PAPER_SCALES), f"{text}; separated by commas"
    option = typer.Option(*names, help=text, rich_help_panel=panel)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _train_config(options: Mapping[str, Any]) -> TrainConfig:
    options = {**options, "scales": _scales(options["scales"])}
    groups = {
        name: config(**{field.name: options.pop(field.name) for field in fields(config)})
        for name, config in GROUPS.items()
    }
    return TrainConfig(**options, **groups)


def _scales(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"scales must be numbers separated by commas, such as 480,640,800, got {text!r}") from None


def _with_options(function: Callable[..., None], parameters: Iterator[inspect.Parameter]) -> Callable[..., None]:
    listed = list(parameters)
    function.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    return function


app.command()(_with_options(train, _train_options()))
