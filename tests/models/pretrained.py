"""Architectures of transformers by name: tiny ones, built from configurations, each with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = 50


def tokens() -> dict[str, torch.Tensor]:
    """Two sentences, one of them padded."""
    ids = torch.randint(2, VOCABULARY, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


def images() -> dict[str, torch.Tensor]:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def gpt2() -> nn.Module:
    """A language model whose layers are Conv1D, with a head that is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0)
    config.eos_token_id = config.pad_token_id = 1
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """An encoder with a head that predicts masked tokens."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=32))


def llama() -> nn.Module:
    """A language model with rotary positions and grouped keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=32)
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    """An encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=VOCABULARY)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    """A classifier of images."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4))


def clip() -> nn.Module:
    """Images and text in one space."""
    from transformers import CLIPConfig, CLIPModel

    text = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8}))


def resnet() -> nn.Module:
    """A convolutional network, all of which can be traced."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


PRETRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "gpt2": (gpt2, tokens),
    "bert": (bert, tokens),
    "llama": (llama, tokens),
    "t5": (t5, lambda: tokens() | {"decoder_input_ids": torch.randint(2, VOCABULARY, (2, 3))}),
    "vit": (vit, images),
    "resnet": (resnet, images),
    "clip": (clip, lambda: tokens() | images()),
}
