"""A device that is not there: tensors on it compute on the CPU, and refuse what CUDA would refuse.

A program of its own, because autograd counts the kinds of devices once a process:

    python -m tests.methods.pretended_device FEATURES.npz CODES.npz METHOD...

trains the methods on the pretended device and writes their packed codes as "METHOD image" and "METHOD text"; of one
that failed, the error as "METHOD failed".
"""

import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.features import load_features
from cmh_milvus.training import train
from tests.methods.conftest import device_settings

ELSEWHERE = "elsewhere"
ASKED_FOR = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}  # these move tensors between devices
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}  # CUDA takes indices on the CPU


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on the pretended device, and computes on the CPU."""

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(ELSEWHERE, 0),
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return computed(function, arguments, keywords or {})


class Backend:
    """What torch asks of a kind of device; its random state is the CPU's."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 0

    def manual_seed_all(self, seed):
        pass


class WatchDevices(TorchDispatchMode):
    """Makes tensors on the pretended device where they are asked for there."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return computed(function, arguments, keywords or {})


def computed(function, arguments, keywords):
    """The operation, as CUDA would do it or refuse it."""
    given = tree.tree_leaves((arguments, keywords))
    theirs = [value for value in given if isinstance(value, Elsewhere)]
    ours = [value for value in given if isinstance(value, torch.Tensor) and not isinstance(value, Elsewhere)]
    asked = keywords.get("device")
    elsewhere = bool(theirs) if asked is None else torch.device(asked).type == ELSEWHERE
    if theirs and function not in ASKED_FOR | INDEXING and any(value.ndim for value in ours):
        raise RuntimeError(f"{function}: tensors on two devices")
    if elsewhere and any(isinstance(value, torch.Generator) for value in given):
        raise RuntimeError(f"{function}: a generator of the CPU, a result on another device")
    if function is torch.ops.aten.copy_.default:
        elsewhere = isinstance(arguments[0], Elsewhere)
    known = {id(value.values): value for value in theirs}
    keywords = {**keywords, "device": torch.device("cpu")} if "device" in keywords else keywords
    arguments, keywords = tree.tree_map_only(Elsewhere, lambda value: value.values, (arguments, keywords))
    result = function(*arguments, **keywords)
    if not elsewhere:
        return result

    def there(value):
        same = known.get(id(value))  # what was changed in place is the tensor that was given
        return Elsewhere(value) if same is None else same

    return tree.tree_map_only(torch.Tensor, there, result)


def self_check():
    """The pretended device refuses what it should."""
    there, here = torch.ones(2, 2, device=ELSEWHERE), torch.ones(2, 2)
    assert (there @ there).device.type == ELSEWHERE
    np.testing.assert_array_equal((there + here.to(ELSEWHERE)).cpu().numpy(), np.full((2, 2), 2.0))
    for wrong in (lambda: there @ here, lambda: torch.randn(2, device=ELSEWHERE, generator=torch.Generator())):
        try:
            wrong()
        except RuntimeError:
            continue
        raise AssertionError("the pretended device let a mixture of devices pass")


def main(features, codes, *methods):
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(ELSEWHERE, Backend())
    data, made = load_features(Path(features)), {}
    with WatchDevices():
        self_check()
        for name in methods:
            try:
                packed = codes_of(train(data, device_settings(name, ELSEWHERE)), data)
            except Exception:
                made[f"{name} failed"] = np.array(traceback.format_exc(limit=-4))
            else:
                made |= {f"{name} {modality}": values for modality, values in packed.items()}
    np.savez(codes, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
