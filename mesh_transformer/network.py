"""The network's section of a configuration: its keys, checked, as a frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from mesh_transformer.schema import Count, Limit, Natural, NonNegative, Positive, Rate, Text
from mesh_transformer.sections import DERIVED, Section

Norm = Literal[
    "layernorm", "layernorm-nobias", "layernorm-desync",
    "rmsnorm", "rmsnorm-bias", "scalenorm", "scalenorm-bias",
    "rmsnorm-mean", "rmsnorm-mean-plus-one",
]  # fmt: skip
Positions = Literal["rotary", "rotary-half", "t5", "fixed", "sinusoidal", "alibi", "none"]
Residual = Literal["parallel", "parallel-untied", "sequential", "post-norm"]
Activation = Literal[
    "gelu_new", "gelu", "quick_gelu", "silu", "relu", "relu_squared", "mish", "sigmoid", "tanh"
]

SGU_WIDTH = 128
"""Tokens that `use_static_sgu` mixes into one, itself included."""

HEAD_QK_FEATURES = 256
"""Of each query and key of `head_qk_trick`, and what their products are divided by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network; keys left out make it GPT-J.

    Attributes:
        layers: Of the decoder.
        d_model: Features of a token between layers.
        n_heads: Of queries.
        n_vocab: Rows of the embedding and columns of the head; a multiple of `cores_per_replica`.
        n_tokens: Ids that the tokenizer can emit; rows from `n_tokens` to `n_vocab` are padding and
            are never sampled. Left out: the size of a tokenizer known here, at most `n_vocab`.
        seq: Tokens fed at once; a training record holds one more.
        encoder_layers: Of an encoder, to whose output the decoder's layers attend; 0: without one.
        encoder_seq: Tokens that the encoder is fed, the first of a record. Left out: seq.
        pad_id: The token that fills up what an encoder and its decoder are fed. It is never seen
            nor learned, and begins what the decoder is fed.
        d_head: Features per head. Left out: d_model / n_heads.
        n_kv_heads: Heads of keys and values, each shared by as many query heads as there are times
            more of those. Left out: n_heads.
        d_ff: Hidden features of the feed-forward layer. Left out: 4 d_model.
        residual: How a block adds its branches: both from one norm, both each from its own norm,
            one after the other, or one after the other with the norm after the sum. "parallel" is
            what fattorib/transformer calls `fused_residuals`.
        norm: Of mesh-transformer-jax all but the last two, which divide by the root of the mean
            square; "plus-one" multiplies by 1 + scale.
        norm_epsilon: Added to a norm's variance or mean square, or to the original's lengths.
        final_norm: Whether the last block is followed by a norm.
        pe: Position encoding; "fixed" is a learned table, as the original's name had it. "rotary"
            turns neighbouring features, "rotary-half" feature i and the one half a head further.
        pe_rotary_dims: Features of each head that rotary positions turn. Left out: all.
        pe_theta: Base of their wavelengths.
        pe_scaling: How they are stretched beyond the length they were trained with.
        pe_scaling_factors: By how much, in the words of Hugging Face's `rope_scaling`: those that
            `position_rules` lists for each.
        pe_offset: Rows of the "fixed" table before that of the first position.
        pe_buckets: Of "t5": biases of a head. An encoder uses half of them for either direction.
        pe_max_distance: Of "t5": from where on all distances share one.
        window: Slots that a query sees, itself included; 0 (or `seq` and more): all before it.
        window_every: The window is that of each layer whose number, from 1, this divides.
        attention_scale: Factor of the products of queries and keys. Left out: 1 / sqrt(d_head);
            with muP mup_attention_alpha sqrt(mup_base_d_head) / d_head.
        qk_norm: Whether queries and keys are normalised per head, by "rmsnorm-mean".
        activation: Of the feed-forward layer.
        gated: Whether the activation is of a second product and multiplies the first (GLU).
        qkv_bias: Whether queries, keys and values have a bias; so `o_bias`, `ff_bias`,
            `embed_bias`, `head_bias`.
        tie_embeddings: Whether the head's weights are the embeddings.
        embed_norm: Whether embeddings are normalised.
        embed_scale: Factor of embeddings, before positions are added.
        d_embed: Features of an embedding, projected to and from d_model. Left out: d_model.
        output_scale: Factor of the logits, before their bias is added. Left out: 1; with muP
            mup_output_alpha mup_base_d_model / d_model.
        mup_base_d_model: The d_model for which lr and the other hyperparameters were found, to be
            kept at this one (muP: see `model.mup`); 0: the standard parametrisation. With it go
            `mup_base_d_ff` and `mup_base_d_head`, the base's d_ff and d_head.
        mup_attention_alpha: Factor of the products of queries and keys, of all widths; so
            `mup_output_alpha`, of the logits.
        compute_dtype: Of weights in use and activations; master weights are always float32.
        remat: What the backward pass computes anew: whole layers, all but matrix products, nothing.
        unroll: Layers computed in one round of the loop over layers; all of them need no loop. More
            run faster on CPUs and take longer to compile, and the compiler may then keep what
            `remat` says to compute anew.
        attention: Implementation; "auto" takes the best that the device has.
        z_loss: Weight of log(Z)^2 in the training loss, which keeps the logits from drifting.
        dropout_embedding: Share of the numbers of embeddings, positions added, that training sets
            to 0 at random; so `dropout_attention` of attention's weights, and `dropout_residual` of
            what each attention and each feed-forward layer adds to its input. Weights read from
            other libraries come with rates of 0, whatever they were trained with.
        use_static_sgu: Whether attention is of half of the features, with heads half as wide, and
            the other half are mixed with those of the 127 tokens before by fixed weights.
        head_qk_trick: Whether one more head raises logits of tokens that were seen before.
    """

    layers: Count
    d_model: Count
    n_heads: Count
    n_vocab: Count
    seq: Annotated[int, Limit(lambda n: n >= 2, "2 or more")]
    encoder_layers: Natural = 0
    encoder_seq: Natural = DERIVED
    pad_id: Natural = 0
    residual: Residual = "parallel"
    norm: Norm = "layernorm"
    norm_epsilon: Positive = 1e-5
    final_norm: bool = True
    pe: Positions = "rotary"
    pe_rotary_dims: Natural = DERIVED
    pe_theta: Positive = 10_000.0
    pe_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    pe_scaling_factors: Mapping[Text, float] = dataclasses.field(default_factory=dict, hash=False)
    pe_offset: Natural = 0
    pe_buckets: Count = 32
    pe_max_distance: Count = 128
    d_head: Count = DERIVED
    n_kv_heads: Count = DERIVED
    window: Natural = 0
    window_every: Count = 1
    attention_scale: Positive = DERIVED
    qk_norm: bool = False
    d_ff: Count = DERIVED
    activation: Activation = "gelu_new"
    gated: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    ff_bias: bool = True
    embed_bias: bool = True
    head_bias: bool = True
    tie_embeddings: bool = False
    embed_norm: bool = False
    embed_scale: Positive = 1.0
    d_embed: Count = DERIVED
    output_scale: Positive = DERIVED
    mup_base_d_model: Natural = 0
    mup_base_d_ff: Natural = 0
    mup_base_d_head: Natural = 0
    mup_attention_alpha: Positive = 1.0
    mup_output_alpha: Positive = 1.0
    n_tokens: Count = DERIVED
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["full", "dots", "none"] = "full"
    unroll: Count = 1
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    z_loss: NonNegative = 1e-4
    dropout_embedding: Rate = 0.0
    dropout_attention: Rate = 0.0
    dropout_residual: Rate = 0.0
    use_static_sgu: bool = False
    head_qk_trick: bool = False

    @property
    def d_mixed(self) -> int:
        """Features that a static SGU mixes: the first half; without one 0."""
        return self.d_model // 2 if self.use_static_sgu else 0

    @property
    def d_attended(self) -> int:
        """Features that attention reads and writes: those that are not mixed."""
        return self.d_model - self.d_mixed
