"""Conversions in buckets, where nothing can be renamed: a marker tells what is not whole."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import memory_source
import numpy as np
import pytest
import small
from object_stores import Gateway

from mesh_transformer import resharding, storage
from mesh_transformer.buckets import StorageError
from mesh_transformer.checkpoints import conversion, opening, places
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import PARAMS, Key, Source
from mesh_transformer.data import DataError, tokenizer
from mesh_transformer.errors import UserError

CONFIG = small.parsed()
KINDS = [
    pytest.param("gs", "native", marks=pytest.mark.slow),
    pytest.param("gs", "original", marks=pytest.mark.slow),
    ("gs", "hf"),
    ("s3", "slim"),
    ("s3", "hf"),
    ("gs", "jaxseq"),
]


def made(seed: int = 0) -> memory_source.MemorySource:
    """A checkpoint; its embedding has no bias, which Hugging Face's folders cannot hold."""
    source = memory_source.of_model(CONFIG.model, seed, moments=True)
    bias = Key(PARAMS, "decoder/embed/b")
    zeros = np.zeros_like(source.contents[bias])
    return dataclasses.replace(source, contents={**source.contents, bias: zeros})


def convert(source: Source, output: str, format: str, n_shards: int = 1, **more: Any) -> Source:
    what = Conversion(format=format, n_shards=n_shards, dtype="float32")  # type: ignore[arg-type]
    conversion.convert(source, CONFIG, output, what, position={}, **more)
    return opening.open_source(opening.find(output), CONFIG.model)


def assert_same_weights(found: Source, wanted: Source) -> None:
    for key in wanted.arrays:
        if key.kind == PARAMS:
            np.testing.assert_array_equal(found.read(key), wanted.read(key))


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    """A folder in a bucket of the scheme that is asked for."""
    return str(request.getfixturevalue(request.param))


class Broken(memory_source.MemorySource):
    """A checkpoint of which the second half of the weights cannot be read."""

    def read(self, key: Key) -> np.ndarray:
        if len(self.reads) > len(self.contents) // 6:
            raise CheckpointError("damaged half-way")
        return super().read(key)


def broken(seed: int = 0) -> Broken:
    return Broken(
        **{
            field.name: getattr(made(seed), field.name)
            for field in dataclasses.fields(memory_source.MemorySource)
        }
    )


@pytest.mark.thorough
@pytest.mark.parametrize(("folder", "format"), KINDS, indirect=["folder"])
def test_every_format_goes_to_a_bucket_and_back(folder: str, format: str, tmp_path: Path) -> None:
    source = made()
    there = convert(source, f"{folder}/it", format)
    assert_same_weights(there, source)
    assert not storage.exists(f"{folder}/it/unfinished")
    opening.verify(opening.find(f"{folder}/it"), there, lambda n: None)
    back = convert(there, str(tmp_path / "back"), "original", n_shards=2)
    assert_same_weights(back, source)
    assert (back.counts == source.counts) == (format in ("native", "original"))


@pytest.mark.thorough
@pytest.mark.parametrize(("folder", "format"), KINDS, indirect=["folder"])
def test_a_conversion_that_stops_looks_like_nothing_whole_and_runs_again(
    folder: str, format: str
) -> None:
    """Also when it is of another format, whose files would stay beside the new ones."""
    convert(made(), f"{folder}/other", "hf")
    with pytest.raises(CheckpointError, match="damaged half-way"):
        convert(broken(), f"{folder}/it", format)
    assert storage.exists(f"{folder}/it/unfinished")
    with pytest.raises(CheckpointError, match=f"{folder}/it was never finished; write it again"):
        opening.find(f"{folder}/it")
    assert_same_weights(convert(made(), f"{folder}/it", "hf"), made())
    assert storage.files(f"{folder}/it") == storage.files(f"{folder}/other")


