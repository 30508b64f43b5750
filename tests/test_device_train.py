"""`device_train.py` from its arguments to its status: what it begins with, refuses and says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from processes import Ended, ended
from runs import Run

import device_train
from mesh_transformer.pod.worker import Worker

# All eight devices of the tests, as one process has but one set of them.
KEYS = {
    "tpu_size": 8,
    "cores_per_replica": 4,
    "val_batches": 1,
    "total_steps": 10,
    "anneal_steps": 7,
}


pytestmark = pytest.mark.usefixtures("compiled_once")

Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also where these tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Train in this process."""

    def trained(run: Run, *flags: str) -> Ended:
        arguments = ("--config", str(run.config), *flags)
        go_on = device_train.GO_ON
        return runs.called(capsys, device_train.main, *arguments, when_interrupted=go_on)

    return trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has ended; leave it as it is."""
    run = runs.make(tmp_path_factory.mktemp("trained"), **KEYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["device_train.py", "--config", str(run.config)])
        assert device_train.main() == 0
    return run


@pytest.fixture
def copy(trained: Run, tmp_path: Path) -> Run:
    """A copy of the run that has ended."""
    shutil.copytree(trained.root, tmp_path / "copy")
    return trained.but("copy", tmp_path)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Let a signal come while a process takes its n-th step."""
    taken = iter(range(1, 1000))
    train = Worker.train

    def signalled(self: Worker, *args: Any) -> Any:
        if next(taken) == step:
            os.kill(os.getpid(), number)
        return train(self, *args)

    monkeypatch.setattr(Worker, "train", signalled)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# From the first step to the last


def test_a_run_says_what_it_trains_on_what_and_what_to_do_with_it(
    trained: Run, tmp_path: Path, command: Command
) -> None:
    run = trained.but("run", tmp_path)
    ended = command(run)
    assert ended.status == 0
    assert ended.told.splitlines(keepends=True)[0] == (
        "tiny: 11,944 parameters, 64 tokens a step, on 8 cpu device(s) of unknown peak, so without "
        f"MFU: 2 replica(s) of 4, ZeRO stage 1; writing to {run.root}\n"
    )
    first, *_, last = (line for line in ended.output.splitlines() if line.startswith("step"))
    assert first.startswith("step 1/10  loss 5.")
    assert last.startswith("step 10  v: loss ") and last.endswith(" bits/byte")
    assert ended.output.splitlines()[-3:] == [
        f"Trained to step 10. Checkpoints and metrics.jsonl are in {run.root}",
        f"  to see the loss:  {sys.executable} -m mesh_transformer.plot {run.root}",
        f"  to sample text:   {sys.executable} device_sample.py --config {run.config}",
    ]
    assert run.steps() == [5, 10]
    assert run.log() == trained.log()


