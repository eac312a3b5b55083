"""Every method keeps to its device: trained on a pretended one, which no tensor enters or leaves unasked."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.base import cut_validation
from cmh_milvus.evaluation import evaluate_codes
from cmh_milvus.methods import get_method, list_methods
from cmh_milvus.training import TrainingSettings, train
from tests.methods.conftest import small_settings

ELSEWHERE = "elsewhere"
ASKED_FOR = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}  # these move tensors between devices
WITH_TOKENS = ("duet", "mith")  # the two ways in which heads read tokens
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


@pytest.fixture(scope="module", autouse=True)
def _pretended_device():
    _setup_privateuseone_for_python_backend(ELSEWHERE, Backend())


def test_a_mixture_of_devices_is_refused():
    with WatchDevices():
        there, here = torch.ones(2, 2, device=ELSEWHERE), torch.ones(2, 2)
        assert (there @ there).device.type == ELSEWHERE
        with pytest.raises(RuntimeError, match="two devices"):
            there @ here
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=ELSEWHERE, generator=torch.Generator())
        np.testing.assert_array_equal((there + here.to(ELSEWHERE)).cpu().numpy(), np.full((2, 2), 2.0))


@pytest.mark.parametrize(
    ("name", "features"), [*product(list_methods(), ["small_emoji"]), *product(WITH_TOKENS, ["small_tokens"])]
)
def test_trains_there_as_here(name, features, request):
    data = request.getfixturevalue(features)
    settings = small_settings(get_method(name)) | ({} if get_method(name).closed_form else {"epochs": 1})
    data = dataclasses.replace(data, split=cut_validation(data.split, 40))
    here, there = (TrainingSettings(name, 16, settings, device=device) for device in ("cpu", ELSEWHERE))
    expected = codes_of(train(data, here), data)
    with WatchDevices():
        codes = codes_of(train(data, there), data)
    for modality in ("image", "text"):
        differing = np.bitwise_count(codes[modality] ^ expected[modality]).sum()  # activations near 0 may round apart
        assert differing < 0.001 * codes[modality].size * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list_methods())
def test_trains_on_cuda(name, small_emoji):
    """Not code by code as on the CPU, for its random numbers are others; as good as there, or nearly."""
    settings = small_settings(get_method(name))
    figures = {}
    for device in ("cpu", "cuda"):
        trained = train(small_emoji, TrainingSettings(name, 16, settings, device=device))
        assert trained.record["device"] == device
        assert {value.device.type for value in trained.image_head.state_dict().values()} == {"cpu"}
        result = evaluate_codes(name, codes_of(trained, small_emoji), small_emoji)
        figures[device] = result.directions["image_to_text"].estimates["MAP@all"].mean
    assert figures["cuda"] > 0.85 * figures["cpu"]
