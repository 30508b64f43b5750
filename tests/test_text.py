"""Text that continues a prompt: whole characters, as they come, within the model's positions."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import configurations
import pytest

from mesh_transformer import config
from mesh_transformer.data.tokenizer import Bytes
from mesh_transformer.errors import UserError
from mesh_transformer.serving import loading, text
from mesh_transformer.session import Generation, Sampling

SEQ = 16


class Parrot:
    """Continues any prompt by a given text, one piece for every `every` bytes."""

    def __init__(self, said: str) -> None:
        self.said = Bytes().encode(said)
        self.prompts: list[list[int]] = []

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        every: int,
    ) -> Iterator[Generation]:
        self.prompts += [list(prompt) for prompt in prompts]
        said = self.said[:max_new_tokens]
        for begin in range(0, len(said), every):
            yield Generation([said[begin : begin + every]], [[]])


def pieces(model: Parrot, prompt: str, max_new_tokens: int = 12) -> list[str]:
    return list(
        text.continuation(
            model, Bytes(), prompt, Sampling(), max_new_tokens=max_new_tokens, seq=SEQ
        )
    )


@pytest.mark.parametrize(("encoder_seq", "shown"), [(0, "ab and c\n"), (8, "ab\n and c\n")])
def test_a_prompt_that_an_encoder_reads_has_a_line_of_its_own(encoder_seq: int, shown: str) -> None:
    model: Any = Parrot(" and c")
    loaded = loading.Loaded(model, Bytes(), 12, SEQ, encoder_seq, ())
    assert "".join(loaded.answered("ab", Sampling())) == shown


def test_pieces_come_one_by_one_and_never_break_a_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", 1)
    assert pieces(Parrot("naïve 北"), "a") == [*"na", "", *"ïve ", "", "", "北", ""]


def test_a_character_cut_off_at_the_end_is_shown_as_such() -> None:
    assert "".join(pieces(Parrot("abc北"), "a", max_new_tokens=5)) == "abc\ufffd"


def test_an_empty_prompt_begins_a_document() -> None:
    model = Parrot("x")
    pieces(model, "")
    assert model.prompts == [[Bytes.eot_id]]


def test_a_prompt_without_room_loses_its_beginning_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Parrot("x")
    pieces(model, "0123456789", max_new_tokens=10)
    assert Bytes().decode(model.prompts[0]) == "456789"
    assert "has 10 tokens; only its last 6 are used" in caplog.text


def test_an_encoder_is_fed_the_prompt_and_an_end_of_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Parrot("x")
    for prompt in ("abc", "", "0123456789"):
        given = {"max_new_tokens": 12, "seq": SEQ, "encoder_seq": 8}
        list(text.continuation(model, Bytes(), prompt, Sampling(), **given))
    end = Bytes.eot_id
    assert model.prompts == [[*b"abc", end], [end], [*b"0123456", end]]
    assert "has 10 tokens; only its first 7 are used" in caplog.text


@pytest.mark.parametrize("max_new_tokens", [-1, 0, SEQ, 999])
def test_a_number_of_tokens_without_room_for_a_prompt_is_refused(max_new_tokens: int) -> None:
    with pytest.raises(UserError, match=f"{max_new_tokens} new tokens .* ask for 1 to 15"):
        pieces(Parrot("x"), "a", max_new_tokens)


@pytest.mark.parametrize(("seq", "length"), [(2, 1), (16, 8), (256, 128), (2048, 256)])
def test_where_no_number_is_asked_for_half_of_the_positions_are_filled(
    seq: int, length: int
) -> None:
    assert text.checked_length(None, seq) == length


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stdin", "asked"), [(Terminal, "prompt> " * 3), (io.StringIO, "")])
def test_every_line_is_a_prompt_and_only_a_terminal_is_asked(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdin: type[io.StringIO],
    asked: str,
) -> None:
    monkeypatch.setattr("sys.stdin", stdin("def f\n\n"))
    assert list(text.asked_prompts()) == ["def f", ""]
    assert capsys.readouterr().out == asked


def test_ids_that_the_tokenizer_lacks_are_left_out_of_sampling() -> None:
    run = config.parse(configurations.MINIMAL | {"n_vocab": 512, "tokenizer": "some/folder"})
    assert run.model.n_tokens == 512
    assert text.for_tokenizer(run, Bytes()).model.n_tokens == 257
