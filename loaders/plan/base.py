"""Whether the base is written into the output or the adapter refers to the original."""

from __future__ import annotations

from typing import Literal, TypeAlias

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tensors import TORCH_NAMES
from ..decision import Decision
from ..errors import UsageError
from ..flags.request import Request
from ..model.skeleton import Skeleton

Base: TypeAlias = Literal["copy", "reference"]


def choose_base(
    request: Request, checkpoint: Checkpoint, skeleton: Skeleton, *, quantised: bool, changed: bool
) -> tuple[Base, tuple[Decision, ...]]:
    """For a strategy with an adapter: the original where it can be trained on as it stands, or as `--base` asks.

    Raises `UsageError` for `--base reference` where it can't.
    """
    changes = _changes(request, checkpoint, skeleton, quantised=quantised, changed=changed)
    if request.base in ("copy", "link") or (request.base == "auto" and changes):
        return "copy", ()
    unusable = [change for change in changes if not change.startswith("dtype")]
    if unusable:
        raise UsageError(
            f"`--base reference`: the original can't serve as the base: {unusable[0]}", hint="use --base copy"
        )
    if not changes:
        return "reference", ()
    decision = Decision(
        what="dtype of the base", requested="bfloat16", effective=changes[0].removeprefix("dtype: "),
        reason="`--base reference` leaves the base as it is; `load_prepared` loads it as bfloat16",
    )  # fmt: skip
    return "reference", (decision,)


def _changes(
    request: Request, checkpoint: Checkpoint, skeleton: Skeleton, *, quantised: bool, changed: bool
) -> list[str]:
    """Why the original can't be trained on as it stands."""
    changes = []
    if quantised:
        changes.append("it is quantised")
    if changed:
        changes.append("the adapter's initial values are taken out of its weights")
    if request.merge_adapters:
        changes.append("an adapter is merged into it")
    if skeleton.rows_after != skeleton.rows_before:
        changes.append("its embeddings are resized")
    if skeleton.left_out is not None:
        changes.append(f"it is a `{skeleton.left_out.whole}`")
    decoded = next((tensor for tensor in checkpoint.packed if not tensor.stays_packed), None)
    if decoded is not None and decoded.format is not None:
        changes.append(f"its weights are stored as {decoded.format.name} (`{decoded.name}`)")
    if checkpoint.pickled:
        changes.append("it is pickled")
    if request.config_name is not None or request.config_overrides:
        changes.append("its configuration is changed")
    if any(tensor.conversion is not None for tensor in skeleton.tensors):
        changes.append("its tensors are stored in another layout")
    dtypes = {source.dtype for tensor in skeleton.tensors for source in tensor.sources if source.dtype != tensor.dtype}
    if dtypes:
        changes.append(f"dtype: {' '.join(sorted(TORCH_NAMES[code] for code in dtypes))}")
    return changes