@pytest.mark.thorough
@pytest.mark.parametrize(("folder", "format"), KINDS, indirect=["folder"])
def test_a_checkpoint_is_replaced_only_when_asked(folder: str, format: str) -> None:
    before, after = made(0), made(1)
    convert(before, f"{folder}/it", format)
    convert(before, f"{folder}/it2", "hf")
    files = storage.files(f"{folder}/it")
    with pytest.raises(CheckpointError, match="/it is there already: .* or give --overwrite"):
        convert(after, f"{folder}/it", "hf")
    assert storage.files(f"{folder}/it") == files
    with pytest.raises(CheckpointError, match="damaged half-way"):
        convert(broken(), f"{folder}/it", format, overwrite=True)
    with pytest.raises(CheckpointError, match="was never finished"):
        opening.find(f"{folder}/it")
    assert_same_weights(convert(after, f"{folder}/it", "hf"), after)
    assert storage.files(f"{folder}/it") == storage.files(f"{folder}/it2")
    assert_same_weights(convert(before, f"{folder}/it", format, overwrite=True), before)
    assert storage.files(f"{folder}/it") != storage.files(f"{folder}/it2") or format == "hf"


@pytest.mark.thorough
@pytest.mark.parametrize("ends", [(0, 1), (1, 0)])
def test_of_two_that_write_one_folder_at_once_neither_leaves_it_whole(
    s3: str, ends: tuple[int, ...]
) -> None:
    """The second has taken what the first had begun for the remains of one that was stopped."""
    both = [places.becoming(f"{s3}/it", 0, overwrite=False) for _ in ends]
    for i, each in enumerate(both):
        storage.write_text_atomically(f"{each.__enter__()}/of_{i}", "")
    for i in ends:
        told = pytest.raises(CheckpointError, match=f"another process wrote {s3}/it at the same ti")
        with contextlib.nullcontext() if (i, *ends) == (1, 1, 0) else told:
            both[i].__exit__(None, None, None)
    with pytest.raises(CheckpointError, match="it was never finished; write it again"):
        opening.find(f"{s3}/it")
    assert_same_weights(convert(made(), f"{s3}/it", "hf"), made())


def test_what_fails_is_told_although_the_marker_cannot_be_read_then(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> bool:
        raise StorageError("the network is gone")

    with pytest.raises(ValueError, match="first"), places.becoming(f"{s3}/it", 0, overwrite=False):
        monkeypatch.setattr(storage, "read_bytes", gone)
        raise ValueError("first")


@pytest.mark.thorough
def test_a_tokenizer_goes_along_from_a_bucket_to_a_bucket_and_to_a_disk(
    remote: str, tmp_path: Path
) -> None:
    config = small.parsed(n_vocab=320, tokenizer="bytes")
    first = memory_source.of_model(config.model)
    folders = [f"{remote}/hf", f"{remote}/again", str(tmp_path / "here")]
    resharding.write(first, config, folders[0], Conversion(format="hf"))
    template = f"{folders[0]}/additional_chat_templates/tools.jinja"
    storage.write_text_atomically(template, "{{ tools }}")
    for before, after in itertools.pairwise(folders):
        opened = resharding.open_checkpoint(before, None)
        assert opened.config.data.tokenizer == before
        resharding.write(opened.source, opened.config, after, Conversion(format="hf"))
        assert storage.files(after) == storage.files(before)
        for name in storage.files(after):
            if "tokenizer" in name or "config" in name:
                both = (storage.read_bytes(f"{it}/{name}") for it in (before, after))
                assert len(set(both)) == 1, name
    assert tokenizer.load(f"{remote}/hf").encode("Ω") == list("Ω".encode())
    assert tokenizer.load(f"{remote}/hf/tokenizer.json").eot_id == 256
    with pytest.raises(DataError, match=f"{remote}/nowhere holds no tokenizer.json"):
        tokenizer.load(f"{remote}/nowhere")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("keys", "n_vocab", "told"),
    [
        (
            {"norm": "scalenorm", "n_vocab": 320},
            None,
            "the model cannot be written for transformers",
        ),
        (
            {**small.VARIANTS["llama"], "n_tokens": 300, "n_vocab": 320},
            None,
            r"rows 300 to 319 of the vocabulary are padding \(n_tokens\)",
        ),
        ({}, None, r"tokenizer bytes has 257 ids, the model's .* 64 \(n_vocab"),
        ({"n_vocab": 320}, 256, "tokenizer bytes has 257 ids, the model's "),
    ],
)
def test_what_can_be_refused_is_before_a_checkpoint_is_given_up_or_a_weight_read(
    s3: str, keys: dict[str, Any], n_vocab: int | None, told: str
) -> None:
    before = made()
    convert(before, f"{s3}/it", "hf")
    config = small.parsed(tokenizer="bytes", **keys)
    source = memory_source.of_model(config.model)
    what = Conversion(format="hf", n_vocab=n_vocab)
    with pytest.raises(UserError, match=told):
        resharding.write(source, config, f"{s3}/it", what, overwrite=True)
    assert not source.reads
    assert_same_weights(opening.open_source(opening.find(f"{s3}/it"), None), before)


