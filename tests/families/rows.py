"""The table: every family, and what becomes of its adapters. `test_families` proves it, `page` writes it down."""

from __future__ import annotations

from flora_fx import Reason

from . import diffusion
from .row import Fate, Row, fates, no_graph
from .senses import PATCHES, audio, clip, llava, qwen2_vl, vision, whisper
from .text import LAYERS, decoder, headless, known, only, seq2seq

__all__ = ["ROWS"]

FAST: tuple[str, ...] = ()
LATER = ("compiled",)

DATA = "Could not guard on data-dependent expression"
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

LLAMA = fates(14, 43, 17, 23)
"""Seven projections a layer, the head; q, k, v and gate, up are packs."""
SIX = fates(12, 37, 17, 21)
PARALLEL = fates(12, 37, 13, 19)
PACKED = fates(8, 25, 17, 17)
"""q, k and v are one projection already."""

_DECODERS = "Decoders"
DECODERS = [
    Row(_DECODERS, "Llama", "grouped queries", known("llama"), 14, *LLAMA, FAST),
    Row(_DECODERS, "Mistral", "a sliding window", known("mistral"), 14, *LLAMA),
    Row(_DECODERS, "Qwen 2", "biases on q, k, v", known("qwen2"), 14, *LLAMA),
    Row(_DECODERS, "Qwen 3", "norms on q, k", known("qwen3"), 14, *LLAMA),
    Row(_DECODERS, "Gemma 2", "soft caps, two windows", known("gemma2"), 14, *fates(14, 47, 21, 27)),
    Row(
        _DECODERS,
        "Gemma 3",
        "norms on q, k; two windows",
        decoder(
            "Gemma3TextConfig",
            **GROUPED,
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        14,
        *LLAMA,
    ),
    Row(_DECODERS, "Phi", "attention and MLP side by side", decoder("PhiConfig"), 12, *PARALLEL),
    Row(_DECODERS, "Phi 3", "q, k, v and gate, up in one each", known("phi3"), 8, *PACKED),
    Row(
        _DECODERS,
        "Cohere",
        "attention and MLP side by side",
        decoder("CohereConfig", **GROUPED),
        14,
        *fates(14, 43, 13, 21),
    ),
    Row(_DECODERS, "OLMo 2", "norms behind the blocks", decoder("Olmo2Config", **GROUPED), 14, *LLAMA),
    Row(
        _DECODERS,
        "Granite",
        "four multipliers",
        decoder("GraniteConfig", **GROUPED, residual_multiplier=0.8),
        14,
        *LLAMA,
    ),
    Row(_DECODERS, "GLM 4", "gate and up in one", decoder("Glm4Config", **GROUPED, head_dim=12), 12, *SIX),
    Row(
        _DECODERS,
        "SmolLM 3",
        "a layer without positions",
        decoder("SmolLM3Config", **GROUPED, no_rope_layers=[1, 0]),
        14,
        *LLAMA,
    ),
    Row(_DECODERS, "Nemotron", "squared ReLU", decoder("NemotronConfig", **GROUPED), 12, *SIX),
    Row(_DECODERS, "StarCoder 2", "biases", decoder("Starcoder2Config", **GROUPED), 12, *SIX),
    Row(
        _DECODERS,
        "StableLM",
        "half of a head rotated",
        decoder("StableLmConfig", **GROUPED, rope_parameters=HALF),
        14,
        *LLAMA,
    ),
    Row(_DECODERS, "GPT-2", "Conv1D, [in, out]", known("gpt2"), 8, *PACKED, FAST),
    Row(_DECODERS, "GPT-BigCode", "one head of keys", decoder("GPTBigCodeConfig", **only(GPT)), 8, *PACKED),
    Row(
        _DECODERS,
        "GPT-J",
        "attention and MLP side by side",
        decoder("GPTJConfig", **only(GPT), rotary_dim=4),
        12,
        *fates(12, 41, 17, 23),
    ),
    Row(_DECODERS, "GPT-NeoX", "attention and MLP side by side, a norm each", decoder("GPTNeoXConfig"), 8, *PACKED),
    Row(
        _DECODERS,
        "Falcon",
        "weights by `@`, an add in place",
        decoder("FalconConfig", intermediate_size=None),
        8,
        *fates(8, 25, 13, 15),
        FAST,
    ),
    Row(_DECODERS, "BLOOM", "ALiBi", decoder("BloomConfig", intermediate_size=None), 8, *fates(8, 27, 19, 19)),
    Row(
        _DECODERS,
        "MPT",
        "ALiBi",
        decoder("MptConfig", **only({"d_model": 48, "n_heads": 4, "n_layers": 2})),
        8,
        *fates(8, 29, 21, 21),
    ),
    Row(_DECODERS, "OPT", "learned positions", known("opt"), 12, *SIX),
]

BERT = fates(13, 39, 18, 22)
_ENCODERS = "Encoders"
ENCODERS = [
    Row(_ENCODERS, "BERT", "", known("bert"), 13, *BERT, FAST),
    Row(_ENCODERS, "RoBERTa", "positions counted from tokens", headless("RobertaConfig"), 13, *BERT),
    Row(_ENCODERS, "ELECTRA", "narrow embeddings", headless("ElectraConfig", embedding_size=32), 13, *BERT),
    Row(
        _ENCODERS,
        "DistilBERT",
        "",
        headless("DistilBertConfig", **only({"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4})),
        12,
        *fates(12, 36, 16, 20),
    ),
    Row(
        _ENCODERS,
        "DeBERTa v2",
        "its q, k read relative positions, too",
        headless("DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16),
        16,
        *fates(16, 56, 26, 34),
        FAST,
    ),
    Row(
        _ENCODERS,
        "ModernBERT",
        "q, k, v in one; two windows",
        headless("ModernBertConfig", global_attn_every_n_layers=2, local_attention=4),
        8,
        *fates(8, 24, 16, 16),
    ),
    Row(
        _ENCODERS,
        "ALBERT",
        "one layer, called twice",
        headless("AlbertConfig", embedding_size=32),
        8,
        *[
            Fate(
                14,
                (42, 40),
                ((Reason.WEIGHT_SHARED, 24, "the same weights stand in two places; each B accumulates there"),),
                why="14 places of 8 adapters",
            )
        ]
        * 2,
    ),
    Row(
        _ENCODERS,
        "Longformer",
        "windows cut by `as_strided`",
        headless("LongformerConfig", attention_window=4),
        19,
        no_graph(DATA, "torch.export does not trace it: it asks its data where to look"),
        Fate(
            5,
            (39, 34),
            ((Reason.MUTATED, 8, "its windows are cut by address and filled in place"),),
            why="6 more read global tokens, of which there are none here",
        ),
    ),
]

_SEQ2SEQ = "Encoder-decoders"
BART = fates(32, 97, 43, 54)
SEQ2SEQ = [
    Row(_SEQ2SEQ, "T5", "relative positions", known("t5"), 32, *BART, FAST),
    Row(_SEQ2SEQ, "BART", "", seq2seq("BartConfig"), 32, *BART),
    Row(_SEQ2SEQ, "Marian", "", seq2seq("MarianConfig"), 32, *BART),
]

_EXPERTS = "Mixtures of experts"
ROUTED = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
OUTSIDE = "PEFT adds the adapters of experts and routers to their weights at each call"
MIXTRAL = (
    Fate(8, (33, 17), ((Reason.WEIGHT_COMPUTED, 2, OUTSIDE),)),
    Fate(8, (32, 20), why=f"{OUTSIDE}, outside of graphs"),
)
GATED = "no adapter: a shared expert, which is narrower than the model and has a gate"
EXPERTS = [
    Row(
        _EXPERTS,
        "Mixtral",
        "",
        decoder("MixtralConfig", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
        14,
        *MIXTRAL,
    ),
    Row(_EXPERTS, "Qwen 3 MoE", "", decoder("Qwen3MoeConfig", **GROUPED, **ROUTED, head_dim=12), 14, *MIXTRAL),
    Row(
        _EXPERTS,
        "Qwen 2 MoE",
        "a shared expert",
        decoder("Qwen2MoeConfig", **GROUPED, **ROUTED, shared_expert_intermediate_size=24),
        16,
        *fates(16, 55, 21, 29),
        FAST,
    ),
    Row(
        _EXPERTS,
        "DeepSeek V3",
        "latent attention, a shared expert",
        decoder(
            "DeepseekV3Config",
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=20,
            q_lora_rank=20,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            first_k_dense_replace=1,
        ),
        13,
        Fate(10, (41, 27), ((Reason.WEIGHT_COMPUTED, 1, OUTSIDE), (Reason.SCALE_NOT_SCALAR, 1, GATED))),
        Fate(10, (41, 29), ((Reason.SCALE_NOT_SCALAR, 1, GATED),), why=f"{OUTSIDE}, outside of graphs"),
    ),
    Row(
        _EXPERTS,
        "gpt-oss",
        "attention sinks; its linear layers alone",
        decoder("GptOssConfig", **GROUPED, head_dim=12, num_local_experts=3, num_experts_per_tok=2, sliding_window=4),
        8,
        *fates(8, 35, 19, 23),
    ),
    Row(
        _EXPERTS,
        "gpt-oss",
        "`target_parameters`: its experts, too",
        decoder(
            "GptOssConfig",
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            **GROUPED,
            head_dim=12,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=4,
        ),
        12,
        Fate(8, (35, 19), why=OUTSIDE),
        Fate(8, (34, 22), why=f"{OUTSIDE}, outside of graphs"),
    ),
]

_STATES = "State spaces, linear attention"
SCANNED = ["in_proj", "x_proj", "dt_proj"]
PAST = "the model reads the weight of dt_proj past its adapter"
MAMBA = (Fate(4, (30, 26), why=PAST), Fate(4, (18, 14), why=PAST))
STATES = [
    Row(
        _STATES,
        "Mamba",
        "PEFT refuses out_proj",
        headless("MambaConfig", SCANNED, state_size=4, intermediate_size=None, num_attention_heads=None),
        6,
        *MAMBA,
    ),
    Row(
        _STATES,
        "Falcon Mamba",
        "PEFT refuses out_proj",
        headless("FalconMambaConfig", SCANNED, state_size=4, intermediate_size=None, num_attention_heads=None),
        6,
        *MAMBA,
    ),
    Row(
        _STATES,
        "Mamba 2",
        "PEFT refuses out_proj",
        headless(
            "Mamba2Config",
            ["in_proj"],
            state_size=8,
            num_heads=6,
            head_dim=16,
            n_groups=2,
            chunk_size=4,
            intermediate_size=None,
            num_attention_heads=None,
        ),
        2,
        *fates(2, 8, 6, 6),
        FAST,
    ),
    Row(
        _STATES,
        "Bamba",
        "Mamba 2 and attention by turns",
        decoder(
            "BambaConfig",
            **GROUPED,
            mamba_n_heads=6,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=4,
            attn_layer_indices=[1],
        ),
        12,
        *fates(12, 37, 17, 21),
    ),
    Row(
        _STATES,
        "Jamba",
        "Mamba, attention and experts by turns",
        decoder(
            "JambaConfig",
            **GROUPED,
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        11,
        Fate(10, (42, 26), why=PAST),
        Fate(10, (36, 23), why=PAST),
    ),
    Row(
        _STATES,
        "Qwen 3 Next",
        "gated delta rule and attention by turns, experts",
        decoder(
            "Qwen3NextConfig",
            **GROUPED,
            **ROUTED,
            layer_types=["linear_attention", "full_attention"],
            shared_expert_intermediate_size=24,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            head_dim=12,
        ),
        15,
        Fate(9, (50, 35), ((Reason.WEIGHT_COMPUTED, 2, OUTSIDE), (Reason.SCALE_NOT_SCALAR, 2, GATED))),
        Fate(8, (41, 30), why=f"{OUTSIDE}, outside of graphs; both shared experts' gates take one graph"),
        tolerance=1e-6,
    ),
]

_VISION = "Vision"
VISION = [
    Row(_VISION, "ViT", "", known("vit"), 13, *BERT, FAST),
    Row(
        _VISION,
        "DINOv2",
        "layer scale",
        vision("Dinov2Config", **LAYERS, mlp_ratio=2, **PATCHES),
        12,
        *fates(12, 36, 16, 20),
    ),
    Row(
        _VISION,
        "DINOv3",
        "rotary positions",
        vision("DINOv3ViTConfig", **LAYERS, **PATCHES),
        12,
        *fates(12, 36, 16, 20),
    ),
    Row(
        _VISION,
        "Swin",
        "shifted windows",
        vision("SwinConfig", image_size=16, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4),
        25,
        *fates(25, 75, 34, 42),
    ),
    Row(
        _VISION,
        "ConvNeXt",
        "its linear layers",
        vision("ConvNextConfig", hidden_sizes=[24, 48], depths=[2, 2], num_stages=2, patch_size=2, image_size=16),
        8,
        *fates(8, 24, 16, 16),
    ),
]

_AUDIO = "Audio"
INSIDE = "one function of torch takes the weights of a whole attention past their adapters"
SPOKEN = [
    Row(_AUDIO, "Whisper", "", whisper, 26, *fates(26, 79, 35, 44)),
    Row(_AUDIO, "wav2vec 2.0", "", audio("Wav2Vec2Config"), 13, *BERT, FAST),
    Row(_AUDIO, "HuBERT", "", audio("HubertConfig"), 13, *BERT),
    Row(
        _AUDIO,
        "WavLM",
        "gated relative positions",
        audio("WavLMConfig"),
        15,
        Fate(7, (31, 24), why=INSIDE),
        Fate(7, (21, 14), why=INSIDE),
    ),
]

_BOTH = "Vision and language"
POOLED = "the pooling head's attention takes its weight past the adapter"
BOTH = [
    Row(_BOTH, "CLIP", "", clip("CLIPConfig"), 26, *fates(26, 79, 37, 45)),
    Row(
        _BOTH,
        "SigLIP",
        "a pooling head",
        clip("SiglipConfig"),
        28,
        Fate(27, (87, 44), why=POOLED),
        Fate(27, (82, 47), why=POOLED),
    ),
    Row(_BOTH, "LLaVA", "CLIP's images among a Llama's tokens", llava, 28, *fates(28, 85, 37, 47)),
    Row(
        _BOTH,
        "Qwen 2 VL",
        "images of any size",
        qwen2_vl,
        24,
        no_graph(DATA, "torch.export does not trace it: images are cut by sizes that are data"),
        Fate(20, (61, 35), why="both layers of the images take the same graphs; all adapters are fused"),
    ),
]

_DIFFUSION = "diffusers"
MADE = "an adapter of a convolution is a convolution"
DIFFUSION = [
    Row(
        _DIFFUSION,
        "Flux",
        "`add_adapter`, two streams of tokens",
        diffusion.flux,
        36,
        *fates(36, 108, 44, 62),
        LATER,
        "diffusers",
    ),
    Row(
        _DIFFUSION,
        "Stable Diffusion 3.5",
        "`load_lora_adapter` from safetensors",
        diffusion.sd3,
        36,
        *fates(36, 108, 44, 62),
        needs="diffusers",
    ),
    Row(
        _DIFFUSION,
        "Wan",
        "`load_lora_adapter` from safetensors; video",
        diffusion.wan,
        26,
        *fates(26, 78, 38, 45),
        needs="diffusers",
    ),
    Row(
        _DIFFUSION,
        "UNet2DCondition",
        "`add_adapter`; attention, MLPs and convolutions",
        diffusion.unet,
        61,
        Fate(48, (154, 76), ((Reason.NOT_LOW_RANK, 13, MADE),)),
        Fate(48, (154, 91), ((Reason.NOT_LOW_RANK, 13, MADE),)),
        needs="diffusers",
    ),
    Row(
        _DIFFUSION,
        "AutoencoderKL",
        "`add_adapter`; the attention in its middle",
        diffusion.autoencoder,
        8,
        *fates(8, 24, 8, 12),
        FAST,
        "diffusers",
    ),
]

ROWS = (*DECODERS, *ENCODERS, *SEQ2SEQ, *EXPERTS, *STATES, *VISION, *SPOKEN, *BOTH, *DIFFUSION)
