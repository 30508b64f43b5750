"""The tokens that begin and end texts: a model's own, in its data, its prompts and its folders."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import memory_source
import numpy as np
import pairs_of_texts
import pytest
import small
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from mesh_transformer import resharding
from mesh_transformer.checkpoints import huggingface
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.data import DataError, documents, packing, prepare, tokenizer, tokenizer_files
from mesh_transformer.data.batches import RecordSet
from mesh_transformer.data.encoding import Encoder, encode_to
from mesh_transformer.data.tokenizer import byte_alphabet
from mesh_transformer.serving import loading, text
from mesh_transformer.session import Generation, Sampling

EOS, BOS = 256, 257
BOTH = {"eos_token": "</s>", "bos_token": {"content": "<s>"}}


def a_folder(folder: pathlib.Path, about: dict[str, Any], puts: str | None = None) -> str:
    """Write a tokenizer of bytes with </s> 256 and <s> 257, and what its tokenizer.json puts."""
    backend = Backend(BPE({name: byte for byte, name in byte_alphabet().items()}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["</s>", "<s>"])
    if puts:
        ids = [("</s>", EOS), ("<s>", BOS)]
        backend.post_processor = TemplateProcessing(single=puts, special_tokens=ids)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)


@pytest.mark.parametrize(
    ("about", "puts", "bos_id"),
    [
        (BOTH, None, None),
        ({**BOTH, "add_bos_token": True}, None, BOS),
        ({**BOTH, "bos_token": "<s>", "add_bos_token": True}, None, BOS),
        ({**BOTH, "add_bos_token": False}, "<s> $A", None),
        (BOTH, "<s> $A", BOS),
        (BOTH, "<s> $A </s>", BOS),
        (BOTH, "$A </s>", None),
        ({"eos_token": "</s>"}, "</s> $A", EOS),
    ],
)
def test_a_tokenizer_s_files_say_what_begins_a_text(
    about: dict[str, Any], puts: str | None, bos_id: int | None, tmp_path: pathlib.Path
) -> None:
    loaded = tokenizer.load(a_folder(tmp_path, about, puts))
    assert (loaded.bos_id, loaded.eot_id) == (bos_id, EOS)
    assert loaded.encode("a<s>") == list(b"a<s>"), "the name of a special token is text"


def test_a_begin_that_is_no_token_is_refused(tmp_path: pathlib.Path) -> None:
    asked = {**BOTH, "add_bos_token": True}
    with pytest.raises(
        DataError, match="its beginning of text, '<go>', is not in its vocabulary; "
    ):
        tokenizer.load(a_folder(tmp_path, {**asked, "bos_token": "<go>"}))
    with pytest.raises(DataError, match="bos_token names none; name it in .*tokenizer_config.json"):
        tokenizer.load(a_folder(tmp_path, {**asked, "bos_token": None}))


def test_another_beginning_is_another_tokenizer_but_no_text(tmp_path: pathlib.Path) -> None:
    plain = tokenizer.load(a_folder(tmp_path / "plain", BOTH))
    begun = tokenizer.load(a_folder(tmp_path / "begun", {**BOTH, "add_bos_token": True}))
    assert plain.fingerprint != begun.fingerprint
    lengths = tokenizer.byte_lengths(begun)
    assert lengths is not None and lengths[[BOS, *b"abc", EOS]].sum() == 3
    stream = tokenizer.TextStream(begun)
    ids = [BOS, *"né".encode(), EOS, BOS]
    assert "".join(map(stream.push, ids)) + stream.finish() == begun.decode(ids) == "<s>né</s><s>"


@pytest.mark.parametrize(
    ("about", "begin"), [({**BOTH, "add_bos_token": True}, [BOS]), (BOTH, []), ("same", [])]
)
def test_documents_in_data_begin_and_end_with_the_tokenizer_s_own(
    about: Any, begin: list[int], tmp_path: pathlib.Path
) -> None:
    """One begin and one end for each, in however many pieces and tasks; their names are text."""
    same = {"eos_token": "</s>", "bos_token": "</s>", "add_bos_token": True}
    loaded = tokenizer.load(a_folder(tmp_path, same if about == "same" else about))
    texts = ["one two " * 20, "<s>three", "x" * 99]
    path = tmp_path / "texts.txt"
    path.write_text("</s>".join(texts[:2]) + "</s></s>" + texts[2])
    pieces = list(documents.read(path, loaded.eot_text, longest=16))
    assert len(pieces) > 10 and sum(piece.begins for piece in pieces) == 3
    expected = [i for text in texts for i in (*begin, *text.encode(), EOS)]
    with open(tmp_path / "spool", "w+b") as spool:
        found, n_bytes = encode_to(spool, pieces, Encoder(loaded), workers=1)
        assert isinstance(found, packing.Documents)
        assert found.tokens[: len(expected) + 1].tolist() == expected
    assert n_bytes == sum(map(len, texts))
    made = prepare.create(
        path, "set", loaded, prepare.Options(seq=9), output_dir=tmp_path / "set", workers=1
    )
    assert made.origin.document_tokens == len(expected)
    assert made.origin.fingerprint == loaded.fingerprint


class Echo:
    """Notes its prompts and says nothing."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, *, every: int
    ) -> Iterator[Generation]:
        self.prompts += [list(prompt) for prompt in prompts]
        yield Generation([[]], [[]])


