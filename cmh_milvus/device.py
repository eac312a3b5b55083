"""The one place where a device is chosen."""

from __future__ import annotations

import torch

from cmh_milvus.errors import SettingsError


def resolve_device(device: str = "auto") -> torch.device:
    """The torch device of a name.

    Args:
        device: "auto" (a CUDA GPU when there is one, else the CPU), "cpu", "cuda", "cuda:1", ...

    Raises:
        SettingsError: The name means nothing, or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"unknown device {device!r}: give auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (
        not torch.cuda.is_available() or (resolved.index or 0) >= torch.cuda.device_count()
    ):
        raise SettingsError(f"there is no device {device!r} on this machine: give auto or cpu")
    try:
        torch.zeros(1, device=resolved).item()
    except Exception as error:  # of a kind that differs from device to device
        raise SettingsError(f"nothing can be computed on device {device!r}: give auto, cpu, cuda or cuda:N") from error
    return resolved
