"""CLIP-family models that are small enough for tests, in the layout of the real ones."""

import torch


def save_model(folder, family):
    """A CLIP or SigLIP model of random weights with its real processor classes and a byte-level tokenizer."""
    import transformers as hf
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = hf.CLIPTokenizer(vocab=vocabulary, merges=[])
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 24, **ends}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if family == "clip":
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():  # random weights of the default size hardly tell inputs apart
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.2)
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return folder
