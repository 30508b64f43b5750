"""`device_sample.py`: text from a run's newest checkpoint, once or on and on, while it trains."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from processes import Ended
from runs import Run

import device_sample
from mesh_transformer import config
from mesh_transformer.checkpoints.native import Checkpoints
from mesh_transformer.data.tokenizer import Bytes
from mesh_transformer.pod.worker import Worker
from mesh_transformer.serving import text
from mesh_transformer.session import Sampling

N_NEW = 10
PROMPT = "def f"
DEFAULTS = Sampling(temperature=0.75, top_p=0.9, stop_ids=(Bytes.eot_id,))

pytestmark = pytest.mark.usefixtures("compiled_once")

Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one device, with checkpoints of fresh weights and of ones trained on ASCII noise."""
    folder = tmp_path_factory.mktemp("sample")
    path = folder / "run.json"
    sets = {"train_set": "absent.index", "val_batches": 0, "model_dir": str(folder / "run")}
    path.write_text(json.dumps(runs.KEYS | sets))
    host = Worker(config.load(path), jax.devices()[:1], Checkpoints(str(folder / "run")))
    letters = np.random.default_rng(0).integers(97, 123, (40, 1, 4, runs.SEQ + 1))
    for step, tokens_ABT1 in enumerate(letters, start=1):
        if step == 1:
            host.save(1, {"epoch": 0, "sample": 0})
        host.train(tokens_ABT1)
    host.save(40, {"epoch": 0, "sample": 160})
    host.close()
    return Run(path, folder / "run", folder / "compiled")


@pytest.fixture
def command(run: Run, capsys: pytest.CaptureFixture[str]) -> Command:
    """Sample in this process; from the run by its configuration if nothing else is said."""

    def sampled(*flags: str) -> Ended:
        chosen = ("--model" in flags or "--config" in flags) or ("--config", str(run.config))
        arguments = (*(chosen if isinstance(chosen, tuple) else ()), *flags)
        return runs.called(capsys, device_sample.main, "--max-new-tokens", str(N_NEW), *arguments)

    return sampled


def generated(run: Run, prompt: str, sampling: Sampling, step: int = 40, n_new: int = N_NEW) -> str:
    """What the library generates."""
    host = Worker(config.load(run.config), jax.devices()[:1])
    host.load_weights(str(run.root / "checkpoints" / f"step_{step}"))
    return Bytes().decode(host.generate([Bytes().encode(prompt)], sampling, n_new).tokens[0])


def test_a_prompt_is_printed_with_its_continuation_and_nothing_else(
    run: Run, command: Command
) -> None:
    ended = command("--prompt", PROMPT)
    assert ended == (0, f"{PROMPT}{generated(run, PROMPT, DEFAULTS)}\n", "")
    assert len(ended.output) > len(PROMPT) + 5


