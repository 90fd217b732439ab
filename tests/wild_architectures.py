"""Tiny configs of architectures that the layer table does not spell out, and their names.

Models are built on the meta device: names and shapes, no weights.
"""

from __future__ import annotations

import torch
import transformers as tf

BLOCKS = 2
HEADS = {"num_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, **HEADS}
TEXT = {**SIZES, "num_key_value_heads": 2}
WIDE = {**TEXT, "head_dim": 16}
SPARSE = {"moe_intermediate_size": 16, "num_experts_per_tok": 1}
LATENT = {
    **SPARSE, "n_routed_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
IMAGES = {
    "depth": BLOCKS, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
    "out_hidden_size": 32,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
PAIR = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 2, "vocab_size": 64}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip

# Class and config of each, by `model_type`.
WILD: dict[str, tuple[str, dict[str, object]]] = {
    "phi": ("PhiForCausalLM", TEXT),
    "starcoder2": ("Starcoder2ForCausalLM", TEXT),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**TEXT, **LATENT}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**TEXT, **LATENT}),
    "llama4_text": (
        "Llama4ForCausalLM", {**WIDE, "num_local_experts": 2, "intermediate_size_mlp": 48}
    ),
    "gpt_oss": ("GptOssForCausalLM", {**WIDE, "num_local_experts": 2}),
    "glm4": ("Glm4ForCausalLM", WIDE),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {**WIDE, **SPARSE, "n_routed_experts": 2, "first_k_dense_replace": 1, "n_group": 1,
         "topk_group": 1},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {**WIDE, **SPARSE, **LINEAR, "num_experts": 2, "shared_expert_intermediate_size": 16,
         "layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration", {"text_config": TEXT, "vision_config": IMAGES}
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": WIDE, "vision_config": {**IMAGES, "deepstack_visual_indexes": [0]}},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {**TEXT, "num_local_experts": 2}),
    "nemotron": ("NemotronForCausalLM", TEXT),
    "cohere": ("CohereForCausalLM", TEXT),
    "cohere2": ("Cohere2ForCausalLM", TEXT),
    "smollm3": ("SmolLM3ForCausalLM", TEXT),
    "lfm2": ("Lfm2ForCausalLM", {**TEXT, "layer_types": ["conv", "full_attention"]}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": BLOCKS}),
    "jamba": (
        "JambaForCausalLM",
        {**TEXT, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
         "mamba_dt_rank": 4},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10},
    ),
    "bart": ("BartForConditionalGeneration", PAIR),
    "marian": ("MarianMTModel", {**PAIR, "max_position_embeddings": 16}),
    "olmo2": ("Olmo2ForCausalLM", TEXT),
    "stablelm": ("StableLmForCausalLM", TEXT),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 32, "n_layers": BLOCKS, "n_heads": 2, "hidden_dim": 48},
    ),
    "electra": ("ElectraForMaskedLM", {**SIZES, "embedding_size": 32}),
    "deberta-v2": ("DebertaV2ForMaskedLM", SIZES),
    "modernbert": ("ModernBertForMaskedLM", SIZES),
}  # fmt: skip


def names_of(which: str) -> list[str]:
    """Names of the tensors of one of `WILD`, as `state_dict` gives them."""
    cls, options = WILD[which]
    config = tf.AutoConfig.for_model(which, **options)
    with torch.device("meta"):
        return list(getattr(tf, cls)(config).state_dict())


# Names of models for images as diffusers and as the first implementations write them: a line is a
# name and the list of blocks that it is in.
DIFFUSION = """
down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight  down_blocks 1 attention q
down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight  down_blocks 1 attention cross_k
down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight  down_blocks 1 mlp up
down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight  down_blocks 1 mlp down
down_blocks.1.resnets.0.conv1.weight  down_blocks 1 other -
up_blocks.2.resnets.0.norm1.weight  up_blocks 2 norm -
mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight  mid_block_attentions 0 attention v
conv_in.weight  model - other -
time_embedding.linear_1.weight  model - other -
model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight  \
input_blocks 4 attention q
model.diffusion_model.output_blocks.11.0.in_layers.0.weight  output_blocks 11 other -
model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight  \
middle_block 1 attention q
transformer_blocks.3.attn1.to_q.weight  transformer_blocks 3 attention q
transformer_blocks.3.attn.add_q_proj.weight  transformer_blocks 3 attention -
transformer_blocks.3.norm1.linear.weight  transformer_blocks 3 other -
transformer_blocks.3.ff_context.net.2.weight  transformer_blocks 3 mlp down
single_transformer_blocks.37.attn.to_k.weight  single_transformer_blocks 37 attention k
single_transformer_blocks.37.proj_mlp.weight  single_transformer_blocks 37 mlp -
double_blocks.18.img_attn.qkv.weight  double_blocks 18 attention qkv
double_blocks.18.txt_mlp.2.weight  double_blocks 18 mlp -
single_blocks.37.linear1.weight  single_blocks 37 other -
blocks.27.attn.qkv.weight  model 27 attention qkv
blocks.27.adaLN_modulation.1.weight  model 27 other -
x_embedder.proj.weight  model - other -
"""
