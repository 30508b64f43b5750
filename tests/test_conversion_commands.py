"""The commands that convert and sample checkpoints: what they write, say and end with."""

from __future__ import annotations

import io
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import memory_source
import numpy as np
import original
import original_steps
import processes
import pytest
import runs
from processes import Ended
from runs import Run

import device_sample
import resharding_example
import slim_model
import to_hf_weights
from mesh_transformer import config
from mesh_transformer.checkpoints import conversion, opening
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.foreign import FOREIGN
from mesh_transformer.checkpoints.native import Checkpoints
from mesh_transformer.checkpoints.source import PARAMS, Source
from mesh_transformer.pod.worker import Worker

pytestmark = pytest.mark.usefixtures("compiled_once")

Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with one checkpoint, of step 20; beside it the same as the original writes it."""
    folder = tmp_path_factory.mktemp("commands")
    path = folder / "run.json"
    keys = {"train_set": "absent.index", "val_batches": 0, "model_dir": str(folder / "run")}
    path.write_text(json.dumps(runs.KEYS | keys | {"cores_per_replica": 2, "tpu_size": 2}))
    made = config.load(path)
    source = memory_source.of_model(made.model, moments=True)
    source.step = 20
    for target, format in ((folder / "run", "native"), (folder / "theirs" / "step_20", "original")):
        what = Conversion(format=format, n_shards=2)  # type: ignore[arg-type]
        conversion.convert(source, made, str(target), what, position={"epoch": 0, "sample": 0})
    return Run(path, folder / "run", folder / "compiled")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def ran(script: Any, *flags: object) -> Ended:
        return runs.called(capsys, script.main, *map(str, flags))

    return ran


def opened(folder: Path, model: Any = None) -> Source:
    return opening.open_source(opening.find(str(folder)), model)


def assert_same(found: Source, wanted: Source, dtype: str = "float32") -> None:
    """Compare weights, but for an embedding's bias, which Hugging Face's tables have in them."""
    for key in wanted.arrays:
        if key.kind == PARAMS and "decoder/embed/" not in key.path:
            np.testing.assert_array_equal(
                found.read(key), wanted.read(key).astype(conversion.DTYPES[dtype])
            )


@pytest.mark.thorough
def test_a_run_is_resharded_verified_and_says_so(
    run: Run, tmp_path: Path, command: Command
) -> None:
    target = tmp_path / "step_20"
    flags = ("--input", run.root, "--output", target, "--shards", 4, "--verify")
    ended = command(resharding_example, *flags)
    folder = run.root / "checkpoints" / "step_20"
    assert ended.status == 0 and ended.output == ""
    lines = ended.told.splitlines()
    assert lines[0] == f"{folder}: native checkpoint of step 20, float32, with moments"
    assert lines[1].startswith("Verifying: done in ") and lines[2] == f"whole: {folder}"
    assert lines[3].startswith("Converting: done in ") and lines[4:] == [f"written: {target}"]
    found = opened(target, config.load(run.config).model)
    assert found.about.startswith("checkpoint of mesh-transformer-jax, 4 shard(s), float32, with ")
    for key in opened(run.root).arrays:
        np.testing.assert_array_equal(found.read(key), opened(run.root).read(key))
    again = command(resharding_example, *flags[:-1])
    told = f"error: {target} is there already: delete it or name another, or give --overwrite"
    assert again.status == 1 and again.told.splitlines()[-1] == told
    ended = command(
        resharding_example, *flags[:-1], "--overwrite", "--format", "slim", "--dtype", "float16"
    )
    assert ended.status == 0
    assert "the optimizer state is left out: slim holds weights alone\n" in ended.told
    assert_same(opened(target, config.load(run.config).model), opened(run.root), "float16")


def test_a_folder_of_the_original_becomes_a_run_and_hf_refuses_its_norm(
    tmp_path: Path, command: Command
) -> None:
    step = original_steps.find("E_scalenorm", "full")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(step.config.to_flat()))
    flags = ("--input", step.folder, "--output", tmp_path / "run", "--format", "native")
    ended = command(resharding_example, *flags)
    told = "hold no configuration: give --config"
    assert ended.status == 1 and told in ended.told and not (tmp_path / "run").exists()
    ended = command(resharding_example, *flags, "--config", path, "--verify")
    assert ended.status == 0
    told = f"to train on from step 20, set model_dir to {tmp_path / 'run'}; the data begins anew"
    assert told in ended.told
    found, wanted = opened(tmp_path / "run"), opened(step.folder, step.config.model)
    assert (found.step, found.counts) == (wanted.step, wanted.counts) and found.counts
    for key in wanted.arrays:
        np.testing.assert_array_equal(found.read(key), wanted.read(key))
    names = ("--input-ckpt", step.folder, "--config", path, "--output-path", tmp_path / "hf")
    ended = command(to_hf_weights, *names)
    assert ended.status == 1 and ended.told.count("error: ") == 1
    assert "norm" in ended.told and "Traceback" not in ended.told
    assert not list(tmp_path.glob("hf*"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "E_scalenorm",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in original.CONTINUED
            if name != "E_scalenorm"
        ),
    ],
)
def test_a_run_of_the_original_goes_on_here_as_it_would_have_gone_there(
    tmp_path: Path, command: Command, name: str
) -> None:
    """Five steps' losses and norms within 1e-4, relative; one copy of what were two: 1e-3."""
    step, theirs = original_steps.find(name, "full"), original.continued(name)
    assert theirs is not None
    path, root = tmp_path / "config.json", tmp_path / "run"
    keys = step.config.to_flat() | {"model_dir": str(root), "cores_per_replica": 1, "tpu_size": 1}
    path.write_text(json.dumps(keys | {"original_shards": step.n_shards}))
    flags = ("--config", path, "--input", step.folder, "--output", root, "--format", "native")
    assert command(resharding_example, *flags).status == 0
    with Checkpoints(str(root)) as checkpoints:
        worker = Worker(config.load(path), jax.devices()[:1], checkpoints)
        restored = worker.restore()
        assert restored is not None and restored.step == 20
        n_microbatches = step.config.batch.gradient_accumulation_steps
        seen = []
        for batch in theirs.arrays["later_tokens"].astype(np.int32):
            told = worker.train(batch)  # the original's norm is of the sum over microbatches
            norm = told["grad_norm"] * n_microbatches
            seen.append([float(told["loss"]), float(told["last_loss"]), float(norm)])
    np.testing.assert_allclose(seen, theirs.arrays["later_metrics"][:, :3], rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["run", "theirs"])
