"""Arguments of timm.create_model that people and files may give for a model."""

from pipelines.common.errors import UserError, clipped

Kwargs = dict[str, bool | int | float | str | list | None]
_LARGEST_ARGUMENT = 16_384  # wide enough for timm's widest models
# Arguments of timm.create_model that neither a person nor a file may give, besides all that begin with "pretrained":
# they decide where weights come from and whether all of them are loaded, or what the data and the run decide.
_RESERVED_KWARGS = {
    *("model_name", "num_classes", "checkpoint_path", "cache_dir", "model_cfg", "kwargs_filter"),
    *("features_only", "feature_cfg", "feature_cls", "out_indices", "in_chans"),
    *("scriptable", "exportable", "no_jit", "device", "dtype"),
}


def is_reserved(name: str) -> bool:
    """True for an argument of timm.create_model that is decided elsewhere."""
    return name in _RESERVED_KWARGS or name.startswith("pretrained")


def without_reserved(kwargs: Kwargs) -> Kwargs:
    """The arguments that a file may give for a model."""
    return {name: value for name, value in kwargs.items() if not is_reserved(name)}


def check_kwargs(section: str, kwargs: Kwargs) -> None:
    """Raise a UserError if the settings of a model hold an argument that is decided elsewhere, or is too large."""
    for name in kwargs:
        if is_reserved(name):
            raise UserError(
                f"{section}.kwargs.{clipped(name)}: decided by the dataset, whose images have 3 channels, by "
                f"{section}.checkpoint, or by settings of the run. Leave it out"
            )
    check_sizes(f"{section}.kwargs.", kwargs, "Use a smaller model")


def check_sizes(where: str, kwargs: dict, advice: str) -> None:
    """Raise a UserError that names the first argument of a model that is not plain, or too large to build one with.

    Settings and files have one limit, so that a run's model can be built again from the run's checkpoints.

    Args:
      where: what stands before the argument's name; advice: the last sentence, without its full stop.
    """
    for name, value in kwargs.items():
        if not _is_moderate(value):
            raise UserError(
                f"{where}{clipped(name)} is {clipped(value)}; arguments of a model are words, switches and numbers up "
                f"to {_LARGEST_ARGUMENT:,}. {advice}"
            )


def _is_moderate(value: object) -> bool:
    """Whether a value is plain, and all numbers in it are sizes that models have."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_moderate, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_moderate(each) for key, each in value.items())
    if isinstance(value, (int, float)):
        return abs(value) <= _LARGEST_ARGUMENT  # NaN is not less
    return value is None or isinstance(value, str)