def test_the_same_command_again_changes_nothing(copy: Run, command: Command) -> None:
    before = contents(copy.root)
    ended = command(copy)
    assert ended.status == 0 and "nothing to do: total_steps is 10\n" in ended.told
    assert contents(copy.root) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(
    trained: Run,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    run = trained.but("run", tmp_path)
    stop_at(monkeypatch, 3, number)
    ended = command(run)
    assert ended.status == status
    assert f"{number.name}: stopping once a checkpoint is saved; again stops" in ended.told
    assert ended.output.splitlines()[-1] == (
        "Stopped at step 3, which is saved. To go on from the newest checkpoint, run the same "
        "command again (without --new)."
    )
    assert run.steps() == [3] and len(run.log()) == 3
    ended = command(run)
    assert ended.status == 0 and "going on from the checkpoint of step 3\n" in ended.told
    assert run.log() == trained.log()
    for ours, theirs in zip(run.arrays(10), trained.arrays(10), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_run_goes_on_with_another_schedule_or_length(copy: Run, command: Command) -> None:
    longer = copy.but("copy", copy.root.parent, total_steps=12, end_lr=2e-3)
    ended = command(longer)
    assert ended.status == 0
    told = "changed since that checkpoint: end_lr 0.001 -> 0.002, model_dir "
    assert told in ended.told and ", total_steps 10 -> 12\n" in ended.told
    assert [line["step"] for line in longer.log() if "train/loss" in line] == list(range(1, 13))


def test_ctrl_c_before_training_is_one_line(trained: Run, tmp_path: Path) -> None:
    """The configuration is a pipe: once it can be opened for writing, the script is reading it."""
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    process = trained.start("device_train.py", "--config", str(pipe))
    with open(pipe, "w"):
        process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", f"\nStopped. {device_train.GO_ON}\n")


def test_ctrl_c_while_data_is_opened_is_one_line(
    trained: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("mesh_transformer.training.loop.Data", interrupted)
    ended = command(trained)
    assert ended == (130, "", f"\nStopped. {device_train.GO_ON}\n")


def test_mistakes_in_arguments_are_told_before_jax_is_imported() -> None:
    program = "import sys, device_train; sys.exit('jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


# Starting over


def test_new_gives_up_checkpoints_and_metrics_and_nothing_else(
    trained: Run, copy: Run, command: Command
) -> None:
    (copy.root / "notes.txt").write_text("mine")
    (copy.root / "checkpoints" / "notes.txt").write_text("mine too")
    with open(copy.root / "metrics.jsonl", "a") as log:
        log.write('{"step": 11, "train/loss": 0.1}\n')
    shorter = copy.but("copy", copy.root.parent, total_steps=9, ckpt_every=3, keep_every=3)
    assert command(shorter, "--new").status == 0
    (copy.root / "checkpoints" / "notes.txt").unlink()
    assert shorter.steps() == [3, 6, 9]
    assert (copy.root / "notes.txt").read_text() == "mine"
    kept = [line for line in trained.log() if line["step"] < 9 or "val/loss_v" not in line]
    assert [line for line in shorter.log() if "val/loss_v" not in line] == [
        line for line in kept if "val/loss_v" not in line and line["step"] < 10
    ]


@pytest.mark.parametrize(
    ("keys", "flags", "told"),
    [
        ({"train_set": "absent.index"}, (), "index file absent.index: no such file"),
        ({}, ("--tune-model-path", "absent"), "absent does not exist; needed is the folder"),
        ({}, ("--tune-model-path", "{root}"), "a checkpoint of this very run"),
        ({"tpu_size": 4}, (), "tpu_size is 4, but JAX sees 8 device(s) here"),
    ],
)
def test_nothing_is_given_up_for_a_new_run_that_cannot_begin(
    copy: Run, command: Command, keys: dict[str, Any], flags: tuple[str, ...], told: str
) -> None:
    before = contents(copy.root)
    run = copy.but("copy", copy.root.parent, **keys)
    ended = command(run, "--new", *(flag.format(root=copy.root) for flag in flags))
    assert ended.status == 1 and ended.told.splitlines()[-1].startswith("error: ")
    assert told in ended.told
    assert contents(copy.root) == before


# Tuning


def test_tuning_begins_at_step_0_where_the_other_run_ended_and_the_same_command_resumes_it(
    trained: Run, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--tune-model-path", str(trained.root))
    run = trained.but("tuned", tmp_path)
    stop_at(monkeypatch, 3, signal.SIGTERM)
    ended = command(run, *flags)
    source = trained.root / "checkpoints" / "step_10"
    assert ended.status == 143 and f"tuning the weights of {source}\n" in ended.told
    ended = command(run, *flags)
    assert ended.status == 0 and "going on from the checkpoint of step 3\n" in ended.told
    assert "tuning the weights" not in ended.told
    told = f"{run.root} goes on as it is; --new starts over from --tune-model-path\n"
    assert ended.told.count(told) == 1
    whole = trained.but("whole", tmp_path)
    assert command(whole, *flags).status == 0
    assert run.log() == whole.log()
    rates = [line["train/learning_rate"] for line in run.log() if "train/loss" in line]
    assert rates == [line["train/learning_rate"] for line in trained.log() if "train/loss" in line]
    assert run.log()[0]["train/loss"] < trained.log()[0]["train/loss"] - 1


def test_fresh_opt_leaves_the_moments_behind(
    trained: Run, tmp_path: Path, command: Command
) -> None:
    path = ("--tune-model-path", str(trained.root / "checkpoints" / "step_10"))
    kept, fresh = (trained.but(name, tmp_path) for name in ("kept", "fresh"))
    assert command(kept, *path).status == command(fresh, *path, "--fresh-opt").status == 0
    # The learning rate of step 1 is 0, so that step 2 still sees the same weights, and step 3 the
    # first that the moments have moved.
    losses = [
        [line["train/loss"] for line in run.log() if "train/loss" in line] for run in (kept, fresh)
    ]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]


# What is refused


def half_written(run: Run) -> Path:
    folder = run.root / "checkpoints" / "step_10"
    (folder / "commit_success.txt").unlink()
    return folder


REFUSED: list[tuple[dict[str, Any], Callable[[Run], list[str]], list[str]]] = [
    (
        {"layers": 2, "n_heads": 8},
        lambda run: [],
        [
            "error: the checkpoint of step 10 in {root} is of another model; mend the "
            "configuration, or read another:",
            "  - layers is 1 there, 2 in the configuration",
            "  - n_heads is 4 there, 8 in the configuration",
            "  - pe_rotary_dims is 4 there, 2 in the configuration",
            "  - d_head is 4 there, 2 in the configuration",
            "  - n_kv_heads is 4 there, 8 in the configuration",
            f"  - attention_scale is 0.5 there, {2**-0.5} in the configuration",
        ],
    ),
    (
        {"model_dir": "{root}-tuned", "d_ff": 128},
        lambda run: ["--tune-model-path", str(run.root)],
        [
            "error: {root}/checkpoints/step_10 is of another model; mend the configuration, or "
            "read another:",
            "  - d_ff is 64 there, 128 in the configuration",
        ],
    ),
    (
        {"model_dir": "{root}-tuned"},
        lambda run: ["--tune-model-path", str(half_written(run))],
        [
            "error: {root}/checkpoints/step_10 holds no complete checkpoint; needed is the folder "
            "(model_dir) of a run that has saved one, a step folder in it, a step folder of "
            "mesh-transformer-jax (with shard_0 or params in it), a Hugging Face folder (with "
            "config.json and weights), or a file of another program's (.gguf, .msgpack, .pth, .mdl)"
        ],
    ),
    (
        {"layers": 0, "lr": -1, "total_step": 3},
        lambda run: [],
        [
            "error: {config}: 3 problem(s)",
            "  - unknown key 'total_step'; did you mean 'total_steps'?",
            "  - layers: expected 1 or more, got 0",
            "  - lr: expected a number above 0, got -1.0",
        ],
    ),
    (
        {"model_dir": "{config}"},
        lambda run: [],
        ["error: [Errno 20] Not a directory: '{config}/checkpoints'"],
    ),
]


@pytest.mark.parametrize(("keys", "flags", "told"), REFUSED)
def test_what_cannot_be_done_is_one_message_and_status_1(
    copy: Run,
    command: Command,
    keys: dict[str, Any],
    flags: Callable[[Run], list[str]],
    told: list[str],
) -> None:
    def named(text: Any) -> Any:
        names = {"root": copy.root, "config": copy.config}
        return text.format(**names) if isinstance(text, str) else text

    run = copy.but("copy", copy.root.parent, **{key: named(value) for key, value in keys.items()})
    ended = command(run, *flags(copy))
    assert ended.status == 1 and "Traceback" not in ended.told and ended.output == ""
    assert ended.told.splitlines()[-len(told) :] == [named(line) for line in told]


def test_tasks_that_nothing_can_run_are_told_before_any_device_is_touched(
    copy: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_transformer.pod.devices.host_devices", lambda config: 1 / 0)
    before = contents(copy.root)
    asking = copy.but("copy", copy.root.parent, eval_harness_tasks=["lambada", "piqa"])
    told = (
        "error: eval_harness_tasks asks for lambada, piqa after each validation, but "
        "mesh_transformer has no evaluation harness yet: to train without these "
        'tasks, give --config a copy of the file in which "eval_harness_tasks" is [] or left out\n'
    )
    assert command(asking, "--new") == (1, "", told)
    assert contents(copy.root) == before


def test_fresh_opt_alone_is_refused(trained: Run, command: Command) -> None:
    ended = command(trained, "--fresh-opt")
    assert ended.status == 2
    assert "--fresh-opt says what to leave of --tune-model-path, which is not given" in ended.told