def test_slim_model_takes_the_flags_of_the_original(
    run: Run, tmp_path: Path, command: Command, name: str
) -> None:
    root = run.root.parent / name
    other = run.but("other", tmp_path, model_dir=str(root))
    for flags, ending, dtype in (((), "slim", "bfloat16"), (("--f16",), "slim_f16", "float16")):
        target = root.with_name(f"{root.name}_{ending}") / "step_20"
        asked = ("--config", other.config, "--ckpt-step", -1, *flags)
        ended = command(slim_model, *asked)
        assert ended.status == 0 and ended.output == ""
        assert ended.told.endswith(f"written: {target}\n")
        found = opened(target, config.load(run.config).model)
        assert found.about.startswith(f"checkpoint of mesh-transformer-jax, 2 shard(s), {dtype}, ")
        assert_same(found, opened(run.root), dtype)
        again = command(slim_model, *asked)
        told = f"error: {target} is there already: delete it or name another, or give --overwrite"
        assert again.status == 1 and again.told.splitlines()[-1] == told
        assert command(slim_model, *asked, "--overwrite").status == 0
    absent = command(slim_model, "--config", other.config, "--ckpt-step", 3)
    assert absent.status == 1 and "step_3 does not exist; needed is" in absent.told


@pytest.mark.thorough
def test_to_hf_weights_takes_the_flags_of_the_original(
    run: Run, tmp_path: Path, command: Command
) -> None:
    theirs = run.root.parent / "theirs" / "step_20"
    for folder, flags, dtype in (
        (theirs, ("--cpu", "--debug"), "float16"),
        (theirs, ("--dtype", "fp32"), "float32"),
        (run.root, ("--dtype", "bf16"), "bfloat16"),
    ):
        target = tmp_path / dtype
        names = ("--input-ckpt", folder, "--config", run.config, "--output-path", target)
        ended = command(to_hf_weights, *names, *flags)
        assert (ended.status, ended.output) == (0, "")
        assert ended.told.endswith(f"written: {target}\n")
        assert (target / "tokenizer.json").exists()
        assert_same(opened(target), opened(run.root), dtype)
    refused = command(to_hf_weights, *names, "--dtype", "fp8")
    assert refused.status == 2 and "invalid choice: 'fp8'" in refused.told


