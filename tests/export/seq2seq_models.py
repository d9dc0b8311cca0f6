"""Small encoder-decoders with adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn

VOCAB = 97
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_ff": 80,
    "d_kv": 10,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,  # shorter than the texts: all buckets are used
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def build_seq2seq(name: str) -> nn.Module:
    """A random model, in training mode, with LoRA on every linear layer: ranks that divide nothing, B not zero."""
    torch.manual_seed(4 if name == "mt5" else 1)  # with others a greedy sequence repeats itself
    configs: dict[str, Callable[[], Any]] = {
        "t5": lambda: transformers.T5Config(**_T5),
        "mt5": lambda: transformers.MT5Config(**_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
        "bart": lambda: transformers.BartConfig(**_BART),
        "marian": lambda: transformers.MarianConfig(**_BART, pad_token_id=1, tie_word_embeddings=False),
        "whisper": lambda: transformers.WhisperConfig(
            **{**_BART, "forced_eos_token_id": None},
            num_mel_bins=6,
            max_source_positions=12,
            max_target_positions=64,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        ),
    }
    auto = transformers.AutoModelForSpeechSeq2Seq if name == "whisper" else transformers.AutoModelForSeq2SeqLM
    core = auto.from_config(configs[name]())
    if name == "bart":
        asked = {"forced_bos_token_id": 0, "no_repeat_ngram_size": 2, "min_length": 6, "max_length": 30}
        core.generation_config.update(**asked)
    model = peft.get_peft_model(
        core,
        peft.LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False),
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Attention and adapters are quiet, or a greedy sequence repeats one token.
                quiet = any(part in key for part in ("attn.out_proj", "Attention.o."))
                loud = 0.5 if "emb" in key or "shared" in key else 0.2 if quiet else 2.0
                parameter.normal_(0, loud * (0.2 if "lora" in key else 1.0) / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()
