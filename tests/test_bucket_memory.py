"""What conversions to and from buckets hold in memory: parts of files, whatever their length."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from processes import ended

from mesh_transformer import storage

# A file of 4 arrays of 96 MiB. Writing to clear_refs resets a process's peak: see proc(5).
PROGRAM = """
    import pathlib, re, sys
    import numpy as np
    from mesh_transformer.checkpoints import npz, safetensors
    from mesh_transformer.checkpoints.source import Array

    folder, format = sys.argv[1:]
    array = Array((3 * 2**23,), np.dtype(np.float32))

    def filled(name):
        return np.full(array.shape, float(name), array.dtype)

    def write(path, n):
        if format == "safetensors":
            safetensors.write(path, {str(i): array for i in range(n)}, filled)
        else:
            with npz.Writer(path) as archive:
                for i in range(n):
                    archive.add(filled(i))

    def read(path, n):
        if format == "safetensors":
            for name, stored in safetensors.read_header(path).items():
                assert (stored.read() == float(name)).all()
        else:
            for i, member in enumerate(npz.members(path)):
                assert (npz.read(member) == i).all()

    def peak(work, n):
        status = pathlib.Path("/proc/self/status")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = int(re.search(r"VmRSS:\\s+(\\d+)", status.read_text())[1])
        work(f"{folder}/{n}", n)
        return (int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) - before) // 1024

    for work in (write, read):
        work(f"{folder}/1", 1)  # what is imported and connected once
        print(work.__name__, peak(work, 4))
"""
ARRAY, PART = 96, 32  # MiB
AT_MOST = ARRAY + 3 * PART + 16
"""MiB: an array, a part as it waits, as it is passed on and as it is sent, and what is spilt."""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_a_file_of_hundreds_of_megabytes_takes_memory_for_parts_of_it(
    remote: str, format: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), remote, format],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    status, output, told = ended(process)
    assert status == 0, told
    peaks = {name: int(mib) for name, mib in (line.split() for line in output.splitlines())}
    assert storage.size(f"{remote}/4") > 4 * ARRAY * 2**20
    assert peaks.keys() == {"write", "read"}
    assert max(peaks.values()) < AT_MOST, peaks