def test_the_command_offers_the_formats_that_there_are(command: Command) -> None:
    """It has a list of its own, since the library takes seconds to load."""
    ended = command(resharding_example, "--input", "x", "--format", "absent")
    offered = re.findall(r"[\w-]+", ended.told.rpartition("choose from")[2])
    formats = typing.get_args(conversion.Format)
    assert ended.status == 2 and tuple(offered) == formats
    assert set(formats) == {"native", "original", "slim", "hf", *FOREIGN}


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (("--input", "absent", "--verify"), 1, "error: absent does not exist; needed is"),
        (("--input", "{root}"), 2, "say what to do: --output PATH, --verify or --prompt TEXT"),
        (("--input", "{root}", "--output", "x", "--shards", "3"), 1, "3 shards do not divide n_"),
        (
            ("--input", "{root}", "--output", "x", "--shards", "0"),
            1,
            "0 shards are asked for; needed is",
        ),
        (("--input", "{root}", "--output", "x", "--file-gb", "0"), 1, "files of 0 GB are asked"),
        (("--input", "{root}", "--output", "x", "--n-vocab", "-8"), 1, "n_vocab"),
        (("--input", "{root}", "--output", "{file}/x"), 1, "name a folder in which you may write"),
    ],
)
def test_what_cannot_be_converted_is_one_message(
    run: Run,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    status: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"root": run.root, "file": run.config}
    ended = command(resharding_example, *(flag.format(**names) for flag in flags))
    assert ended.status == status and ended.output == "" and "Traceback" not in ended.told
    assert ended.told.count("error: ") == 1 and told in ended.told
    assert not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_shown_a_bar(
    run: Run, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    flags = ("--input", run.root, "--output", tmp_path / "x", "--format", "hf", "--verify")
    assert command(resharding_example, *flags).status == 0
    shown = terminal.getvalue()
    for stage in ("Verifying", "Converting"):
        assert stage in shown
    assert shown.count("100%") >= 2


@pytest.mark.slow
def test_every_format_of_a_checkpoint_is_sampled_from_alike(
    run: Run, tmp_path: Path, command: Command
) -> None:
    flags = ("--prompt", "def", "--temp", "0", "--max-new-tokens", "6")
    wanted = command(device_sample, "--config", run.config, *flags)
    assert wanted.status == 0 and len(wanted.output) > len("def\n")
    for format in ("hf", "slim"):
        target = tmp_path / format
        names = ("--input", run.root, "--output", target, "--format", format)
        assert command(resharding_example, *names, "--dtype", "float32").status == 0
        asked = ("--config", run.config) if format == "slim" else ()
        sampled = command(device_sample, "--model", target, *asked, *flags)
        assert sampled.status == 0 and sampled.output.splitlines()[0].startswith("def")
        if format == "slim":
            assert sampled.output == wanted.output
            refused = command(device_sample, "--model", target, *flags)
            assert refused.status == 1 and "hold no configuration: give --con" in refused.told
        checked = command(resharding_example, "--input", target, "--verify", *asked)
        assert checked.status == 0 and checked.told.endswith(f"whole: {target}\n")
    ended = command(device_sample, "--model", run.root, *flags)
    assert (ended.status, ended.output) == (0, wanted.output)
    ended = command(resharding_example, "--input", run.root, "--prompt", "def")
    assert ended.status == 0 and ended.output.startswith("def")


@pytest.mark.slow
def test_eight_shards_of_the_original_become_four_and_are_sampled_on_four_devices(
    run: Run, tmp_path: Path, command: Command
) -> None:
    step = original_steps.find("A", "slim")
    path, target = tmp_path / "config.json", tmp_path / "four"
    path.write_text(json.dumps(step.config.to_flat() | {"tokenizer": "bytes"}))
    flags = ("--config", path, "--input", step.folder, "--output", target, "--shards", 4)
    assert command(resharding_example, *flags).status == 0
    texts = []
    for folder, n_devices in ((step.folder, 1), (target, 4)):
        asked = ("--config", path, "--model", folder, "--prompt", "def", "--temp", 0)
        process = run.start(
            "device_sample.py",
            *map(str, (*asked, "--max-new-tokens", 12)),
            XLA_FLAGS=f"--xla_force_host_platform_device_count={n_devices}",
        )
        ended = processes.ended(process)
        assert ended.status == 0, ended.told
        texts.append(ended.output)
    assert texts[0] == texts[1] and len(texts[0]) > len("def\n")
