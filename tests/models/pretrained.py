"""Architectures of transformers by name: tiny ones, built from configurations, each with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
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
    """A language model with rotary positions and grouped keys, of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES | {"num_hidden_layers": 2}, vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=32
    )
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    """An encoder, whose layers share biases by position, and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2, vocab_size=VOCABULARY
    )
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


def distilbert() -> nn.Module:
    """An encoder whose head reads the first token, with a learned activation between them."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32
    )
    return DistilBertForSequenceClassification(config)


def mistral() -> nn.Module:
    """A language model that attends to the last few tokens only."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, sliding_window=4)
    return MistralForCausalLM(config)


def qwen() -> nn.Module:
    """A language model that normalises queries and keys, with a head that is tied to the embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SIZES, vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config)


def bart() -> nn.Module:
    """An encoder and a decoder that share their embedding with the head."""
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    return BartForConditionalGeneration(
        BartConfig(**sides, d_model=16, vocab_size=VOCABULARY, max_position_embeddings=32)
    )


def swin() -> nn.Module:
    """A classifier of images with attention in shifted windows."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)
    config.drop_path_rate = 0.0
    return SwinForImageClassification(config)


def whisper() -> nn.Module:
    """Text from spectrograms."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    return WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    """Letters from sound, with a convolution under weight norm for positions; nothing is masked in training."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **SIZES,
        vocab_size=VOCABULARY,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    return Wav2Vec2ForCTC(config)


def mamba() -> nn.Module:
    """A state-space model."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=VOCABULARY, time_step_rank=2)
    return MambaForCausalLM(config)


def mixtral() -> nn.Module:
    """A mixture of experts whose weights are bare parameters, one matrix for each expert."""
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **experts, vocab_size=VOCABULARY, num_key_value_heads=1))
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def targets() -> dict[str, torch.Tensor]:
    """Two beginnings of what a decoder is to write."""
    return {"decoder_input_ids": torch.randint(2, VOCABULARY, (2, 3))}


PRETRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "gpt2": (gpt2, tokens),
    "bert": (bert, tokens),
    "llama": (llama, tokens),
    "t5": (t5, lambda: tokens() | targets()),
    "vit": (vit, images),
    "resnet": (resnet, images),
    "clip": (clip, lambda: tokens() | images()),
    "distilbert": (distilbert, tokens),
    "mistral": (mistral, tokens),
    "qwen": (qwen, tokens),
    "bart": (bart, lambda: tokens() | targets()),
    "swin": (swin, images),
    "whisper": (whisper, lambda: {"input_features": torch.randn(2, 4, 16)} | targets()),
    "mamba": (mamba, lambda: {"input_ids": tokens()["input_ids"]}),
    "mixtral": (mixtral, tokens),
}

PARAMETRIZED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "wav2vec2": (wav2vec2, lambda: {"input_values": torch.randn(2, 200)}),
}
"""More of them, with weights under `torch.nn.utils.parametrize`, so PyTorch refuses to pickle them."""
