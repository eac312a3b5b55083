"""Every method keeps to its device: trained on a pretended one, and on CUDA where there is one."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.base import cut_validation
from cmh_milvus.evaluation import evaluate_codes
from cmh_milvus.methods import get_method, list_methods
from cmh_milvus.training import TrainingSettings, train
from tests.methods.conftest import device_settings, small_settings

METHODS = {"small_emoji": list_methods(), "small_tokens": ["duet", "mith"]}  # heads read tokens in these two ways


@pytest.fixture(scope="module")
def there(request, tmp_path_factory):
    """For a fixture of features: the features, and what `pretended_device` writes for its methods."""
    made = {}

    def get(name):
        if name not in made:
            data = request.getfixturevalue(name)
            data = dataclasses.replace(data, split=cut_validation(data.split, 40))
            folder = tmp_path_factory.mktemp(name)
            arrays = {"image": data.image, "text": data.text, "labels": data.labels.astype(np.uint8)}
            np.savez(folder / "features.npz", **arrays, **vars(data.split))
            files = (str(folder / file) for file in ("features.npz", "codes.npz"))
            command = [sys.executable, "-m", "tests.methods.pretended_device", *files, *METHODS[name]]
            done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[name] = data, np.load(folder / "codes.npz")
        return made[name]

    return get


@pytest.mark.parametrize(
    ("features", "name"), [(features, name) for features, names in METHODS.items() for name in names]
)
def test_trains_there_as_here(features, name, there):
    data, codes = there(features)
    assert f"{name} failed" not in codes, str(codes[f"{name} failed"])
    expected = codes_of(train(data, device_settings(name, "cpu")), data)
    for modality in ("image", "text"):
        differing = np.bitwise_count(codes[f"{name} {modality}"] ^ expected[modality]).sum()
        assert differing < 0.001 * expected[modality].size * 8  # activations near 0 may round apart


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list_methods())
def test_trains_on_cuda(name, small_emoji):
    """As good as on the CPU, or nearly: its random numbers are others, and a seed moves SSAH's figure by a quarter."""
    settings = small_settings(get_method(name))
    figures = {}
    for device in ("cpu", "cuda"):
        trained = train(small_emoji, TrainingSettings(name, 16, settings, device=device))
        assert trained.record["device"] == device
        assert {value.device.type for value in trained.image_head.state_dict().values()} == {"cpu"}
        result = evaluate_codes(name, codes_of(trained, small_emoji), small_emoji)
        figures[device] = result.directions["image_to_text"].estimates["MAP@all"].mean
    assert figures["cuda"] > 0.6 * figures["cpu"]
