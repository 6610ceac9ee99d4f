"""The command line: every command from its arguments to its exit code, and mistakes as one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training_data import NAMES, config, write_coco

from detr_fast import cli
from detr_fast.checkpoint import load_checkpoint
from detr_fast.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from detr_fast.fit import Interrupted
from detr_fast.train import train

SMALL = "--backbone tiny --hidden-dim 16 --nheads 2 --enc-layers 1 --dec-layers 2 --dim-feedforward 16 --num-queries 5"
SMALL += " --scales 32,48 --max-size 64 --num-workers 0 --device cpu"
COMMANDS = ("info", "demo", "train", "eval", "predict", "export", "plot", "check-data")


@dataclass
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command in this process."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["detr-fast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/, val/ and out/, a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    train(config(folder, optim={"epochs": 1}))
    return folder


def train_arguments(folder: Path) -> list[str]:
    for name, count in (("train", 6), ("val", 4)):
        if not (folder / name).exists():
            write_coco(folder / name, count)
    arguments = ["train", *SMALL.split(), "--output", str(folder / "out")]
    for split in ("train", "val"):
        arguments += [f"--{split}-images", str(folder / split)]
        arguments += [f"--{split}-annotations", str(folder / split / "instances.json")]
    return arguments


def plain(text: str) -> str:
    """Without colours and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text))


