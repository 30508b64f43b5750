"""Loading holds in host memory what the devices keep there and little more, whatever the format."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mesh_transformer.checkpoints import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells of peak memory"),
]

N_ARRAYS, ARRAY_MB = 12, 64
# CPU devices keep their arrays in host memory: so much is needed anyway.
KEPT = N_ARRAYS * ARRAY_MB

MEASURED = f"""
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp
    import numpy as np
    from mesh_transformer.checkpoints import layout, native_source, native_writer, placing, reading
    from mesh_transformer.checkpoints.source import PARAMS, Array, Key

    way, folder = sys.argv[1:]
    n_layers, shape = 4, (2048, 2048)  # four layers of 16 MB in an array
    reading._READ_GB = 0.01  # all arrays together are smaller than what it allows otherwise


    class Made:
        where, about, step, counts, known = "memory", "made up", 0, None, {{}}

        def __init__(self, n):
            self.arrays = {{
                Key(PARAMS, f"layers/block/w{{i}}/w", layer): Array(shape, np.dtype(np.float32))
                for i in range(n)
                for layer in range(n_layers)
            }}

        def read(self, key):
            return np.full(shape, key.layer, np.float32)


    def high():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


    def loaded(n):
        mesh = jax.make_mesh((len(jax.devices()),), ("mp",))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "mp"))
        leaf = jax.ShapeDtypeStruct((n_layers, *shape), jnp.float32, sharding=place)
        wanted = {{f"layers/block/w{{i}}": {{"w": leaf}} for i in range(n)}}
        if way == "restore":
            return reading.restore_params(f"{{folder}}/step_{{n}}", wanted)
        source = native_source.NativeSource(f"{{folder}}/step_{{n}}")
        return placing.place_params(source, wanted, lambda n: None)


    if way == "write":
        for n in (1, {N_ARRAYS}):
            native_writer.write(f"{{folder}}/step_{{n}}", Made(n), extra={{}})
    else:
        del_me = loaded(1)  # what is compiled, and TensorStore's threads
        before = high()
        del del_me
        arrays = loaded({N_ARRAYS})
        grown = high() - before  # to look at an array is to gather it in host memory
        for tree in arrays.values():
            assert (np.asarray(tree["w"])[:, 0, 0] == np.arange(n_layers)).all()
        print(grown)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    measured("write", folder)
    return folder


@pytest.mark.parametrize("n_devices", [1, 4])
@pytest.mark.parametrize("way", ["restore", "place"])
def test_loading_takes_an_array_or_two_beyond_what_the_devices_keep(
    way: str, n_devices: int, folder: Path
) -> None:
    grown = float(measured(way, folder, n_devices))
    assert KEPT - 2 * ARRAY_MB < grown < KEPT + 4 * ARRAY_MB, grown


def measured(way: str, folder: Path, n_devices: int = 1) -> str:
    freed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    freed["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_devices}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), way, folder],
        env=os.environ | freed | {"PYTHONPATH": str(Path(native.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
