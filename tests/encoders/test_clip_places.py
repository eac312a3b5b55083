"""Places of CLIP pictures against transformers."""

import math

import numpy as np
import torch

from cmh_milvus.encoders.backbones import load_backbone
from tests.encoders.test_backbones import pictures


def test_places_of_clip_are_its_patches(clip_folder):
    """Against transformers: without the class token, in the space of the whole picture, mean over cells of 3 x 3."""
    import transformers as hf

    backbone = load_backbone(f"clip-tokens:{clip_folder}", "image", "cpu")
    model = hf.AutoModel.from_pretrained(clip_folder).eval()
    items = pictures()
    with torch.no_grad():
        hidden = model.vision_model(backbone.inputs(items)["pixel_values"]).last_hidden_state[:, 1:]
        parts = torch.nn.functional.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)), dim=2)
    side = math.isqrt(parts.shape[1])
    maps = parts.mT.reshape(len(items), -1, side, side)
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, 3).flatten(2).mT
    np.testing.assert_allclose(backbone.encode(items)[:, 1:], expected.numpy(), atol=1e-5)
