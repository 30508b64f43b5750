"""Native checkpoints in gs://, which Orbax, TensorStore and gcsfs reach by clients of their own."""

from __future__ import annotations

import pathlib

import pytest
from object_stores import Gateway
from saved_states import assert_same, like, mesh, saved, state_on

from mesh_transformer import storage
from mesh_transformer.checkpoints import layout, native, native_writer, pieces
from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints, locate
from mesh_transformer.errors import UserError


def copied(source: str, target: str) -> None:
    """Copy a folder, file by file, from or to anywhere."""
    for name in storage.files(source):
        content = storage.read_bytes(storage.join(source, name))
        storage.write_bytes_atomically(storage.join(target, name), content)


@pytest.mark.thorough
def test_a_run_saves_goes_on_and_deletes_what_is_superseded(gs: str) -> None:
    first, second = state_on(mesh(2, 4)), state_on(mesh(2, 4), seed=1)
    with Checkpoints(gs, keep_n=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, first, {"position": step})
    with Checkpoints(gs, keep_n=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, second, {"position": 3})
        checkpoints.wait()
        target = like(state_on(mesh(4, 2), ("mp", "dp")))
        for step, wanted in ((2, first), (3, second)):
            restored, extra = checkpoints.restore(step, target)
            assert_same(restored, wanted)
            assert extra == {"position": step}
    assert storage.children(f"{gs}/checkpoints") == ["step_2", "step_3"]
    assert locate(gs) == f"{gs}/checkpoints/step_3"
    pieces.verify(f"{gs}/checkpoints/step_3")


def test_a_copy_is_a_checkpoint_wherever_it_lands(gs: str, tmp_path: pathlib.Path) -> None:
    state = state_on(mesh(2, 4))
    local = saved(tmp_path, state, 7)
    there, back = f"{gs}/checkpoints/step_7", str(tmp_path / "back" / "step_7")
    copied(local, there)
    with Checkpoints(gs) as checkpoints:
        assert_same(checkpoints.restore(7, like(state))[0], state)
        checkpoints.save(8, state, {})
    copied(f"{gs}/checkpoints/step_8", back)
    assert locate(back) == back
    assert_same(native.restore(back, like(state))[0], state)


def test_what_was_never_finished_or_is_damaged_is_no_checkpoint(gs: str) -> None:
    state = state_on(mesh(1, 1))
    with Checkpoints(gs) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    folder = f"{gs}/checkpoints/step_2"
    largest = max(storage.files(folder), key=lambda name: storage.size(f"{folder}/{name}"))
    content = storage.read_bytes(f"{folder}/{largest}")
    storage.write_bytes_atomically(f"{folder}/{largest}", content[:-1])
    with pytest.raises(native.Damaged, match=rf"{folder} is damaged: {largest} \(changed\)"):
        native.restore(folder, like(state))
    with Checkpoints(gs) as checkpoints:
        read = checkpoints.newest_sound(lambda step: checkpoints.restore(step, like(state)))
        assert read is not None
        assert_same(read[0], state)
        assert checkpoints.steps() == [1]  # the marker of what is damaged is gone
    with pytest.raises(CheckpointError, match=f"no {layout.MARKER} in it"):
        native.restore(folder, like(state))
    with Checkpoints(gs):
        assert storage.children(f"{gs}/checkpoints") == ["step_1"]


def test_a_denied_access_is_not_taken_for_a_run_without_checkpoints(
    gs: str, stores: dict[str, Gateway]
) -> None:
    state = state_on(mesh(1, 1))
    saved_in = f"{gs}/checkpoints/step_1"
    with Checkpoints(gs) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        stores["gs"].refuses = True
        for call in (checkpoints.latest, checkpoints.steps, checkpoints.clear):
            with pytest.raises(storage.StorageError, match="the store refuses .*To log in: "):
                call()
        with pytest.raises(UserError, match="refuses|403|permission"):
            checkpoints.restore(1, like(state))
    for refused in (lambda: Checkpoints(gs), lambda: locate(gs)):
        with pytest.raises(storage.StorageError, match="the store refuses .*To log in: "):
            refused()
    stores["gs"].refuses = False
    assert_same(native.restore(saved_in, like(state))[0], state)


def test_a_missing_bucket_is_told_and_not_made(gs: str) -> None:
    root = gs.replace("//bucket", "//mistyped")
    for _ in range(2):
        with pytest.raises(storage.StorageError, match="there is no bucket 'mistyped'"):
            Checkpoints(root)


def test_native_checkpoints_in_s3_are_refused_with_what_else_there_is(
    s3: str, tmp_path: pathlib.Path
) -> None:
    told = "kept on local disks and in gs://, not in s3://: .* every other format is "
    for call in (Checkpoints, lambda root: native_writer.write(root, None, extra={})):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=told):
            call(s3)
    assert locate(s3) is None and not storage.exists(s3)
    copied(saved(tmp_path, state_on(mesh(1, 1))), f"{s3}/checkpoints/step_1")
    for path in (s3, f"{s3}/checkpoints", f"{s3}/checkpoints/step_1"):
        with pytest.raises(UserError, match=f"{s3}/checkpoints/step_1: .*{told}"):
            locate(path)
