"""A detector that real models ship, small: a Swin backbone, a BERT, fusion layers between them, and a decoder of boxes."""

import torch
from support.models import seeded
from torch import Tensor, nn
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

#: Height and width of the images.
IMAGE = 64
#: What a user says of the inputs beside the samples: token 1012 is the full stop that ends a phrase.
TOLD = {"masks": {"attention_mask": "input_ids_len"}, "ranges": {"input_ids": (1000, 1030)}}
#: The longest text that the model takes as it is; of longer ones it drops the end.
LONGEST = 256


def grounding_dino() -> nn.Module:
    """transformers' GroundingDINO with seeded weights: two fusion layers, ten boxes, three sizes of features."""
    return seeded(lambda: GroundingDinoForObjectDetection(_config()))


def _config() -> GroundingDinoConfig:
    image = SwinConfig(
        image_size=IMAGE, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, out_features=["stage1", "stage2"]
    )
    text = BertConfig(
        vocab_size=1100,  # its marks are among 101 to 1029
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "num_queries": 10, "num_feature_levels": 3}
    return GroundingDinoConfig(backbone_config=image, text_config=text, **layers, **heads, **sizes)


def detection(seed: int, batch: int, length: int) -> dict[str, Tensor]:
    """An image and a text of phrases for each entry, as a tokenizer gives them: padded, but for the first."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1000, 1031, (batch, length), generator=generator)
    words[:, 0], words[:, 2::3], words[:, -1] = 101, 1012, 102
    lengths = torch.randint(min(3, length), length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    live = torch.arange(length) < lengths
    images = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    return {"pixel_values": images, "input_ids": words * live, "attention_mask": live.long()}
