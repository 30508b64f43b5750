"""The house: its rows of modules, and who may use what is heavy."""

from __future__ import annotations

# A module imports from rows above it, and from what stands to the left of it in its own group.
# Names that no file has yet are places kept free.
ROWS: tuple[tuple[str, ...], ...] = (
    (
        "errors schema relations encoder_rules position_rules network_rules rules sections network"
        " config",
        "session",
        "records",
    ),
    (
        "sharding",
        "buckets storage noise_scale throughput progress trackers metrics_file metrics plot",
    ),
    (
        "model model.mup model.initial model.positions model.dropout model.attention model.layers"
        " model.mixing model.block model.stack model.copying model.weights model.loss"
        " model.sampling",
    ),
    ("model.encoder model.decoder",),
    (
        "training training.memory training.as_original training.optimizer training.examples"
        " training.gradients training.steps",
    ),
    (
        "checkpoints checkpoints.fingerprint checkpoints.retention checkpoints.layout"
        " checkpoints.reading checkpoints.native checkpoints.source checkpoints.pieces"
        " checkpoints.native_source checkpoints.fitting checkpoints.native_writer"
        " checkpoints.roles checkpoints.npz checkpoints.original checkpoints.original_writer"
        " checkpoints.original_run checkpoints.fused"
        " checkpoints.safetensors checkpoints.pytorch checkpoints.family checkpoints.family_keys"
        " checkpoints.gpt_families checkpoints.llama_families checkpoints.t5_family"
        " checkpoints.families checkpoints.tensors checkpoints.named checkpoints.renaming"
        " checkpoints.huggingface checkpoints.flax_files checkpoints.flax_writer"
        " checkpoints.jaxseq checkpoints.zero_transformer checkpoints.zero_writer"
        " checkpoints.gguf_files checkpoints.cerebras_family checkpoints.cerebras"
        " checkpoints.cerebras_writer checkpoints.foreign checkpoints.placing"
        " checkpoints.opening checkpoints.places checkpoints.conversion checkpoints.averaging"
        " checkpoints.deepening",
        "data data.cleaning data.framing data.documents data.tokenizer data.borders"
        " data.tokenizer_files data.packing data.pairs data.dataset data.tfrecord data.jsonl"
        " data.webdataset data.encoding data.batches data.prepare",
    ),
    ("pod", "pod.checks pod.prompts pod.devices pod.worker pod.host"),
    ("pod.machines pod.cluster pod.startup pod.tpu_api pod.tpu_vm pod.slices",),
    (
        "training.goodput training.loop training.recovery driver",
        "harness",
        "serving serving.text serving.loading serving.engine serving.http",
        "resharding plan",
    ),
)

# Heavy or optional packages, and the only modules of the library that may import them.
OWNERS = {
    "tensorflow": {"data.tfrecord"},
    "ray": {"pod.machines", "pod.cluster"},
    "google.cloud.tpu": {"pod.tpu_api"},
    "google.cloud.storage": {"buckets"},
    "lm_eval": {"harness"},
    "tensorboard": {"trackers"},
    "wandb": {"trackers"},
    "torch": {"checkpoints.pytorch"},
    "gguf": {"checkpoints.gguf_files"},
    "transformers": set(),
}
