"""What Open Instruct will refuse when training starts: a warning now, as nothing that is prepared depends on it."""

from __future__ import annotations

from .declared import FlatArguments, all_flags


def training_warnings(flat: FlatArguments) -> tuple[str, ...]:
    """Return a warning for each check of the training script that these arguments don't pass.

    The checks are those of `FlatArguments.__post_init__` in open_instruct/finetune.py, in any version since July 2025.
    """
    refused: list[str] = []
    named = [name for name in ("dataset_name", "dataset_mixer") if getattr(flat, name) is not None]
    if named:
        # dataset_mixer_list always has a value: with it, either of the others is one too many
        is_default = flat.dataset_mixer_list == all_flags()["dataset_mixer_list"].default
        listed = " and ".join(f"`{name}`" for name in (*named, "dataset_mixer_list"))
        refused.append(
            f"the data set is named in more than one way, {listed}{' (whose default counts)' if is_default else ''}"
        )
    if flat.try_launch_beaker_eval_jobs and not flat.push_to_hub:
        refused.append("`try_launch_beaker_eval_jobs` is true, which needs `push_to_hub`")
    if flat.sequence_parallel_size > 1 and not flat.use_flash_attn:
        refused.append(f"`sequence_parallel_size` is {flat.sequence_parallel_size}, which needs `use_flash_attn`")
    if flat.final_lr_ratio is not None:
        if flat.lr_scheduler_type != "linear":
            refused.append(f"`final_lr_ratio` needs `lr_scheduler_type` to be `linear`, not `{flat.lr_scheduler_type}`")
        if not 0 <= flat.final_lr_ratio <= 1:
            refused.append(f"`final_lr_ratio` must be between 0 and 1, not {flat.final_lr_ratio}")
    return tuple(f"{what}: training will refuse to start" for what in refused)
