"""Take a pretrained LLaMA through everything, side by side with `transformers`: SmolLM2-135M.

    python examples/smollm2.py smollm2-135m/ runs/smollm2
    python examples/smollm2.py smollm2-135m/ runs/smollm2-3 --cores 3

The first argument is a Hugging Face folder, of any size that this machine has memory for. Its
logits and its greedy continuations of 20 prompts are compared with those of `transformers`, in
float32; it is tuned on the source code of Python's standard library; what comes out is written as a
Hugging Face folder, which `transformers` must compute alike. Needs the extra [parity]; with few
cores OMP_NUM_THREADS=1 keeps its threads from waiting for each other.

Of SmolLM2-135M-Instruct, from weights of 4 bits (Q4_1) made float32, on two CPU cores that other
programs shared, one replica over 1 device, and over 3 with 9 heads and 3 heads of keys: logits
within 1.7e-4 and 1.1e-4, all 20 continuations equal. 50 steps over 1 device took the validation
loss from 2.372 to 2.256, 2.213, 2.178, 2.167 and 2.161 nats per token, and what was written then
differed by 1.5e-4; all of it took 29 minutes, 7 of computing. 10 steps over 3 (`--steps 10`) went
to 2.315, 2.274, 2.260, 2.255 and 2.252.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quickstart_data
import torch
import transformers

from mesh_transformer import config, metrics_file
from mesh_transformer.checkpoints import opening
from mesh_transformer.data import tokenizer
from mesh_transformer.model.decoder import make_model
from mesh_transformer.pod.devices import host_devices
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Sampling, Session
from mesh_transformer.training import loop

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-3
"""Of logits of some tens: float32 rounds sums over hundreds of features, in another order here."""

PROMPTS = (
    *("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at"),
    *("The three primary colours are", "import numpy as np\n", "Dear Sir or Madam,", "2 + 2 ="),
    *("In the beginning", "The mitochondria is", "To be or not to be", "for i in range(10):"),
    *("Photosynthesis is the process", "My favourite food is", "The largest planet is"),
    *("She opened the door and", "Roses are red,", "In 1969,", "The opposite of hot is"),
    "A neural network is",
)


def run_of(folder: str, output: Path, *, cores: int, steps: int, seq: int) -> config.Config:
    """Return a run that tunes the model of a folder on the data that `make_data` makes."""
    every = max(1, steps // 5)
    keys = {
        **{"compute_dtype": "float32", "attention": "xla", "remat": "none", "seq": seq},
        **{"cores_per_replica": cores, "tpu_size": cores, "per_replica_batch": 2},
        **{"lr": 1e-4, "end_lr": 1e-5, "weight_decay": 0.1, "total_steps": steps},
        **{"warmup_steps": every // 2, "anneal_steps": steps - every // 2},
        **{"train_set": f"{output}/data/train.index", "val_batches": 8, "val_every": every},
        **{"val_set": {"val": f"{output}/data/val.index"}, "model_dir": f"{output}/run"},
        **{"ckpt_every": steps, "keep_every": steps, "name": "smollm2"},
    }
    return config.parse(opening.stored_config(folder).to_flat() | keys)


def make_data(run: config.Config, library: Path, output: Path) -> None:
    """Cut the modules of a library into ids of the model's own tokenizer, if that is not done."""
    if (output / "data" / "val.index").exists():
        return
    quickstart_data.write_split(library, output / "texts")
    for side in ("train", "val"):
        where = ("--output-dir", str(output / "data"), "--tokenizer", run.data.tokenizer)
        texts = str(output / "texts" / f"{side}.jsonl")
        command("create_finetune_tfrecords.py", texts, side, *where, "--seq", str(run.model.seq))


def command(script: str, *arguments: str) -> None:
    """Run one of the repository's commands."""
    print("$ python", script, *arguments, flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def largest_difference(worker: Worker, peer: Any, tokens_BT: np.ndarray) -> float:
    """Compare our logits with those of `transformers`, on whatever mesh the worker has."""
    apply = jax.jit(make_model(worker.config.model).apply)
    with jax.set_mesh(worker.mesh):
        ours_BTV, _ = apply(worker.state.params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None])
    with torch.no_grad():
        theirs_BTV = peer(torch.tensor(tokens_BT.astype(np.int64))).logits.numpy()
    return float(np.abs(np.asarray(ours_BTV) - theirs_BTV).max())


