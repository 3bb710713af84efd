"""BTNet: learning unified representations for multi-resolution face recognition (BMVC 2023)."""


def __getattr__(
    name: str,
):  # `from btnet_core import BTNet` without loading torch for `btnet --help`
    if name == "BTNet":
        from btnet_core.models.btnet import BTNet

        return BTNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