@pytest.mark.thorough
def test_what_is_no_checkpoint_is_never_replaced(remote: str) -> None:
    """Nor is what has a file by the marker's name, of which nobody knows what it means."""
    for name in ("deep/er/precious", "unfinished"):
        storage.write_text_atomically(f"{remote}/{name}", "mine")
        for overwrite, told in ((False, "is there already"), (True, "no checkpoint, so --overwri")):
            with pytest.raises(CheckpointError, match=told):
                convert(made(), remote, "hf", overwrite=overwrite)
        assert storage.read_text(f"{remote}/{name}") == "mine"


@pytest.mark.thorough
def test_the_checkpoint_that_is_read_is_never_replaced(remote: str) -> None:
    there = convert(made(), f"{remote}/runs/it", "original")
    for output in (f"{remote}/runs/it/", f"{remote}/runs", remote):
        with pytest.raises(CheckpointError, match="/it, which is read: name another folder"):
            convert(there, output, "hf", overwrite=True)
    assert_same_weights(convert(there, f"{remote}/runs/it2", "hf"), made())


@pytest.mark.thorough
def test_a_bucket_that_refuses_or_is_missing_is_told_as_such(remote: str, store: Gateway) -> None:
    mistyped = remote.replace("//bucket", "//mistyped")
    for overwrite in (False, True):
        with pytest.raises(storage.StorageError, match=f"{mistyped}.*: there is no bucket"):
            convert(made(), mistyped, "hf", overwrite=overwrite)
    there = convert(made(), f"{remote}/it", "hf")
    store.refuses = True
    for call in (
        lambda: opening.find(f"{remote}/it"),
        lambda: there.read(next(iter(there.arrays))),
        lambda: convert(made(), f"{remote}/it2", "hf"),
        lambda: convert(made(), f"{remote}/it", "hf", overwrite=True),
    ):
        with pytest.raises(storage.StorageError, match=f"{remote}/it.*: the store refuses"):
            call()
    store.refuses = False
    assert_same_weights(there, made())
    assert not storage.exists(f"{remote}/it2")


def test_native_is_refused_in_s3_before_anything_is_written(s3: str) -> None:
    with pytest.raises(UserError, match=r"not in s3://: .* every other format is read and wr"):
        convert(made(), s3, "native")
    assert not storage.exists(s3)


@pytest.mark.thorough
@pytest.mark.parametrize("format", ["hf", "slim"])
def test_arrays_are_streamed_by_ranges(remote: str, store: Gateway, format: str) -> None:
    """No file is fetched whole, and in all no more than it holds and its header a few times."""
    source, folder = made(), f"{remote}/it"
    convert(source, folder, format, n_shards=1)
    weights = {name for name in storage.files(folder) if name.endswith(("safetensors", "npz"))}
    n_bytes = sum(storage.size(f"{folder}/{name}") for name in weights)
    store.requests.clear()
    there = opening.open_source(opening.find(folder), CONFIG.model)
    store.requests.clear()
    assert_same_weights(there, source)
    fetched = store.fetched()
    assert fetched and all(request.range for request in fetched)
    assert max(request.received for request in fetched) < n_bytes / 2
    assert sum(request.received for request in fetched) < 1.5 * n_bytes