def same_continuations(worker: Worker, peer: Any, folder: str, n_new: int = 20) -> int:
    """Count the prompts that both continue by the same tokens, up to the model's own end."""
    tokens, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    stop_ids = opening.end_ids(folder)
    prompts = [tokens.encode(prompt) for prompt in PROMPTS]
    ours = worker.generate(prompts, Sampling(temperature=0, stop_ids=stop_ids), n_new).tokens
    n_same = 0
    for prompt, found in zip(PROMPTS, ours, strict=True):
        asked = theirs(prompt, return_tensors="pt")
        made = peer.generate(**asked, max_new_tokens=n_new, do_sample=False)[0].tolist()
        expected = itertools.takewhile(
            lambda token: token not in stop_ids, made[asked.input_ids.shape[1] :]
        )
        n_same += found == list(expected)
    return n_same


def loss_of(session: Session, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the loss over some batches of tokens and masks, in nats per token."""
    nats, n_tokens = 0.0, 0
    for tokens_BT1, mask_BT in batches:
        nats += float(session.evaluate(tokens_BT1, mask_BT).loss_BT.sum(dtype=np.float64))
        n_tokens += int(mask_BT.sum())  # the last batch may be filled up
    return nats / n_tokens


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", help="Hugging Face folder of the model")
    add("output", type=Path, help="folder to write data, run and tuned model into")
    add("--cores", type=int, default=1, help="devices to split the model over (1)")
    add("--steps", type=int, default=50, help="of tuning, two sequences each (50)")
    add("--seq", type=int, default=128, help="tokens of a sequence (128)")
    add("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="text to tune on")
    args = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", args.cores)  # before reading the folder starts JAX
    run = run_of(args.folder, args.output, cores=args.cores, steps=args.steps, seq=args.seq)
    make_data(run, args.library, args.output)

    devices = host_devices(run)[: args.cores]
    worker, load = Worker(run, devices), transformers.AutoModelForCausalLM.from_pretrained
    worker.load_weights(args.folder)
    peer = load(args.folder, dtype=torch.float32).eval()
    validation = loop.Data(run, args.cores).validation["val"]
    batch = next(iter(validation))[0][:, :-1]
    apart = largest_difference(worker, peer, batch)
    print(f"mesh 1x{args.cores}, {worker.n_parameters:,} parameters")
    print(f"largest difference of logits: {apart:.1e}", flush=True)
    n_same = same_continuations(worker, peer, args.folder)
    print(f"equal greedy continuations: {n_same} of {len(PROMPTS)}", flush=True)
    before = loss_of(worker, itertools.islice(validation, run.run.val_batches))

    (args.output / "run.json").write_text(json.dumps(run.to_flat()))
    files = {"--config": args.output / "run.json", "--tune-model-path": args.folder}
    command("device_train.py", *(str(word) for pair in files.items() for word in pair), "--new")
    tuned, written = run.checkpoint.root, str(args.output / "hf")
    to = ("--output", written, "--format", "hf", "--overwrite")
    command("resharding_example.py", "--input", tuned, *to)
    lines = metrics_file.read(f"{tuned}/{metrics_file.NAME}")
    losses = [before, *(line["val/loss_val"] for line in lines if "val/loss_val" in line)]
    worker.load_weights(tuned)
    apart_again = largest_difference(worker, load(written, dtype=torch.float32).eval(), batch)
    print("validation loss:", " ".join(f"{loss:.3f}" for loss in losses))
    print(f"largest difference of logits, tuned and written: {apart_again:.1e}")
    falls = all(later < earlier for earlier, later in itertools.pairwise(losses))
    if max(apart, apart_again) > TOLERANCE or n_same < len(PROMPTS) or not falls:
        sys.exit("this is not as it should be")


if __name__ == "__main__":
    main()
