"""From pictures and texts to relaxed codes: backbones, hash heads, the encoder and its folder on disk."""
