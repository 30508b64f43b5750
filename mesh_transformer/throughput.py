"""What training costs in floating-point operations, and how much of the hardware's peak it uses.

Model FLOPs utilisation (MFU) after PaLM, arXiv:2204.02311, appendix B:

    MFU = tokens per second x FLOPs per token / peak FLOPs per second of all devices
    FLOPs per token = 6 N + 12 L H K S

N counts the weights that multiply activations: attention, feed-forward and its gate, the head, and
what projects embeddings to features and back. A tied head multiplies by the embeddings' table,
which counts; embeddings and learned positions are looked up, not multiplied, and count nothing, and
biases and norms are left out as well. 12 L H K S is attention as if every token saw S tokens: all
T, or those of a layer's window. Like PaLM it is not halved for the causal mask. An encoder's work
on the tokens that it is fed is counted with the tokens that are trained, the decoder's.
Recomputation (rematerialisation) is work, but not the model's, and is not counted.
"""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Callable, Iterator

from mesh_transformer.config import ModelConfig
from mesh_transformer.network import HEAD_QK_FEATURES, SGU_WIDTH


def matmul_parameters(model: ModelConfig) -> int:
    """Count the weights that multiply activations in a decoder: N of the formula above.

    With a static SGU attention reads and writes half of the features; Head-QK has two matrices.
    """
    attention = 2 * model.d_attended * (model.n_heads + model.n_kv_heads) * model.d_head
    feed_forward = (3 if model.gated else 2) * model.d_model * model.d_ff
    projections = 2 * model.d_embed * model.d_model if model.d_embed != model.d_model else 0
    head = model.d_embed * model.n_vocab
    head += 2 * model.d_model * HEAD_QK_FEATURES if model.head_qk_trick else 0
    return model.layers * (attention + feed_forward) + projections + head


def train_flops_per_token(model: ModelConfig, length: int | None = None) -> float:
    """Count the operations of forward and backward pass per trained token: 6 N + 12 L H K S.

    A static SGU adds 2 L (D / 2) S', S' being S up to its width: forward alone, as no gradient
    flows back. Head-QK adds 6 S times its features; that its products fall on logits adds nothing.

    Args:
        length: Of sequences; the model's `seq` if None. An encoder's are as long as they may be.
    """
    length = length or model.seq
    if model.encoder_layers:
        return _with_encoder(model, length)
    n_local = model.layers // model.window_every if model.window else 0
    seen = (model.layers - n_local) * length + n_local * min(model.window, length)
    attention = 12 * model.n_heads * model.d_head * seen
    if model.use_static_sgu:
        attention += min(SGU_WIDTH, length) * model.layers * model.d_model
    if model.head_qk_trick:
        attention += 6 * HEAD_QK_FEATURES * length
    return float(6 * matmul_parameters(model) + attention)


def _with_encoder(model: ModelConfig, n_targets: int) -> float:
    """Count as above for two stacks: N of each times its own tokens, attention to S tokens in T."""
    d_model, n_sources = model.d_model, model.encoder_seq
    width, kv_width = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    read, write = 2 * d_model * kv_width, 2 * d_model * width  # keys and values; queries and back
    feed_forward = (3 if model.gated else 2) * d_model * model.d_ff
    projection = model.d_embed * d_model if model.d_embed != d_model else 0
    of_sources = model.encoder_layers * (read + write + feed_forward) + model.layers * read
    of_sources += projection
    of_targets = model.layers * (read + 2 * write + feed_forward)
    of_targets += 2 * projection + model.d_embed * model.n_vocab
    attended = model.encoder_layers * n_sources**2
    attended += model.layers * n_targets * (n_targets + n_sources)
    whole = 6 * (of_sources * n_sources + of_targets * n_targets) + 12 * width * attended
    return whole / n_targets


def mfu(
    tokens_per_second: float, flops_per_token: float, peak_flops_per_second: float | None
) -> float | None:
    """Fraction of the peak that the model's own arithmetic uses; None where the peak is unknown."""
    if peak_flops_per_second is None:
        return None
    return tokens_per_second * flops_per_token / peak_flops_per_second


# Dense peaks in FLOP/s, bfloat16 in and float32 accumulated (float16 where there is no bfloat16),
# of one JAX device: a core on TPU v2, v3 and 7x (two to a chip), a chip on the others.
# TPU: cloud.google.com/tpu/docs, one page a version. NVIDIA: data sheets, "with sparsity" halved.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"TPU v2", 45e12 / 2),
    (r"TPU v3", 123e12 / 2),
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x", 2307e12 / 2),
    (r".*\bGB200\b.*", 2500e12),
    (r".*\bB200\b.*", 2250e12),
    (r".*\bH200 NVL\b.*", 835e12),
    (r".*\b(H200|GH200)\b.*", 989e12),
    (r".*\bH100 PCIe\b.*", 756e12),
    (r".*\bH100 NVL\b.*", 835e12),
    (r".*\bH100\b.*", 989e12),
    (r".*\bA100\b.*", 312e12),
    (r".*\bL40S\b.*", 362e12),
    (r".*\bL4\b.*", 121e12),
    (r".*\bA10G\b.*", 70e12),
    (r".*\bV100\b.*", 125e12),
    (r".*\bT4\b.*", 65e12),
    (r".*\bRTX 4090\b.*", 165.2e12),
    (r".*\bRTX 3090\b.*", 71e12),
)


def peak_flops_per_device(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by its `jax.Device.device_kind`; None where it is not known.

    A slice of a GPU (MIG) has a peak of its own that its name does not tell: None.
    """
    if re.search(r"\bMIG\b", device_kind):
        return None
    for pattern, peak in _PEAKS:
        if re.fullmatch(pattern, device_kind, flags=re.IGNORECASE):
            return peak
    return None


class Pace:
    """Seconds per step. The first step, which compiles, starts the clock and is not timed itself.

    Args:
        clock: Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: float | None = None
        self._last = 0.0
        self._done = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=20)

    def tick(self, size: int = 1, *, compiled: bool = False) -> float | None:
        """Note the end of a step; how long it took, or None for the first.

        Args:
            size: Of the step, in what unit the caller likes.
            compiled: Whether it is the first of its kind: it is not timed either, and the pace of
                those before it is no longer the recent one.
        """
        now = self._clock()
        seconds = now - self._last
        self._last = now
        if self._first is None:
            self._first = now
            return None
        self._done += size
        if compiled:
            self._recent.clear()
            return None
        self._recent.append(seconds)
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the `with` block out of the step it falls in."""
        start = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - start

    @property
    def recent_seconds(self) -> float | None:
        """Mean of the last 20 steps, pauses left out; None before the second step."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def wall_seconds(self) -> float | None:
        """Mean over all steps per unit of size, pauses included; None before the second step."""
        if self._first is None or not self._done:
            return None
        return (self._clock() - self._first) / self._done
