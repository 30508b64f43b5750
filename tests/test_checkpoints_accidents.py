"""Native checkpoints after accidents: copies, damage, full disks, killed runs."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from processes import ended
from saved_states import assert_same, like, mesh, saved, state_on

from mesh_transformer.checkpoints import layout, native
from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints, locate
from mesh_transformer.errors import InUse

# Copies and damage


def test_a_copied_folder_is_a_checkpoint_wherever_it_lands(tmp_path):
    """`test_native_buckets` has the same of copies to and from a bucket."""
    state = state_on(mesh(2, 4))
    folder = saved(tmp_path / "one", state, 7)
    subprocess.run(["cp", "-r", folder, tmp_path / "anywhere"], check=True)
    shutil.rmtree(tmp_path / "one")
    copy = locate(str(tmp_path / "anywhere"))
    assert copy is not None
    assert_same(native.restore(copy, like(state))[0], state)

    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    shutil.copytree(copy, tmp_path / "two" / "checkpoints" / "step_7")
    with Checkpoints(str(tmp_path / "two")) as checkpoints:
        assert_same(checkpoints.restore(7, like(state))[0], state)
        checkpoints.save(8, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [7, 8]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_copy_is_refused_and_every_damaged_file_named(tmp_path, damage):
    state = state_on(mesh(2, 4))
    folder = saved(tmp_path, state)
    unlisted = {layout.MARKER, "files.json", "_CHECKPOINT_METADATA"}
    files = [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and str(path.relative_to(folder)) not in unlisted
    ]
    assert sum(path.stat().st_size for path in files) > state.opt_state[0].mu["w"].nbytes
    for path in files:
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2])
        name = re.escape(str(path.relative_to(folder)))
        with pytest.raises(CheckpointError, match=rf"step_1 is damaged: {name} \({damage}\); res"):
            native.restore(folder, like(state))
        path.write_bytes(content)
    assert_same(native.restore(folder, like(state))[0], state)


def test_one_flipped_bit_of_an_array_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "_CHECKSUM_BYTES", 10_000)
    state = state_on(mesh(1, 1))
    folder = saved(tmp_path, state)
    value = np.asarray(state.params["decoder/layers/ff"]["w"])[0, 0, :4].tobytes()
    (path,) = [path for path in Path(folder).rglob("?" * 32) if value in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(value)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: params/decoder/layers/ff/w \(changed\)"):
        native.restore(folder, like(state))
    assert native.read_extra(folder) == {}


# Failures


NEXT_CALLS = {
    "wait": lambda checkpoints, state: checkpoints.wait(),
    "save": lambda checkpoints, state: checkpoints.save(3, state, {}),
    "restore": lambda checkpoints, state: checkpoints.restore(1, state),
    "close": lambda checkpoints, state: checkpoints.close(),
}


@pytest.mark.parametrize("next_call", NEXT_CALLS)
def test_a_save_that_failed_is_raised_at_the_next_call_and_the_run_can_go_on(tmp_path, next_call):
    state = {"w": jnp.zeros((1000, 1000))}
    checkpoints = Checkpoints(str(tmp_path), keep_n=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # files end as on a full disk
    try:
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointError, match=r"saving step 2 to .*step_2 failed: .*too large"):
            NEXT_CALLS[next_call](checkpoints, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps() == [1]
    assert os.listdir(tmp_path / "checkpoints") == ["step_1"]
    if next_call == "close":
        checkpoints = Checkpoints(str(tmp_path), keep_n=1)
    checkpoints.save(2, state, {})
    checkpoints.close()
    assert os.listdir(tmp_path / "checkpoints") == ["step_2"]


def test_a_save_that_takes_long_is_not_waited_for_in_silence(tmp_path, monkeypatch):
    told: list[str] = []
    twice = threading.Event()
    list_files = layout.list_files

    def slow(folder: epath.Path) -> None:
        assert twice.wait(10)
        list_files(folder)

    def tell(message: str, *values: object) -> None:
        told.append(message % values)
        if len(told) == 2:
            twice.set()

    monkeypatch.setattr(layout, "list_files", slow)
    monkeypatch.setattr(native, "_NOTICE_SECONDS", 0.01)
    monkeypatch.setattr(native._logger, "info", tell)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(7, state_on(mesh(1, 1)), {})
        checkpoints.wait()
        assert checkpoints.steps() == [7]
    line = rf"still saving the checkpoint of step 7 to {re.escape(str(tmp_path))} \(\d+ s so far\)"
    assert len(told) >= 2 and all(re.fullmatch(line, said) for said in told)


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"saving step 1 to .*step_1 failed"):
        checkpoints.save(1, state_on(mesh(1, 1)), {})
    checkpoints.close()


# Other processes


HOLDING = """
    import subprocess, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    from mesh_transformer.checkpoints.native import Checkpoints

    checkpoints = Checkpoints(sys.argv[1])
    child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    print(child.pid, flush=True)
    child.wait()