def test_help_lists_the_commands(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    for command in COMMANDS:
        assert command in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0
    assert len(plain(ended.out)) > 100


def test_train_has_every_option_of_the_configuration(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run("train", "--help").out
    for kind in (TrainConfig, ModelConfig, LossConfig, OptimConfig):
        for name in kind.__dataclass_fields__:
            if name not in ("model", "loss", "optim"):
                option = {"output_dir": "--output"}.get(name, "--" + name.replace("_", "-"))
                assert f"{option} " in text, name


def test_train_passes_its_options_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr("detr_fast.train.train", seen.append)
    extra = [
        "--lr",
        "0.5",
        "--amp",
        "--no-aux-loss",
        "--eos-coef",
        "0.2",
        "--pretrained",
        "c.pth",
        "--reset-class-head",
        "--batch-size",
        "3",
    ]
    assert run(*train_arguments(tmp_path), *extra).code == 0
    [options] = seen
    assert options.optim == OptimConfig(lr=0.5, amp=True)
    assert options.loss == LossConfig(eos_coef=0.2)
    assert (options.model.hidden_dim, options.model.aux_loss) == (16, False)
    assert (options.pretrained, options.reset_class_head, options.batch_size) == (Path("c.pth"), True, 3)
    assert (options.scales, options.output_dir) == ((32, 48), tmp_path / "out")


def test_defaults_are_the_papers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr("detr_fast.train.train", seen.append)
    arguments = train_arguments(tmp_path)
    run("train", *arguments[arguments.index("--output") :])
    assert seen[0].model == ModelConfig()
    assert seen[0].optim == OptimConfig()
    args = seen[0].to_args()
    expected = {"lr": 1e-4, "lr_backbone": 1e-5, "weight_decay": 1e-4, "epochs": 300, "lr_drop": 200, "dropout": 0.1}
    expected |= {"clip_max_norm": 0.1, "aux_loss": True, "num_queries": 100, "backbone": "resnet50", "batch_size": 2}
    assert {name: args[name] for name in expected} == expected
    assert args["scales"] == list(range(480, 801, 32))
    assert json.loads(json.dumps(args)) == args


def test_train_eval_plot(run: Run, tmp_path: Path) -> None:
    ended = run(*train_arguments(tmp_path), "--epochs", 2)
    assert ended.code == 0
    assert [line.split("  ")[0] for line in ended.out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    checkpoint = tmp_path / "out" / "checkpoint.pth"
    assert load_checkpoint(checkpoint)["categories"] == NAMES

    data = ["--images", tmp_path / "val", "--annotations", tmp_path / "val" / "instances.json"]
    result = tmp_path / "results" / "result.json"
    ended = run("eval", "--checkpoint", checkpoint, *data, "--num-workers", 0, "--device", "cpu", "--output", result)
    assert ended.code == 0
    for part in ("AP50", *NAMES.values()):
        assert part in ended.out
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    found = json.loads(result.read_text())
    assert found["stats"]["AP"] == pytest.approx(last["coco_bbox"]["AP"], abs=1e-6)

    ended = run("plot", tmp_path / "out")
    assert ended.code == 0
    assert Path(ended.out.strip()).stat().st_size > 1000


def test_predict(run: Run, trained: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", trained / "out" / "checkpoint.pth", "--device", "cpu", "--threshold", 0]
    ended = run("predict", trained / "val", *arguments, "--output", tmp_path / "p")
    assert ended.code == 0
    assert "4 images" in ended.out
    assert len(json.loads((tmp_path / "p" / "predictions.json").read_text())) > 0

    (tmp_path / "broken.png").write_bytes(b"not an image")
    one = trained / "val" / "0.png"
    ended = run("predict", one, tmp_path / "broken.png", *arguments, "--output", tmp_path / "q", "--point", "10,12")
    assert ended.code == 1
    assert "in 1 images" in ended.err
    assert re.search(r"failed: .*broken\.png: ", ended.err)
    assert list((tmp_path / "q").glob("*attention*"))


def test_predict_by_cuda_graphs(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["predict", trained / "val", "--checkpoint", trained / "out" / "checkpoint.pth", "--cuda-graph"]
    ended = run(*arguments, "--device", "cpu")
    assert ended.code != 0 and "cuda-graph needs a CUDA device, got cpu" in ended.err
    ended = run(*arguments, "--not-optimized")
    assert ended.code != 0 and "cuda-graph must be used without not-optimized" in ended.err

    asked: dict[str, object] = {}
    monkeypatch.setattr("detr_fast.train.choose_device", lambda name: "cuda")
    monkeypatch.setattr(
        "detr_fast.predictor.Predictor.from_checkpoint", lambda path, **settings: asked.update(settings)
    )
    monkeypatch.setattr("detr_fast.predict_video.predict_inputs", lambda *arguments, **settings: [])
    assert run(*arguments).code == 0
    assert asked["optimized"] == {"cuda_graph": True} and asked["device"] == "cuda"


def test_predict_in_fewer_bits(run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    arguments = ["predict", tmp_path / "broken.png", "--checkpoint", trained / "out" / "checkpoint.pth", "--device"]
    arguments += ["cpu", "--dtype"]
    for dtype, message in {
        "int4": "dtype must be one of float32, bfloat16, int8, got 'int4'",
        "int8": "calibration must name images that can be read for dtype int8, got none",
    }.items():
        ended = run(*arguments, dtype)
        assert ended.code != 0 and message in plain(ended.err)
    ended = run(*arguments, "bfloat16", "--not-optimized")
    assert ended.code != 0 and "dtype must be float32 with not-optimized" in plain(ended.err)

    asked: dict[str, dict[str, object]] = {}
    monkeypatch.setattr(
        "detr_fast.predictor.Predictor.from_checkpoint", lambda path, **settings: asked.update(settings)
    )
    monkeypatch.setattr("detr_fast.predict_video.predict_inputs", lambda *arguments, **settings: [])
    assert run(*arguments, "bfloat16").code == 0 and asked["optimized"] == {"dtype": torch.bfloat16}
    assert run(*arguments, "int8", "--calibration", trained / "val").code == 0
    assert asked["optimized"]["dtype"] is torch.int8
    assert len(asked["optimized"]["calibration"]) == 4


def test_predict_on_a_video(run: Run, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs PyAV, which the test extra installs")
    from test_video import make_video

    video, out = make_video(tmp_path / "a.mp4", 10), tmp_path / "out"
    (tmp_path / "b.mp4").write_bytes(b"not a video")
    arguments = ["--checkpoint", trained / "out" / "checkpoint.pth", "--device", "cpu", "--output", out, "--every", 2]
    ended = run("predict", trained / "val", video, tmp_path / "b.mp4", *arguments)
    assert ended.code == 1
    assert "in 4 images" in ended.out and "in 5 frames" in ended.out
    assert re.search(r"failed: .*b\.mp4: .*Invalid data", ended.err)
    assert len((out / "a.jsonl").read_text().splitlines()) == 5 and not list(out.glob("*b.mp4*"))


def test_what_a_checkpoint_does_not_say_can_be_said(run: Run, trained: Path, tmp_path: Path) -> None:
    # A backbone without a dilated form shows that the option arrives.
    checkpoint = ["--checkpoint", trained / "out" / "checkpoint.pth", "--dilation"]
    refusal = "the backbone 'tiny' has no dilation"
    assert_one_line(run("predict", trained / "val", *checkpoint, "--output", tmp_path), refusal)
    data = ["--images", trained / "val", "--annotations", trained / "val" / "instances.json"]
    assert_one_line(run("eval", *data, *checkpoint), refusal)


def test_info(run: Run) -> None:
    assert "torch" in run("info").out
    assert json.loads(run("info", "--json").out)["versions"]["torch"] == torch.__version__


def test_check_data(run: Run, trained: Path, tmp_path: Path) -> None:
    ended = run("check-data", "--images", trained / "val", "--annotations", trained / "val" / "instances.json")
    assert ended.out
    images, annotations = write_coco(tmp_path / "broken", 3)
    (images / "1.png").unlink()
    ended = run("check-data", "--images", images, "--annotations", annotations, "--json")
    assert ended.code == 1
    json.loads(ended.out)
    assert "1.png" in ended.out


def test_demo_passes_its_options_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = pytest.importorskip("detr_fast.demo", reason="the demo needs scikit-learn", exc_type=ImportError)
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: seen.append(options))
    assert run("demo", "--minutes", 0.5, "--output", tmp_path / "d").code == 0
    assert seen == [{"minutes": 0.5, "output": tmp_path / "d", "seed": 0, "device": "auto", "masks": False}]


def test_demo_without_scikit_learn_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    pytest.importorskip("detr_fast.data.digits")._digits.cache_clear()
    assert_one_line(run("demo", "--output", tmp_path / "d"), "pip install scikit-learn")


# ---- mistakes


def assert_one_line(ended: Ended, pattern: str) -> None:
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert re.match(f"error: .*{pattern}", ended.err), ended.err


def test_mistakes_in_training(run: Run, trained: Path, tmp_path: Path) -> None:
    arguments = train_arguments(tmp_path)
    assert_one_line(run(*arguments, "--lr", "-1"), "lr must be 0 or more, got -1.0")
    assert_one_line(run(*arguments, "--scales", "big"), "scales must be numbers separated by commas.* got 'big'")
    assert_one_line(run(*arguments, "--pretrained", tmp_path / "none.pth"), r"none\.pth does not exist")
    assert_one_line(run(*arguments, "--train-annotations", tmp_path / "none.json"), r"none\.json")
    assert_one_line(run(*arguments, "--train-images", tmp_path / "none"), r"none.*does not exist")
    assert_one_line(run(*arguments, "--output", "/proc/out"), "output folder /proc/out cannot be written")
    assert_one_line(run(*train_arguments(trained)), r"checkpoint\.pth exists: continue that run with --resume")
    ended = run("train", "--output", tmp_path)
    assert ended.code == 2
    assert "Missing option '--train-images'" in plain(ended.err)


def test_mistakes_elsewhere(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    data = ["--images", trained / "val", "--annotations", trained / "val" / "instances.json"]
    assert_one_line(run("eval", "--checkpoint", tmp_path / "text.pth", *data), r"text\.pth is not a checkpoint")
    assert_one_line(run("plot", tmp_path), r"log\.jsonl does not exist")
    checkpoint = ["--checkpoint", trained / "out" / "checkpoint.pth"]
    assert_one_line(run("predict", tmp_path / "*.png", *checkpoint), r"matches no file")
    image = trained / "val" / "0.png"
    assert_one_line(run("predict", image, *checkpoint, "--point", "7", "--output", tmp_path), "point must be X,Y .*'7'")


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["detr-fast", "--traceback", "plot", str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise TypeError("ours")

    monkeypatch.setattr("detr_fast.plots.plot_log", broken)
    monkeypatch.setattr(sys, "argv", ["detr-fast", "plot", str(tmp_path)])
    with pytest.raises(TypeError, match="ours"):
        cli.main()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_code_of_a_signal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, code: int
) -> None:
    def interrupted(_: TrainConfig) -> None:
        raise Interrupted(signum)

    monkeypatch.setattr("detr_fast.train.train", interrupted)
    assert run(*train_arguments(tmp_path)).code == code


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With worker processes, which get the signal too, as on a terminal."""
    arguments = [*train_arguments(tmp_path), "--epochs", "100000", "--num-workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "detr_fast", *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "out" / "log.jsonl"
    for _ in range(600):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: saved" in out
    assert err == ""
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth")["epoch"] >= 0
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint.pth", "checkpoint_best.pth", "log.jsonl"]
