"""Where native checkpoints can be kept, and which of them a run keeps."""

from __future__ import annotations

from collections.abc import Iterable

from mesh_transformer.errors import UserError


def check_kept(path: str) -> None:
    """Refuse a place where native checkpoints are neither written nor read.

    Orbax (0.12) takes the path of an s3:// URL for one on the local disk.

    Raises:
        UserError: Says what else there is.
    """
    if path.startswith("s3://"):
        raise UserError(
            f"{path}: native checkpoints are kept on local disks and in gs://, not in s3://: set "
            "model_dir, or --output, to one of these, and copy there what lies in s3://; every "
            "other format is read and written in s3:// too"
        )


def superseded(steps: Iterable[int], *, keep_n: int, keep_every: int | None) -> list[int]:
    """Name the steps to delete, oldest first: neither among the newest nor due to be kept for good.

    Args:
        steps: The steps of all complete checkpoints, in any order.
        keep_n: How many of the newest to keep; at least 1, so the newest always stays.
        keep_every: Every step that is a multiple of this is kept for good (0 is a multiple of
            everything); None keeps none for good.
    """
    problems = []
    if keep_n < 1:
        problems.append(f"keep_n is {keep_n}; it must be 1 or more, the newest is always kept")
    if keep_every is not None and keep_every < 1:
        problems.append(f"keep_every is {keep_every}; it must be 1 or more, or None (off)")
    if problems:
        raise ValueError("; ".join(problems))
    older = sorted(set(steps))[:-keep_n]
    return [step for step in older if keep_every is None or step % keep_every != 0]