def test_a_prompt_begins_as_a_document_does(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tokenizer.load(a_folder(tmp_path, {**BOTH, "add_bos_token": True}))
    model = Echo()
    for prompt in ("ab", "", "<s>", "0123456789"):
        list(text.continuation(model, loaded, prompt, Sampling(), max_new_tokens=4, seq=9))
    assert model.prompts == [[BOS, *b"ab"], [BOS], [BOS, *b"<s>"], [BOS, *b"6789"]]
    assert [it.getMessage() for it in caplog.records if it.levelno == logging.WARNING] == [
        "the prompt has 10 tokens; only its last 4 are used"
    ]


@pytest.mark.parametrize(("bos_token", "begin"), [("<s>", [BOS]), ("</s>", [])])
def test_what_an_encoder_is_fed_begins_and_ends_as_its_records_inputs_do(
    bos_token: str, begin: list[int], tmp_path: pathlib.Path
) -> None:
    """And outputs begin with padding alone."""
    about = {"eos_token": "</s>", "bos_token": bos_token, "add_bos_token": True}
    loaded = tokenizer.load(a_folder(tmp_path / "tokenizer", about))
    inputs, n = ["ab", "", "0123456789"], 7
    path = pairs_of_texts.write(tmp_path / "pairs.jsonl", dict.fromkeys(inputs, "cd"))
    options = prepare.Options(seq=4, encoder_seq=n, pad_id=0, preserve_data_order=True)
    made = prepare.create(path, "set", loaded, options, output_dir=tmp_path, workers=1)
    records = RecordSet(str(made.path), seq=4, encoder_seq=n, n_vocab=258, tokenizer=loaded)
    ((tokens_BT1, _),) = records.read((0, 0), 3, repeat=False)
    model = Echo()
    for prompt in inputs:
        given = {"max_new_tokens": 3, "seq": 4, "encoder_seq": n}
        list(text.continuation(model, loaded, prompt, Sampling(), **given))
    assert model.prompts == [[i for i in row if i] for row in tokens_BT1[:, :n].tolist()]
    assert model.prompts[:2] == [[*begin, *b"ab", EOS], [*begin, EOS]]
    assert tokens_BT1[:, n:].tolist() == [[0, *b"cd", EOS, 0]] * 3


def a_model(folder: pathlib.Path, **said: Any) -> str:
    """Write a random model beside a tokenizer of bytes, and what its files say of its end."""
    keys = {**small.VARIANTS["llama"], "n_vocab": 264, "seq": 24}
    model = small.parsed(**keys).model
    a_folder(folder, {**BOTH, "add_bos_token": True})
    ids = {"bos_token_id": BOS, "eos_token_id": EOS}
    source = memory_source.of_model(model)
    huggingface.write(str(folder), source, model, dtype=np.dtype(np.float32), ids=ids)
    for name, ids in said.items():
        path = folder / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, "eos_token_id": ids}))
    return str(folder)


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ({"config": None}, ()),
        ({"config": 7}, (7,)),
        ({"config": [7, 0]}, (7, 0)),
        ({"config": 7, "generation_config": [8, 9]}, (8, 9)),
        ({"config": 7, "generation_config": None}, (7,)),
    ],
)
def test_a_folder_says_what_ends_its_texts(
    said: dict[str, Any], ids: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    assert huggingface.end_ids(a_model(tmp_path, **said)) == ids


@pytest.mark.parametrize("wrong", ["</s>", [1, None], -1, True, 1.0])
def test_an_end_that_is_no_token_id_is_refused(wrong: object, tmp_path: pathlib.Path) -> None:
    folder = a_model(tmp_path, generation_config=wrong)
    problem = "generation_config.json: eos_token_id is .*; needed is a token id, a list of ids or n"
    with pytest.raises(CheckpointError, match=problem):
        huggingface.end_ids(folder)


@pytest.mark.thorough
def test_sampling_stops_at_the_model_s_own_ends(tmp_path: pathlib.Path) -> None:
    greedy = Sampling(temperature=0)
    folder = a_model(tmp_path)
    free = loading.load(folder, None, max_new_tokens=8)
    assert free.stop_ids[0] == EOS
    [said], _ = free.worker.generate([[BOS, *b"ab"]], greedy, 8)
    assert len(said) == 8
    stop = next(i for i in range(2, 8) if said[i] not in said[:i])
    a_model(tmp_path, generation_config=[300, said[stop]])
    ended = loading.load(folder, None, max_new_tokens=8)
    assert ended.stop_ids == (EOS, 300, said[stop])
    assert "".join(ended.continuation("ab", greedy)) == free.tokenizer.decode(said[:stop])


IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("config_eos", "generation", "ids"),
    [
        (EOS, None, (BOS, EOS, None)),
        ([EOS, 7], None, (BOS, [EOS, 7], None)),
        (7, {"top_k": 3, "eos_token_id": [EOS, 9], "pad_token_id": 8}, (BOS, [EOS, 9], 8)),
        (EOS, {"_from_model_config": True, "bos_token_id": 5}, (5, EOS, None)),
        (EOS, {"pad_token_id": 4000, "eos_token_id": None}, (BOS, EOS, None)),
        ([EOS, 4000], None, (BOS, [EOS], None)),
        (4000, {"bos_token_id": 4000, "eos_token_id": [4000]}, (BOS, EOS, None)),
    ],
)
def test_a_folder_s_ids_and_how_it_generates_survive_there_and_back(
    config_eos: Any,
    generation: Any,
    ids: tuple[Any, ...],
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Through a native checkpoint; config.json and generation_config.json agree of every id."""
    folder = a_model(tmp_path / "hf", config=config_eos)
    said = tmp_path / "hf" / "generation_config.json"
    if generation is not None:
        said.write_text(json.dumps(generation))
    path = folder
    caplog.set_level(logging.INFO)
    for name, what in (("run", Conversion(format="native")), ("again", Conversion(format="hf"))):
        opened = resharding.open_checkpoint(path, None)
        path = str(tmp_path / name)
        resharding.write(opened.source, opened.config, path, what)
    theirs, drawn = (
        json.loads((tmp_path / "again" / name).read_text())
        for name in ("config.json", "generation_config.json")
    )
    assert "config.json will say that the model has 24 positions" in caplog.text
    assert tuple(theirs[name] for name in IDS) == tuple(map(drawn.get, IDS)) == ids
    if generation is None:
        generation = {"do_sample": True, "temperature": 0.75, "top_p": 0.9, "top_k": 0}
    others = [
        {key: value for key, value in it.items() if key not in IDS} for it in (drawn, generation)
    ]
    assert others[0] == others[1]


def test_the_padding_of_an_encoder_s_model_begins_its_answers(tmp_path: pathlib.Path) -> None:
    loaded = tokenizer.load(a_folder(tmp_path, {**BOTH, "add_bos_token": True}))
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": 9, "pad_token_id": 8, "num_beams": 4}')
    written = tmp_path / "b" / "generation_config.json"
    tokenizer_files.write(str(tmp_path / "b"), loaded, 264, start_id=5)
    ids = {"eos_token_id": 9, "pad_token_id": 5}
    assert tokenizer_files.special_ids(loaded, 264, start_id=5) == ids
    found = json.loads(written.read_text())
    assert found == {**ids, "num_beams": 4, "decoder_start_token_id": 5}
    assert tokenizer.load(str(tmp_path / "b")).fingerprint == loaded.fingerprint
    path.write_text("[")
    with pytest.raises(DataError, match="generation_config.json is not a JSON object"):
        tokenizer_files.write(str(tmp_path / "b"), loaded, 264)
