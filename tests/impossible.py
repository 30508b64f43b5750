"""What is wrong with configurations, and the sentences that say so."""

from __future__ import annotations

WITH_ENCODER = {"encoder_layers": 2, "residual": "sequential", "pe": "t5"}

BASE = {"mup_base_d_model": 32, "mup_base_d_ff": 128, "mup_base_d_head": 8}
"""Of which the minimal configuration is twice as wide."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"original_max_position_embeddings": 16.0}
OF_STRETCHED_POSITIONS: list[tuple[dict, str]] = [
    (
        {"pe_scaling": "linear", "pe_scaling_factors": {"factor": 2.0, "facter": 2.0, "x": 1.0}},
        "pe_scaling 'linear' takes pe_scaling_factors factor, not facter; did you mean 'factor'?, "
        "not x",
    ),
    (
        {"pe_scaling_factors": {"factor": 2.0}},
        "pe_scaling_factors has factor, and pe_scaling is 'none', which takes none; set "
        "pe_scaling, or leave pe_scaling_factors out",
    ),
    (
        {"pe_scaling": "yarn", "pe_scaling_factors": LONG | {"factor": 0.0, "beta_slow": -1.0}},
        "pe_scaling_factors has factor 0.0 and beta_slow -1.0; each must be a number above 0",
    ),
    (
        {"pe_scaling": "llama3", "pe_scaling_factors": LLAMA3 | LONG | {"low_freq_factor": 4.0}},
        "pe_scaling_factors has low_freq_factor 4.0 and high_freq_factor 4.0, between which "
        "'llama3' stretches little by little; low_freq_factor must be the lower one",
    ),
    (
        {"pe_scaling": "yarn", "pe_scaling_factors": LONG | {"factor": 2.0, "beta_slow": 33.0}},
        "pe_scaling_factors has beta_slow 33.0 and beta_fast 32.0, between which 'yarn' stretches "
        "little by little; beta_slow must be the lower one",
    ),
    (
        {"pe_scaling": "yarn", "pe_theta": 1.0, "pe_scaling_factors": LONG | {"factor": 2.0}},
        "pe_scaling 'yarn' finds pairs of features by their wavelengths, which pe_theta 1.0 does "
        "not make grow; raise pe_theta above 1",
    ),
]

OF_THE_MODEL: list[tuple[dict, str]] = [
    (
        {"pe_rotary_dims": 18},
        "pe_rotary_dims 18 must be an even number from 2 to d_head 16, since rotary positions turn "
        "pairs of features within a head",
    ),
    (
        {"pe_rotary_dims": 5},
        "pe_rotary_dims 5 must be an even number from 2 to d_head 16, since rotary positions turn "
        "pairs of features within a head",
    ),
    (
        {"pe_rotary_dims": 0},
        "pe_rotary_dims 0 must be an even number from 2 to d_head 16, since rotary positions turn "
        "pairs of features within a head",
    ),
    (
        {"n_kv_heads": 3},
        "n_kv_heads 3 does not divide n_heads 4, so query heads cannot share them evenly; "
        "1, 2, 4 would",
    ),
    (
        {"n_kv_heads": 1, "d_head": 2, "cores_per_replica": 4, "pe_rotary_dims": 2},
        "cores_per_replica 4 does not divide the 2 features of keys (n_kv_heads 1 of d_head 2); "
        "1, 2 would",
    ),
    (
        {"d_embed": 3, "tpu_size": 2},
        "zero_stage 1 cannot spread d_embed 3 over 2 replicas; set zero_stage to 0 or change "
        "d_embed",
    ),
    (
        {"pe_scaling": "llama3", "pe_scaling_factors": {"factor": 8.0}},
        "pe_scaling 'llama3' needs pe_scaling_factors with factor, low_freq_factor, "
        "high_freq_factor, original_max_position_embeddings",
    ),
    *OF_STRETCHED_POSITIONS,
    (
        {"residual": "post-norm"},
        "residual 'post-norm' ends with a norm, so that final_norm must be false",
    ),
    (
        {"encoder_layers": 2, "residual": "sequential", "window": 3},
        "encoder_layers 2 needs pe 't5', not 'rotary'; window 0, not 3",
    ),
    (
        {**WITH_ENCODER, "attention": "splash"},
        "encoder_layers 2 needs attention 'auto' or 'xla', not 'splash'",
    ),
    (
        {"encoder_layers": 2, "pe": "t5"},
        "encoder_layers 2 needs residual 'sequential', not 'parallel'",
    ),
    (
        {**WITH_ENCODER, "dropout_embedding": 0.1, "dropout_attention": 0.2},
        "encoder_layers 2 needs dropout_embedding 0.0, not 0.1; dropout_attention 0.0, not 0.2",
    ),
    (
        {**WITH_ENCODER, "dropout_residual": 0.1, "head_qk_trick": True},
        "encoder_layers 2 needs dropout_residual 0.0, not 0.1; head_qk_trick false, not true",
    ),
    (
        {**WITH_ENCODER, "residual": "parallel", "use_static_sgu": True},
        "encoder_layers 2 needs residual 'sequential', not 'parallel'; use_static_sgu false, not "
        "true",
    ),
    (
        WITH_ENCODER | BASE,
        "encoder_layers 2 needs mup_base_d_model 0, not 32",
    ),
    (
        {"encoder_seq": 9},
        "encoder_seq 9 and pad_id 0 are of an encoder, and encoder_layers is 0; set "
        "encoder_layers, or leave them out",
    ),
    (
        {"pad_id": 1},
        "encoder_seq 0 and pad_id 1 are of an encoder, and encoder_layers is 0; set "
        "encoder_layers, or leave them out",
    ),
    (
        {**WITH_ENCODER, "encoder_seq": 0},
        "encoder_layers 2 needs an encoder_seq of 1 or more",
    ),
    (
        {**WITH_ENCODER, "pad_id": 512},
        "pad_id 512 is no token of n_vocab 512; lower it to 511 or less",
    ),
    (
        {"pe": "t5", "pe_buckets": 40, "pe_max_distance": 20},
        "pe_buckets 40 with pe_max_distance 20: the first 20 distances have a bucket each, which "
        "must be 1 or more, and fewer than pe_max_distance",
    ),
    (
        {**WITH_ENCODER, "pe_buckets": 3},
        "pe_buckets 3 with pe_max_distance 128: the first 0 distances have a bucket each, which "
        "must be 1 or more, and fewer than pe_max_distance",
    ),
    (
        {"pe_max_distance": 64},
        "pe_buckets 32 and pe_max_distance 64 are of pe 't5', and pe is 'rotary'; leave them out",
    ),
    (
        {"window": 8, "attention": "splash"},
        "attention 'splash' sees all slots before a query, not a window of 8; set attention to "
        "'auto' or 'xla'",
    ),
    (
        {"window_every": 2},
        "window_every 2 has no effect without a window; set window or leave window_every out",
    ),
    (
        {"window": 8, "window_every": 3},
        "window_every 3 is more than layers 2, so that no layer has the window of 8; lower it to 2 "
        "or less, or leave window and window_every out",
    ),
    (
        {"pe_offset": 2},
        "pe_offset 2 is of the table that pe 'fixed' has, and pe is 'rotary'; leave pe_offset out",
    ),
    (
        {"pe": "none", "pe_theta": 5e5},
        "pe_theta 500000.0 is of rotary positions, and pe is 'none'; leave pe_theta out",
    ),
    (
        {"pe": "alibi", "pe_scaling": "linear", "pe_scaling_factors": {"factor": 2.0}},
        "pe_scaling 'linear' is of rotary positions, and pe is 'alibi'; leave pe_scaling out",
    ),
    (
        {"dropout_attention": 0.1, "attention": "splash"},
        "attention 'splash' drops no weights, and dropout_attention is 0.1; set attention to "
        "'auto' or 'xla'",
    ),
    (
        {"use_static_sgu": True, "residual": "sequential"},
        "use_static_sgu splits what a parallel block reads, and residual is 'sequential'; set "
        "residual to 'parallel'",
    ),
    (
        {"use_static_sgu": True, "n_heads": 64},
        "n_heads 64 does not divide half of d_model 64, which attention is of beside "
        "use_static_sgu; change one of them or set d_head",
    ),
    (
        {"use_static_sgu": True, "tpu_size": 64},
        "use_static_sgu halves d_model 64, and zero_stage 1 cannot spread 32 features over 64 "
        "replicas, which do not divide them; set zero_stage to 0 or change d_model",
    ),
    (
        {"use_static_sgu": True, "d_model": 63},
        "use_static_sgu halves d_model 63, which is odd; change d_model",
    ),
    (
        {"use_static_sgu": True, "d_model": 63, "d_head": 8},
        "use_static_sgu halves d_model 63, which is odd; change d_model",
    ),
    (
        {"mup_base_d_model": 32, "mup_base_d_head": 8},
        "mup_base_d_model and mup_base_d_head without mup_base_d_ff: muP needs all three sizes of "
        "the base; give them or none",
    ),
    (
        BASE | {"attention_scale": 0.25},
        "attention_scale 0.25 is not what muP makes it, mup_attention_alpha sqrt(mup_base_d_head) "
        "/ d_head = 0.1767766952966369; leave it out and set mup_attention_alpha",
    ),
    (
        BASE | {"output_scale": 1.0},
        "output_scale 1.0 is not what muP makes it, mup_output_alpha mup_base_d_model / d_model = "
        "0.5; leave it out and set mup_output_alpha",
    ),
    (
        {"mup_attention_alpha": 4.0},
        "mup_attention_alpha 4.0 is of muP, and there is no mup_base_d_model; give one, or set "
        "attention_scale",
    ),
    (
        {"mup_output_alpha": 2.22},
        "mup_output_alpha 2.22 is of muP, and there is no mup_base_d_model; give one, or set "
        "output_scale",
    ),
    (
        BASE | {"norm": "rmsnorm"},
        "norm 'rmsnorm' has a scale that is as large as the root of d_model, which muP keeps from "
        "growing; set norm to 'layernorm' or 'rmsnorm-mean', or leave the mup keys out",
    ),
    (
        BASE | {"head_qk_trick": True},
        "head_qk_trick has as many features at any d_model, and muP has no rule for them; leave it "
        "out, or the mup keys",
    ),
    (
        BASE | {"d_embed": 32},
        "d_embed 32 is not d_model 64, and muP has no rule for what projects one to the other; "
        "leave d_embed out, or the mup keys",
    ),
    (
        BASE | {"original_shards": 8},
        "original_shards 8 cannot be followed: attention_scale is 0.1767766952966369, 0.25 in "
        "mesh-transformer-jax; output_scale is 0.5, 1.0 in mesh-transformer-jax; mup_base_d_model "
        "is 32, 0 in mesh-transformer-jax; leave original_shards out",
    ),
]
"""What is impossible in a network, and the sentences that say so."""

OF_LENGTHS: list[tuple[dict, str]] = [
    (
        {"seq_warmup": [[2, 16], [2, 8]]},
        "seq_warmup has stages of 16, 8 tokens, which must grow, up to seq 32",
    ),
    (
        {"seq_warmup": [[2, 16], [2, 32]]},
        "seq_warmup has stages of 16, 32 tokens, which must grow, up to seq 32",
    ),
    (
        {"seq_warmup": [[2, 128], [2, 200]], "seq": 256, "attention": "splash"},
        "attention 'splash' takes multiples of 128 tokens, and seq_warmup has stages of 128, 200; "
        "change them or set attention to 'auto'",
    ),
    (
        {**WITH_ENCODER, "seq_warmup": [[2, 16]]},
        "seq_warmup has stages of a decoder alone, and encoder_layers is 2; leave seq_warmup out",
    ),
]
"""And in stages of `seq_warmup`."""

DOUBTS_OF_LENGTHS: list[tuple[dict, str]] = [
    (
        {"seq_warmup": [[4, 8], [6, 16]]},
        "seq_warmup has 10 steps, and total_steps is 10, so that no step trains on seq 32",
    ),
]
"""What stages of `seq_warmup` may not be meant."""
