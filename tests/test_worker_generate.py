"""One host continues prompts: in pieces or at once, until they stop, with the weights it has."""

from __future__ import annotations

import numpy as np
import pytest
import small

from mesh_transformer.errors import UserError
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Generation, Sampling

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3)
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4], [2, 2]]
N_NEW = 9


def fresh() -> Worker:
    """A host of one device, with the weights before the first step."""
    worker = small.worker()
    worker.state = small.start()
    return worker


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("every", [1, 4, N_NEW, 100])
def test_what_streams_in_pieces_is_what_is_generated_at_once(
    sampling: Sampling, every: int
) -> None:
    worker = fresh()
    whole = worker.generate(PROMPTS, sampling, N_NEW)
    pieces = list(worker.stream(PROMPTS, sampling, N_NEW, every=every))
    assert len(pieces) == -(-N_NEW // every)
    for row in range(len(PROMPTS)):
        assert sum((piece.tokens[row] for piece in pieces), []) == whole.tokens[row]
        assert sum((piece.logprobs[row] for piece in pieces), []) == whole.logprobs[row]
    assert [len(tokens) for tokens in whole.tokens] == [N_NEW] * len(PROMPTS)


def assert_scored_alike(worker: Worker, made: Generation, greedy: bool = False) -> None:
    """Evaluation gives the new tokens the losses that generation gave as log-probabilities."""
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, made.tokens, strict=True)]
    tokens_BT1 = np.array([text + [0] * (small.KEYS["seq"] - len(text)) for text in texts])
    seen = worker.evaluate(tokens_BT1)
    for row, text in enumerate(texts):
        new = slice(len(text) - 1 - N_NEW, len(text) - 1)
        np.testing.assert_allclose(made.logprobs[row], -seen.loss_BT[row, new], atol=1e-4)
        assert seen.correct_BT[row, new].all() or not greedy


def test_the_log_probabilities_are_what_evaluation_says_of_the_same_tokens() -> None:
    """Whatever they were drawn by; and what greedy decoding gives, evaluation calls correct."""
    worker = fresh()
    for sampling in (GREEDY, WARM):
        made = worker.generate(PROMPTS, sampling, N_NEW)
        assert_scored_alike(worker, made, greedy=sampling is GREEDY)


def test_a_stop_token_ends_its_prompt_alone_and_is_left_out() -> None:
    worker = fresh()
    whole = worker.generate(PROMPTS, WARM, N_NEW)
    stop = whole.tokens[0][4]
    stopping = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3, stop_ids=(stop, 63))
    for every in (2, N_NEW):
        ended = list(worker.stream(PROMPTS, stopping, N_NEW, every=every))
        for row, tokens in enumerate(whole.tokens):
            n = min([i for i, token in enumerate(tokens) if token in (stop, 63)], default=N_NEW)
            assert sum((piece.tokens[row] for piece in ended), []) == tokens[:n]
            assert sum((piece.logprobs[row] for piece in ended), []) == whole.logprobs[row][:n]


def test_a_stream_ends_when_every_prompt_has_stopped() -> None:
    worker = fresh()
    first = worker.generate([[1]], GREEDY, 1).tokens[0][0]
    stopping = Sampling(temperature=0, stop_ids=(first,))
    assert list(worker.stream([[1]], stopping, N_NEW, every=2)) == [([[]], [[]])]


def test_prompts_that_cannot_be_continued_are_all_told_at_once() -> None:
    prompts = [[1], [], [1] * 10, [64], [2] * 7]
    with pytest.raises(UserError) as told:
        fresh().generate(prompts, GREEDY, N_NEW)
    assert str(told.value).split("; ") == [
        "prompt 1 is empty",
        "give it at least one token, such as the end of text",
        "prompt 2 has 10 tokens and 9 are to follow, but seq is 16: shorten the prompt or ask for "
        "fewer",
        "prompt 3 holds the token id 64, but n_vocab is 64",
    ]
    for prompts, n in (([], 1), ([[1]], 0)):
        with pytest.raises(UserError, match="there must be a prompt, and at least one new token"):
            fresh().generate(prompts, GREEDY, n)


def test_the_last_position_can_be_filled() -> None:
    seq = small.KEYS["seq"]
    made = fresh().generate([[1] * (seq - 1), [1], [2], [3]], GREEDY, 1)
    assert [len(tokens) for tokens in made.tokens] == [1] * 4


def test_training_changes_what_is_generated_from_then_on() -> None:
    worker = fresh()
    before = worker.generate(PROMPTS, GREEDY, N_NEW)
    for step in range(3):
        worker.train(small.tokens(2, 8, small.KEYS["seq"] + 1, seed=step))
    after = worker.generate(PROMPTS, GREEDY, N_NEW)
    assert after.logprobs != before.logprobs
    assert_scored_alike(worker, after, greedy=True)