"""


def started(script: str, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a program of this text in a process of its own."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, "-W", "error", path, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(native.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_process_is_refused_and_nothing_of_the_first_is_touched(tmp_path):
    state = state_on(mesh(1, 1))
    saved(tmp_path, state, 7)
    with Checkpoints(str(tmp_path)):
        under_way = tmp_path / "checkpoints" / "step_8.orbax-checkpoint-tmp"
        under_way.mkdir()
        told = f"another process trains in {tmp_path}: end it, or set another model_dir"
        for _ in range(2):
            with pytest.raises(InUse, match=re.escape(told)):
                Checkpoints(str(tmp_path))
        assert under_way.exists()
        newest = locate(str(tmp_path))
        assert newest is not None
        assert_same(native.restore(newest, like(state))[0], state)
    assert under_way.exists()
    Checkpoints(str(tmp_path)).close()
    assert os.listdir(tmp_path / "checkpoints") == ["step_7"]


def test_a_process_that_dies_locks_nobody_out_though_what_it_started_lives_on(tmp_path):
    with started(HOLDING, tmp_path, tmp_path / "run") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(InUse, match="another process trains in"):
                Checkpoints(str(tmp_path / "run"))
            process.kill()
            process.wait()
            Checkpoints(str(tmp_path / "run")).close()
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


KILLED = """
    import os, random, signal, sys, threading
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from mesh_transformer.checkpoints.native import Checkpoints

    root, seconds = sys.argv[1], float(sys.argv[2])
    assert not {"tensorflow", "ray", "torch"} & sys.modules.keys()
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "mp"))
    cut = NamedSharding(mesh, PartitionSpec("dp", "mp"))
    step_to = jax.jit(lambda s, w: (s + 1, {k: w[k] + 1 for k in w}), donate_argnums=(0, 1))
    checkpoints = Checkpoints(root, keep_n=2, keep_every=10)
    fresh = (
        jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec())),
        {k: jax.device_put(jnp.full((64, 64), 1.0 * k), cut) for k in range(6)},
    )
    step, state = checkpoints.latest() or 0, fresh
    if step:
        state, extra = checkpoints.restore(step, fresh)
        assert extra == {"samples": 8 * step}, extra
        assert int(state[0]) == step
        assert all((np.asarray(state[1][k]) == k + step).all() for k in range(6))
    print("restored", step, flush=True)
    killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    while True:
        state = step_to(*state)
        step += 1
        checkpoints.save(step, state, {"samples": 8 * step})
        if random.random() < 0.5:
            checkpoints.wait()
            print("committed", step, flush=True)
            if not killer.is_alive():
                killer.start()
"""


@pytest.mark.thorough
def test_a_run_killed_at_any_time_goes_on_from_its_last_committed_checkpoint(tmp_path):
    rng = random.Random(os.environ.get("KILL_SEED", "0"))
    committed = 0
    for _ in range(int(os.environ.get("KILL_TIMES", "3"))):
        status, output, told = ended(
            started(KILLED, tmp_path, tmp_path / "run", rng.uniform(0, 0.5))
        )
        assert status == -signal.SIGKILL, told
        lines = [line.split() for line in output.splitlines()]
        assert lines[0][0] == "restored"
        assert int(lines[0][1]) >= committed
        committed = max([int(step) for _, step in lines])
    newest = locate(str(tmp_path / "run"))
    assert newest is not None
    assert native.read_extra(newest)["samples"] >= 8 * committed > 0