def test_the_command_in_the_help_fills_half_of_a_short_model(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = re.findall(r"^ +python device_sample\.py (.+)$", device_sample.__doc__ or "", re.M)
    flags = [str(run.config) if "/" in word else word for word in shlex.split(line)]
    prompt = flags[-1]
    half = generated(run, prompt, DEFAULTS, n_new=runs.SEQ // 2)
    assert runs.called(capsys, device_sample.main, *flags) == (0, f"{prompt}{half}\n", "")


def test_flags_say_how_tokens_are_drawn(run: Run, command: Command) -> None:
    flags = ("--temp", "1.2", "--top-k", "50", "--top-p", "0.8", "--seed", "7")
    sampling = Sampling(temperature=1.2, top_k=50, top_p=0.8, seed=7, stop_ids=(Bytes.eot_id,))
    assert command("--prompt", PROMPT, *flags).output == (
        f"{PROMPT}{generated(run, PROMPT, sampling)}\n"
    )


def test_greedy_text_does_not_depend_on_the_seed_and_other_text_does(command: Command) -> None:
    def texts(*flags: str) -> set[str]:
        return {command("--prompt", "x", *flags, "--seed", str(n)).output for n in range(4)}

    assert len(texts("--temp", "0")) == 1
    assert len(texts("--temp", "1")) > 1


def test_every_line_of_standard_input_is_a_prompt(
    run: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\nabc"))
    greedy = Sampling(temperature=0)
    first, _, last = command("--temp", "0").output.split("\n")[:3]
    assert first == PROMPT + generated(run, PROMPT, greedy)
    assert last == "abc" + generated(run, "abc", greedy)


def test_text_is_shown_as_it_comes(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", 2)
    shown: list[str] = []
    stream = Worker.stream

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        for piece in stream(*args, **options):
            shown.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr(Worker, "stream", watched)
    command("--prompt", PROMPT, "--temp", "0")
    assert shown[0] == PROMPT and [len(piece) for piece in shown[1:]] == [2] * (len(shown) - 1)
    assert len(shown) == N_NEW / 2


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/step_40"])
def test_a_folder_of_a_run_says_by_itself_what_model_it_is(
    run: Run, command: Command, path: str
) -> None:
    by_folder = command("--model", str(run.root / path), "--prompt", PROMPT)
    assert by_folder == command("--prompt", PROMPT)


def test_a_step_folder_means_that_step(run: Run, command: Command) -> None:
    ended = command("--model", str(run.root / "checkpoints" / "step_1"), "--prompt", PROMPT)
    assert ended.output == f"{PROMPT}{generated(run, PROMPT, DEFAULTS, step=1)}\n"
    assert ended.output != command("--prompt", PROMPT).output


def test_a_model_of_many_devices_is_read_on_those_there_are(
    run: Run, command: Command, tmp_path: Path
) -> None:
    """Also one that was trained on more: here 32 where there are 8, of which 4 hold it."""
    spread = run.but("spread", tmp_path, model_dir=str(run.root), tpu_size=32, cores_per_replica=4)
    assert command("--config", str(spread.config), "--prompt", PROMPT) == (
        command("--prompt", PROMPT)
    )


def test_what_training_is_writing_is_left_alone(run: Run, command: Command) -> None:
    unfinished = run.root / "checkpoints" / "step_50.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    (unfinished / "state" / "part").write_text("half")
    before = sorted(run.root.rglob("*"))
    assert command("--prompt", PROMPT).status == 0
    assert sorted(run.root.rglob("*")) == before
    (unfinished / "state" / "part").unlink()
    (unfinished / "state").rmdir()
    unfinished.rmdir()


def test_a_long_prompt_loses_its_beginning_with_a_warning(command: Command) -> None:
    ended = command("--prompt", "0123456789")
    assert ended.status == 0 and ended.output.startswith("0123456789")
    assert ended.told == "the prompt has 10 tokens; only its last 6 are used\n"


def test_ctrl_c_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[Any]:
        signal.raise_signal(signal.SIGINT)
        yield

    monkeypatch.setattr(Worker, "stream", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert command("--prompt", PROMPT) == (130, PROMPT, "\nStopped.\n")
    signal.signal(signal.SIGINT, before)


REFUSED = [
    (("--temp", "-1"), 2, "temperature is -1.0; it must be 0 (greedy) or more"),
    (("--temp", "nan"), 2, "temperature is nan; it must be 0 (greedy) or more"),
    (("--top-p", "0"), 2, "top_p is 0.0; it must be above 0 and at most 1 (off)"),
    (("--top-k", "-1"), 2, "top_k is -1; it must be 0 (off) or more"),
    (("--top-k", "-1", "--temp", "-2"), 2, "top_k is -1; it must be 0 (off) or more"),
    (("--seed", "-1"), 2, "seed is -1; it must be from 0 to 4294967295"),
    (("--max-new-tokens", "0"), 1, "error: 0 new tokens are asked for; the model has 16 pos"),
    (("--max-new-tokens", "16"), 1, "one of them for the prompt: ask for 1 to 15"),
    (("--model", "absent"), 1, "error: absent does not exist; needed is the folder (model_dir)"),
    (("--model", "{parent}"), 1, "error: {parent} holds no complete checkpoint; needed is"),
    (("--config", "{untrained}"), 1, "untrained does not exist; needed is the folder (model_dir)"),
    (("--config", "{other}"), 1, "step_40 is of another model; mend the configuration, or read "),
]


@pytest.mark.parametrize(("flags", "status", "told"), REFUSED)
def test_what_cannot_be_done_is_one_message(
    run: Run, command: Command, tmp_path: Path, flags: tuple[str, ...], status: int, told: str
) -> None:
    other = run.but("other", tmp_path, pe="none", model_dir=str(run.root))
    untrained = run.but("untrained", tmp_path)
    names = {"parent": run.root.parent, "untrained": untrained.config, "other": other.config}
    ended = command(*(flag.format(**names) for flag in flags), "--prompt", PROMPT)
    assert ended.status == status and "Traceback" not in ended.told and ended.output == ""
    assert ended.told.count("error: ") == 1 and told.format(**names) in ended.told
