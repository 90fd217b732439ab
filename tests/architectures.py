"""Tiny random models of every architecture in the layer table, and what each tensor of them is.

Every expected table is written by hand. One line a tensor: name, tower, block, module, projection,
expert, with "-" for None. In names {b} stands for every block, {e} for every expert, {wb} for
weight and bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf

from taskvec.layers import LayerKey

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = {**WIDE, "vocab_size": 32}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {**WIDE, "image_size": 28, "patch_size": 14}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 32}
GPT2 = {"n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 32}
EXPERTS = 3

# --- what is expected --------------------------------------------------------------------------

# Llama and its like; {root} is "model." or "".
LLAMA_ATTENTION = """
{root}layers.{b}.self_attn.q_proj.weight  {tower} b attention q -
{root}layers.{b}.self_attn.k_proj.weight  {tower} b attention k -
{root}layers.{b}.self_attn.v_proj.weight  {tower} b attention v -
{root}layers.{b}.self_attn.o_proj.weight  {tower} b attention o -
"""
LLAMA_MLP = """
{root}layers.{b}.mlp.gate_proj.weight  {tower} b mlp gate -
{root}layers.{b}.mlp.up_proj.weight  {tower} b mlp up -
{root}layers.{b}.mlp.down_proj.weight  {tower} b mlp down -
"""
LLAMA_NORMS = """
{root}layers.{b}.input_layernorm.weight  {tower} b norm - -
{root}layers.{b}.post_attention_layernorm.weight  {tower} b norm - -
"""
LLAMA_OUTSIDE = """
{root}embed_tokens.weight  {tower} - embedding - -
{root}norm.weight  {tower} - final_norm - -
"""
LM_HEAD = "lm_head.weight  model - head - -\n"
LLAMA = LLAMA_ATTENTION + LLAMA_MLP + LLAMA_NORMS + LLAMA_OUTSIDE
QWEN2_BIASES = """
{root}layers.{b}.self_attn.q_proj.bias  {tower} b attention q -
{root}layers.{b}.self_attn.k_proj.bias  {tower} b attention k -
{root}layers.{b}.self_attn.v_proj.bias  {tower} b attention v -
"""
QK_NORMS = """
{root}layers.{b}.self_attn.q_norm.weight  {tower} b norm q -
{root}layers.{b}.self_attn.k_norm.weight  {tower} b norm k -
"""
GEMMA_NORMS = """
{root}layers.{b}.pre_feedforward_layernorm.weight  {tower} b norm - -
{root}layers.{b}.post_feedforward_layernorm.weight  {tower} b norm - -
"""
PHI3_BLOCK = """
{root}layers.{b}.self_attn.qkv_proj.weight  {tower} b attention qkv -
{root}layers.{b}.self_attn.o_proj.weight  {tower} b attention o -
{root}layers.{b}.mlp.gate_up_proj.weight  {tower} b mlp gate_up -
{root}layers.{b}.mlp.down_proj.weight  {tower} b mlp down -
"""
FUSED_EXPERTS = """
{root}layers.{b}.mlp.gate.weight  {tower} b mlp router -
{root}layers.{b}.mlp.experts.gate_up_proj  {tower} b mlp gate_up -
{root}layers.{b}.mlp.experts.down_proj  {tower} b mlp down -
"""
QWEN_EXPERTS = """
{root}layers.{b}.mlp.gate.weight  {tower} b mlp router -
{root}layers.{b}.mlp.experts.{e}.gate_proj.weight  {tower} b mlp gate e
{root}layers.{b}.mlp.experts.{e}.up_proj.weight  {tower} b mlp up e
{root}layers.{b}.mlp.experts.{e}.down_proj.weight  {tower} b mlp down e
"""
QWEN_SHARED_EXPERT = """
{root}layers.{b}.mlp.shared_expert.gate_proj.weight  {tower} b mlp shared_gate -
{root}layers.{b}.mlp.shared_expert.up_proj.weight  {tower} b mlp shared_up -
{root}layers.{b}.mlp.shared_expert.down_proj.weight  {tower} b mlp shared_down -
{root}layers.{b}.mlp.shared_expert_gate.weight  {tower} b mlp shared_router -
"""
MIXTRAL_EXPERTS = """
{root}layers.{b}.block_sparse_moe.gate.weight  {tower} b mlp router -
{root}layers.{b}.block_sparse_moe.experts.{e}.w1.weight  {tower} b mlp gate e
{root}layers.{b}.block_sparse_moe.experts.{e}.w2.weight  {tower} b mlp down e
{root}layers.{b}.block_sparse_moe.experts.{e}.w3.weight  {tower} b mlp up e
"""

GPT2_MODEL = """
{root}wte.weight  model - embedding - -
{root}wpe.weight  model - embedding - -
{root}h.{b}.ln_1.{wb}  model b norm - -
{root}h.{b}.attn.c_attn.{wb}  model b attention qkv -
{root}h.{b}.attn.c_proj.{wb}  model b attention o -
{root}h.{b}.ln_2.{wb}  model b norm - -
{root}h.{b}.mlp.c_fc.{wb}  model b mlp up -
{root}h.{b}.mlp.c_proj.{wb}  model b mlp down -
{root}ln_f.{wb}  model - final_norm - -
"""
GPT2_CROSS = """
{root}h.{b}.ln_cross_attn.{wb}  model b norm - -
{root}h.{b}.crossattention.q_attn.{wb}  model b attention cross_q -
{root}h.{b}.crossattention.c_attn.{wb}  model b attention cross_kv -
{root}h.{b}.crossattention.c_proj.{wb}  model b attention cross_o -
"""
NEOX = """
{root}embed_in.weight  model - embedding - -
{root}layers.{b}.input_layernorm.{wb}  model b norm - -
{root}layers.{b}.post_attention_layernorm.{wb}  model b norm - -
{root}layers.{b}.attention.query_key_value.{wb}  model b attention qkv -
{root}layers.{b}.attention.dense.{wb}  model b attention o -
{root}layers.{b}.mlp.dense_h_to_4h.{wb}  model b mlp up -
{root}layers.{b}.mlp.dense_4h_to_h.{wb}  model b mlp down -
{root}final_layer_norm.{wb}  model - final_norm - -
"""
FALCON_BLOCK = """
{root}h.{b}.self_attention.query_key_value.weight  model b attention qkv -
{root}h.{b}.self_attention.dense.weight  model b attention o -
{root}h.{b}.mlp.dense_h_to_4h.weight  model b mlp up -
{root}h.{b}.mlp.dense_4h_to_h.weight  model b mlp down -
"""
FALCON_OUTSIDE = """
{root}word_embeddings.weight  model - embedding - -
{root}ln_f.{wb}  model - final_norm - -
"""
FALCON = FALCON_BLOCK + FALCON_OUTSIDE
FALCON_NORM = "{root}h.{b}.input_layernorm.{wb}  model b norm - -\n"
FALCON_NORMS = """
{root}h.{b}.ln_attn.{wb}  model b norm - -
{root}h.{b}.ln_mlp.{wb}  model b norm - -
"""
BLOOM_NORMS = """
{root}h.{b}.input_layernorm.{wb}  model b norm - -
{root}h.{b}.post_attention_layernorm.{wb}  model b norm - -
"""
BLOOM = FALCON_BLOCK.replace(".weight", ".{wb}") + FALCON_OUTSIDE + BLOOM_NORMS
BLOOM_EMBEDDING_NORM = "{root}word_embeddings_layernorm.{wb}  model - norm - -\n"
MPT = """
{root}wte.weight  model - embedding - -
{root}blocks.{b}.norm_1.weight  model b norm - -
{root}blocks.{b}.attn.Wqkv.weight  model b attention qkv -
{root}blocks.{b}.attn.out_proj.weight  model b attention o -
{root}blocks.{b}.norm_2.weight  model b norm - -
{root}blocks.{b}.ffn.up_proj.weight  model b mlp up -
{root}blocks.{b}.ffn.down_proj.weight  model b mlp down -
{root}norm_f.weight  model - final_norm - -
"""
OPT_BLOCK = """
{root}decoder.layers.{b}.self_attn.q_proj.{wb}  decoder b attention q -
{root}decoder.layers.{b}.self_attn.k_proj.{wb}  decoder b attention k -
{root}decoder.layers.{b}.self_attn.v_proj.{wb}  decoder b attention v -
{root}decoder.layers.{b}.self_attn.out_proj.{wb}  decoder b attention o -
{root}decoder.layers.{b}.self_attn_layer_norm.{wb}  decoder b norm - -
{root}decoder.layers.{b}.fc1.{wb}  decoder b mlp up -
{root}decoder.layers.{b}.fc2.{wb}  decoder b mlp down -
{root}decoder.layers.{b}.final_layer_norm.{wb}  decoder b norm - -
{root}decoder.embed_positions.weight  decoder - embedding - -
{root}decoder.project_in.weight  decoder - embedding - -
{root}decoder.project_out.weight  decoder - head - -
"""
OPT_OUTSIDE = """
model.decoder.embed_tokens.weight  decoder - embedding - -
model.decoder.final_layer_norm.{wb}  decoder - final_norm - -
"""
# Without the prefix two names are T5's as well and get its tower; they are outside the blocks.
OPT_BARE_OUTSIDE = """
decoder.embed_tokens.weight  decoder - embedding - -
decoder.final_layer_norm.weight  decoder - final_norm - -
decoder.final_layer_norm.bias  decoder - final_norm - -
"""

BERT = """
{root}embeddings.word_embeddings.weight  model - embedding - -
{root}embeddings.position_embeddings.weight  model - embedding - -
{root}embeddings.token_type_embeddings.weight  model - embedding - -
{root}embeddings.LayerNorm.{wb}  model - norm - -
{root}encoder.layer.{b}.attention.self.query.{wb}  model b attention q -
{root}encoder.layer.{b}.attention.self.key.{wb}  model b attention k -
{root}encoder.layer.{b}.attention.self.value.{wb}  model b attention v -
{root}encoder.layer.{b}.attention.output.dense.{wb}  model b attention o -
{root}encoder.layer.{b}.attention.output.LayerNorm.{wb}  model b norm - -
{root}encoder.layer.{b}.intermediate.dense.{wb}  model b mlp up -
{root}encoder.layer.{b}.output.dense.{wb}  model b mlp down -
{root}encoder.layer.{b}.output.LayerNorm.{wb}  model b norm - -
"""
BERT_CROSS = """
{root}encoder.layer.{b}.crossattention.self.query.{wb}  model b attention cross_q -
{root}encoder.layer.{b}.crossattention.self.key.{wb}  model b attention cross_k -
{root}encoder.layer.{b}.crossattention.self.value.{wb}  model b attention cross_v -
{root}encoder.layer.{b}.crossattention.output.dense.{wb}  model b attention cross_o -
{root}encoder.layer.{b}.crossattention.output.LayerNorm.{wb}  model b norm - -
"""
POOLER = "{root}pooler.dense.{wb}  model - head - -\n"
BERT_PREDICTIONS = """
cls.predictions.bias  model - head - -
cls.predictions.transform.dense.{wb}  model - head - -
cls.predictions.transform.LayerNorm.{wb}  model - head - -
cls.predictions.decoder.{wb}  model - head - -
"""
BERT_NEXT_SENTENCE = "cls.seq_relationship.{wb}  model - head - -\n"
CLASSIFIER = "classifier.{wb}  model - head - -\n"
ROBERTA_LM_HEAD = """
lm_head.bias  model - head - -
lm_head.dense.{wb}  model - head - -
lm_head.layer_norm.{wb}  model - head - -
lm_head.decoder.{wb}  model - head - -
"""
ROBERTA_CLASSIFIER = """
classifier.dense.{wb}  model - head - -
classifier.out_proj.{wb}  model - head - -
"""

T5_SHARED = "{root}shared.weight  model - embedding - -\n"
T5_ENCODER = """
{root}encoder.embed_tokens.weight  encoder - embedding - -
{root}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight \
encoder 0 attention relative_bias -
{root}encoder.block.{b}.layer.0.SelfAttention.q.weight  encoder b attention q -
{root}encoder.block.{b}.layer.0.SelfAttention.k.weight  encoder b attention k -
{root}encoder.block.{b}.layer.0.SelfAttention.v.weight  encoder b attention v -
{root}encoder.block.{b}.layer.0.SelfAttention.o.weight  encoder b attention o -
{root}encoder.block.{b}.layer.0.layer_norm.weight  encoder b norm - -
{root}encoder.block.{b}.layer.1.layer_norm.weight  encoder b norm - -
{root}encoder.final_layer_norm.weight  encoder - final_norm - -
"""
T5_DECODER = """
{root}decoder.embed_tokens.weight  decoder - embedding - -
{root}decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight \
decoder 0 attention relative_bias -
{root}decoder.block.{b}.layer.0.SelfAttention.q.weight  decoder b attention q -
{root}decoder.block.{b}.layer.0.SelfAttention.k.weight  decoder b attention k -
{root}decoder.block.{b}.layer.0.SelfAttention.v.weight  decoder b attention v -
{root}decoder.block.{b}.layer.0.SelfAttention.o.weight  decoder b attention o -
{root}decoder.block.{b}.layer.0.layer_norm.weight  decoder b norm - -
{root}decoder.block.{b}.layer.1.EncDecAttention.q.weight  decoder b attention cross_q -
{root}decoder.block.{b}.layer.1.EncDecAttention.k.weight  decoder b attention cross_k -
{root}decoder.block.{b}.layer.1.EncDecAttention.v.weight  decoder b attention cross_v -
{root}decoder.block.{b}.layer.1.EncDecAttention.o.weight  decoder b attention cross_o -
{root}decoder.block.{b}.layer.1.layer_norm.weight  decoder b norm - -
{root}decoder.block.{b}.layer.2.layer_norm.weight  decoder b norm - -
{root}decoder.final_layer_norm.weight  decoder - final_norm - -
"""
T5_ENCODER_MLP = """
{root}encoder.block.{b}.layer.1.DenseReluDense.wi.weight  encoder b mlp up -
{root}encoder.block.{b}.layer.1.DenseReluDense.wo.weight  encoder b mlp down -
"""
T5_DECODER_MLP = """
{root}decoder.block.{b}.layer.2.DenseReluDense.wi.weight  decoder b mlp up -
{root}decoder.block.{b}.layer.2.DenseReluDense.wo.weight  decoder b mlp down -
"""
T5_GATED_MLPS = """
{root}encoder.block.{b}.layer.1.DenseReluDense.wi_0.weight  encoder b mlp gate -
{root}encoder.block.{b}.layer.1.DenseReluDense.wi_1.weight  encoder b mlp up -
{root}encoder.block.{b}.layer.1.DenseReluDense.wo.weight  encoder b mlp down -
{root}decoder.block.{b}.layer.2.DenseReluDense.wi_0.weight  decoder b mlp gate -
{root}decoder.block.{b}.layer.2.DenseReluDense.wi_1.weight  decoder b mlp up -
{root}decoder.block.{b}.layer.2.DenseReluDense.wo.weight  decoder b mlp down -
"""
T5_CLASSIFIER = """
classification_head.dense.{wb}  model - head - -
classification_head.out_proj.{wb}  model - head - -
"""
T5_TIED = "{root}encoder.embed_tokens.weight {root}decoder.embed_tokens.weight"

VIT_OUTSIDE = """
{root}embeddings.cls_token  model - embedding - -
{root}embeddings.position_embeddings  model - embedding - -
{root}embeddings.patch_embeddings.projection.{wb}  model - embedding - -
{root}layernorm.{wb}  model - final_norm - -
"""
MASK_TOKEN = "{root}embeddings.mask_token  model - embedding - -\n"
REGISTERS = "{root}embeddings.register_tokens  model - embedding - -\n"
OLD_ATTENTION = """
{root}encoder.layer.{b}.attention.attention.query.{wb}  model b attention q -
{root}encoder.layer.{b}.attention.attention.key.{wb}  model b attention k -
{root}encoder.layer.{b}.attention.attention.value.{wb}  model b attention v -
{root}encoder.layer.{b}.attention.output.dense.{wb}  model b attention o -
"""
VIT_DISK = (
    OLD_ATTENTION
    + """
{root}encoder.layer.{b}.intermediate.dense.{wb}  model b mlp up -
{root}encoder.layer.{b}.output.dense.{wb}  model b mlp down -
{root}encoder.layer.{b}.layernorm_before.{wb}  model b norm - -
{root}encoder.layer.{b}.layernorm_after.{wb}  model b norm - -
"""
)
VIT_MEMORY = """
{root}layers.{b}.attention.q_proj.{wb}  model b attention q -
{root}layers.{b}.attention.k_proj.{wb}  model b attention k -
{root}layers.{b}.attention.v_proj.{wb}  model b attention v -
{root}layers.{b}.attention.o_proj.{wb}  model b attention o -
{root}layers.{b}.mlp.fc1.{wb}  model b mlp up -
{root}layers.{b}.mlp.fc2.{wb}  model b mlp down -
{root}layers.{b}.layernorm_before.{wb}  model b norm - -
{root}layers.{b}.layernorm_after.{wb}  model b norm - -
"""
DINO_ATTENTION_MEMORY = """
{root}encoder.layer.{b}.attention.q_proj.{wb}  model b attention q -
{root}encoder.layer.{b}.attention.k_proj.{wb}  model b attention k -
{root}encoder.layer.{b}.attention.v_proj.{wb}  model b attention v -
{root}encoder.layer.{b}.attention.o_proj.{wb}  model b attention o -
"""
DINO_REST = """
{root}encoder.layer.{b}.layer_scale1.lambda1  model b attention scale -
{root}encoder.layer.{b}.layer_scale2.lambda1  model b mlp scale -
{root}encoder.layer.{b}.norm1.{wb}  model b norm - -
{root}encoder.layer.{b}.norm2.{wb}  model b norm - -
"""
DINO_MLP = """
{root}encoder.layer.{b}.mlp.fc1.{wb}  model b mlp up -
{root}encoder.layer.{b}.mlp.fc2.{wb}  model b mlp down -
"""
DINO_SWIGLU_MEMORY = """
{root}encoder.layer.{b}.mlp.gate_proj.{wb}  model b mlp gate -
{root}encoder.layer.{b}.mlp.up_proj.{wb}  model b mlp up -
{root}encoder.layer.{b}.mlp.down_proj.{wb}  model b mlp down -
"""
DINO_SWIGLU_DISK = """
{root}encoder.layer.{b}.mlp.weights_in.{wb}  model b mlp gate_up -
{root}encoder.layer.{b}.mlp.weights_out.{wb}  model b mlp down -
"""
DINO = VIT_OUTSIDE + MASK_TOKEN + DINO_REST

CLIP_BLOCK = """
{root}encoder.layers.{b}.self_attn.q_proj.{wb}  {tower} b attention q -
{root}encoder.layers.{b}.self_attn.k_proj.{wb}  {tower} b attention k -
{root}encoder.layers.{b}.self_attn.v_proj.{wb}  {tower} b attention v -
{root}encoder.layers.{b}.self_attn.out_proj.{wb}  {tower} b attention o -
{root}encoder.layers.{b}.layer_norm1.{wb}  {tower} b norm - -
{root}encoder.layers.{b}.layer_norm2.{wb}  {tower} b norm - -
{root}encoder.layers.{b}.mlp.fc1.{wb}  {tower} b mlp up -
{root}encoder.layers.{b}.mlp.fc2.{wb}  {tower} b mlp down -
"""
CLIP_TEXT = (
    CLIP_BLOCK
    + """
{root}embeddings.token_embedding.weight  {tower} - embedding - -
{root}embeddings.position_embedding.weight  {tower} - embedding - -
{root}final_layer_norm.{wb}  {tower} - final_norm - -
"""
)
CLIP_VISION = (
    CLIP_BLOCK
    + """
{root}embeddings.class_embedding  {tower} - embedding - -
{root}embeddings.patch_embedding.weight  {tower} - embedding - -
{root}embeddings.position_embedding.weight  {tower} - embedding - -
{root}pre_layrnorm.{wb}  {tower} - norm - -
{root}post_layernorm.{wb}  {tower} - final_norm - -
"""
)
TEXT_PROJECTION = "text_projection.weight  text - head - -\n"
VISUAL_PROJECTION = "visual_projection.weight  vision - head - -\n"
LOGIT_SCALE = "logit_scale  model - head - -\n"
LOGIT_BIAS = "logit_bias  model - head - -\n"
SIGLIP_VISION = (
    CLIP_BLOCK
    + """
{root}embeddings.patch_embedding.{wb}  {tower} - embedding - -
{root}embeddings.position_embedding.weight  {tower} - embedding - -
{root}post_layernorm.{wb}  {tower} - final_norm - -
{root}head.probe  {tower} - head - -
{root}head.attention.in_proj_weight  {tower} - head - -
{root}head.attention.in_proj_bias  {tower} - head - -
{root}head.attention.out_proj.{wb}  {tower} - head - -
{root}head.layernorm.{wb}  {tower} - head - -
{root}head.mlp.fc1.{wb}  {tower} - head - -
{root}head.mlp.fc2.{wb}  {tower} - head - -
"""
)
SIGLIP_TEXT = CLIP_TEXT + "{root}head.{wb}  {tower} - head - -\n"
GEMMA3_PROJECTOR = """
{root}multi_modal_projector.mm_input_projection_weight  vision - head - -
{root}multi_modal_projector.mm_soft_emb_norm.weight  vision - head - -
"""

OPEN_CLIP_BLOCK = """
{root}transformer.resblocks.{b}.ln_1.{wb}  {tower} b norm - -
{root}transformer.resblocks.{b}.attn.in_proj_weight  {tower} b attention qkv -
{root}transformer.resblocks.{b}.attn.in_proj_bias  {tower} b attention qkv -
{root}transformer.resblocks.{b}.attn.out_proj.{wb}  {tower} b attention o -
{root}transformer.resblocks.{b}.ln_2.{wb}  {tower} b norm - -
{root}transformer.resblocks.{b}.mlp.c_fc.{wb}  {tower} b mlp up -
{root}transformer.resblocks.{b}.mlp.c_proj.{wb}  {tower} b mlp down -
"""
OPEN_CLIP_SCALES = """
{root}transformer.resblocks.{b}.ls_1.gamma  {tower} b attention scale -
{root}transformer.resblocks.{b}.ls_2.gamma  {tower} b mlp scale -
"""
OPEN_CLIP_VISION = """
{root}class_embedding  {tower} - embedding - -
{root}positional_embedding  {tower} - embedding - -
{root}conv1.weight  {tower} - embedding - -
{root}ln_pre.{wb}  {tower} - norm - -
{root}ln_post.{wb}  {tower} - final_norm - -
{root}proj  {tower} - head - -
"""
OPEN_CLIP_POOL = """
{root}attn_pool.query  {tower} - head - -
{root}attn_pool.attn.q_proj_weight  {tower} - head - -
{root}attn_pool.attn.k_proj_weight  {tower} - head - -
{root}attn_pool.attn.v_proj_weight  {tower} - head - -
{root}attn_pool.attn.in_proj_bias  {tower} - head - -
{root}attn_pool.attn.out_proj.{wb}  {tower} - head - -
{root}attn_pool.ln_q.{wb}  {tower} - head - -
{root}attn_pool.ln_k.{wb}  {tower} - head - -
"""
OPEN_CLIP_TEXT = """
{root}token_embedding.weight  {tower} - embedding - -
{root}positional_embedding  {tower} - embedding - -
{root}ln_final.{wb}  {tower} - final_norm - -
"""

TIMM = """
{root}pos_embed  {tower} - embedding - -
{root}patch_embed.proj.{wb}  {tower} - embedding - -
{root}blocks.{b}.norm1.{wb}  {tower} b norm - -
{root}blocks.{b}.attn.qkv.{wb}  {tower} b attention qkv -
{root}blocks.{b}.attn.proj.{wb}  {tower} b attention o -
{root}blocks.{b}.norm2.{wb}  {tower} b norm - -
{root}blocks.{b}.mlp.fc1.{wb}  {tower} b mlp up -
{root}blocks.{b}.mlp.fc2.{wb}  {tower} b mlp down -
{root}norm.{wb}  {tower} - final_norm - -
"""
TIMM_CLASS = "{root}cls_token  {tower} - embedding - -\n"
TIMM_MORE = """
{root}reg_token  {tower} - embedding - -
{root}blocks.{b}.attn.q_norm.{wb}  {tower} b norm q -
{root}blocks.{b}.attn.k_norm.{wb}  {tower} b norm k -
{root}blocks.{b}.ls1.gamma  {tower} b attention scale -
{root}blocks.{b}.ls2.gamma  {tower} b mlp scale -
"""
TIMM_HEAD = "{root}head.{wb}  {tower} - head - -\n"
TIMM_POOL = """
{root}attn_pool.latent  {tower} - head - -
{root}attn_pool.q.{wb}  {tower} - head - -
{root}attn_pool.kv.{wb}  {tower} - head - -
{root}attn_pool.proj.{wb}  {tower} - head - -
{root}attn_pool.norm.{wb}  {tower} - head - -
{root}attn_pool.mlp.fc1.{wb}  {tower} - head - -
{root}attn_pool.mlp.fc2.{wb}  {tower} - head - -
"""


def at(root: str, table: str, tower: str = "model") -> str:
    return table.replace("{root}", root).replace("{tower}", tower)


def expand(table: str, blocks: int) -> dict[str, LayerKey]:
    """The expected key of every tensor of a model with so many blocks."""
    keys: dict[str, LayerKey] = {}
    for line in filter(None, table.splitlines()):
        name, tower, block, module, projection, expert = line.split()
        assert "{root}" not in name
        for b, e, wb in itertools.product(range(blocks), range(EXPERTS), ("weight", "bias")):
            key = LayerKey(
                tower,
                {"-": None, "b": b, "0": 0}[block],
                module,
                None if projection == "-" else projection,
                {"-": None, "e": e}[expert],
            )
            full = name.replace("{b}", str(b)).replace("{e}", str(e)).replace("{wb}", wb)
            assert keys.setdefault(full, key) == key
    return keys


# --- the models --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    build: Callable[[int], torch.nn.Module]
    memory: str
    disk: str | None = None  # None: as in memory
    tied: str = ""  # names that are in memory only, because another tensor is the same
    towers: tuple[str, ...] = ("model",)
    blocks: int = 3


def llama_like(model: str, config: str, memory: str, disk: str | None = None, **options):
    extra = {"pad_token_id": 0, **options}
    return Architecture(
        lambda n: getattr(tf, model)(getattr(tf, config)(**GROUPED, num_hidden_layers=n, **extra)),
        at("model.", memory),
        None if disk is None else at("model.", disk),
    )


def image_model(model: str, config: str, root: str, memory: str, disk: str, **options):
    return Architecture(
        lambda n: getattr(tf, model)(getattr(tf, config)(**IMAGE, num_hidden_layers=n, **options)),
        at(root, memory),
        at(root, disk),
    )


def bert_like(model: str, config: str, root: str, table: str, tied: str = "", **options):
    return Architecture(
        lambda n: getattr(tf, model)(getattr(tf, config)(**TEXT, num_hidden_layers=n, **options)),
        at(root, table),
        tied=tied,
    )


def t5(model: str, root: str, table: str, tied: str, **options):
    return Architecture(
        lambda n: getattr(tf, model)(tf.T5Config(**T5, num_layers=n, **options)),
        at(root, table),
        tied=at(root, tied),
        towers=("encoder",) if "Encoder" in model else ("encoder", "decoder"),
    )


def clip(model: str, part: str | None, table: str, towers: tuple[str, ...]):
    def build(n: int) -> torch.nn.Module:
        config = tf.CLIPConfig(
            text_config={
                **TEXT,
                "num_hidden_layers": n,
                "max_position_embeddings": 8,
                "bos_token_id": 0,
                "eos_token_id": 1,
            },
            vision_config={**IMAGE, "num_hidden_layers": n},
            projection_dim=8,
        )
        return getattr(tf, model)(config if part is None else getattr(config, part))

    return Architecture(build, table, towers=towers)


def gemma3_images(n: int) -> torch.nn.Module:
    text = {**GROUPED, "num_hidden_layers": n, "layer_types": ["full_attention"] * n}
    vision = {**IMAGE, "num_hidden_layers": n}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def siglip(n: int) -> torch.nn.Module:
    text = {**TEXT, "num_hidden_layers": n, "max_position_embeddings": 8}
    return tf.SiglipModel(
        tf.SiglipConfig(
            text_config={**text, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
            vision_config={**IMAGE, "num_hidden_layers": n},
        )
    )


def opt(model: str, table: str, tied: str = "") -> Architecture:
    narrow = {"word_embed_proj_dim": 8, "max_position_embeddings": 8, "pad_token_id": 1}
    size = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 32}
    return Architecture(
        lambda n: getattr(tf, model)(tf.OPTConfig(**size, **narrow, num_hidden_layers=n)),
        table,
        tied=tied,
        towers=("decoder",),
    )


def gpt2(model: str, root: str, table: str, tied: str = "", **options) -> Architecture:
    return Architecture(
        lambda n: getattr(tf, model)(tf.GPT2Config(**GPT2, n_layer=n, **options)),
        at(root, table),
        tied=tied,
    )


def falcon(table: str, tied: str = "lm_head.weight", **options) -> Architecture:
    size = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 32}
    return Architecture(
        lambda n: tf.FalconForCausalLM(tf.FalconConfig(**size, num_hidden_layers=n, **options)),
        at("transformer.", table + LM_HEAD),
        tied=tied,
    )


GEMMA3_BLOCKS = LLAMA + QK_NORMS + GEMMA_NORMS
MOE = LLAMA_ATTENTION + LLAMA_NORMS + LLAMA_OUTSIDE + LM_HEAD
MOE_SIZE = {"num_experts": EXPERTS, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
T5_10 = T5_SHARED + T5_ENCODER + T5_DECODER + T5_ENCODER_MLP + T5_DECODER_MLP
BERT_TIED = "cls.predictions.decoder.weight cls.predictions.decoder.bias"

ARCHITECTURES = {
    "llama": llama_like("LlamaForCausalLM", "LlamaConfig", LLAMA + LM_HEAD),
    "llama-bare": Architecture(
        lambda n: tf.LlamaModel(tf.LlamaConfig(**GROUPED, num_hidden_layers=n)),
        at("", LLAMA),
    ),
    "llama-classifier": llama_like(
        "LlamaForSequenceClassification",
        "LlamaConfig",
        LLAMA + "score.weight  model - head - -\n",
    ),
    "mistral": llama_like("MistralForCausalLM", "MistralConfig", LLAMA + LM_HEAD),
    "qwen2": llama_like("Qwen2ForCausalLM", "Qwen2Config", LLAMA + QWEN2_BIASES + LM_HEAD),
    "qwen3": llama_like("Qwen3ForCausalLM", "Qwen3Config", LLAMA + QK_NORMS + LM_HEAD),
    "gemma2": llama_like(
        "Gemma2ForCausalLM", "Gemma2Config", LLAMA + GEMMA_NORMS + LM_HEAD, LLAMA + GEMMA_NORMS
    ),
    "gemma3": llama_like(
        "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3_BLOCKS + LM_HEAD, GEMMA3_BLOCKS
    ),
    "gemma3-images": Architecture(
        gemma3_images,
        at("model.language_model.", GEMMA3_BLOCKS, "text")
        + at("model.vision_tower.", SIGLIP_VISION, "vision")
        + at("model.", GEMMA3_PROJECTOR)
        + LM_HEAD,
        at("language_model.model.", GEMMA3_BLOCKS, "text")
        + at("vision_tower.", SIGLIP_VISION, "vision")
        + at("", GEMMA3_PROJECTOR),
        towers=("text", "vision"),
    ),
    "phi3": llama_like(
        "Phi3ForCausalLM", "Phi3Config", PHI3_BLOCK + LLAMA_NORMS + LLAMA_OUTSIDE + LM_HEAD
    ),
    "mixtral": llama_like(
        "MixtralForCausalLM",
        "MixtralConfig",
        MOE + FUSED_EXPERTS,
        MOE + MIXTRAL_EXPERTS,
        num_local_experts=EXPERTS,
    ),
    "qwen2-moe": llama_like(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        MOE + QWEN2_BIASES + QWEN_SHARED_EXPERT + FUSED_EXPERTS,
        MOE + QWEN2_BIASES + QWEN_SHARED_EXPERT + QWEN_EXPERTS,
        shared_expert_intermediate_size=8,
        **MOE_SIZE,
    ),
    "qwen3-moe": llama_like(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        MOE + QK_NORMS + FUSED_EXPERTS,
        MOE + QK_NORMS + QWEN_EXPERTS,
        **MOE_SIZE,
    ),
    "gpt2": gpt2("GPT2LMHeadModel", "transformer.", GPT2_MODEL + LM_HEAD, "lm_head.weight"),
    "gpt2-bare": gpt2("GPT2Model", "", GPT2_MODEL),
    "gpt2-cross-attention": gpt2(
        "GPT2LMHeadModel",
        "transformer.",
        GPT2_MODEL + GPT2_CROSS + LM_HEAD,
        "lm_head.weight",
        add_cross_attention=True,
    ),
    "gpt-neox": Architecture(
        lambda n: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, num_hidden_layers=n)),
        at("gpt_neox.", NEOX + LM_HEAD),
        at("gpt_neox.", NEOX + "embed_out.weight  model - head - -\n"),
    ),
    "gpt-neox-bare": Architecture(
        lambda n: tf.GPTNeoXModel(tf.GPTNeoXConfig(**TEXT, num_hidden_layers=n)),
        at("", NEOX),
    ),
    "bloom": Architecture(
        lambda n: tf.BloomForCausalLM(
            tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=n, n_head=2)
        ),
        at("transformer.", BLOOM + BLOOM_EMBEDDING_NORM + LM_HEAD),
        tied="lm_head.weight",
    ),
    "bloom-bare": Architecture(
        lambda n: tf.BloomModel(tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=n, n_head=2)),
        at("", BLOOM + BLOOM_EMBEDDING_NORM),
    ),
    "falcon": falcon(FALCON + FALCON_NORM, multi_query=True),
    "falcon-new": falcon(FALCON + FALCON_NORMS, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": falcon(BLOOM, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "mpt": Architecture(
        lambda n: tf.MptForCausalLM(tf.MptConfig(vocab_size=32, d_model=16, n_layers=n, n_heads=2)),
        at("transformer.", MPT + LM_HEAD),
        tied="lm_head.weight",
    ),
    "opt": opt("OPTForCausalLM", at("model.", OPT_BLOCK + OPT_OUTSIDE + LM_HEAD), "lm_head.weight"),
    "opt-bare": opt("OPTModel", at("", OPT_BLOCK + OPT_BARE_OUTSIDE)),
    "bert": bert_like(
        "BertForPreTraining",
        "BertConfig",
        "bert.",
        BERT + POOLER + BERT_PREDICTIONS + BERT_NEXT_SENTENCE,
        BERT_TIED,
    ),
    "bert-bare": bert_like("BertModel", "BertConfig", "", BERT + POOLER),
    "bert-classifier": bert_like(
        "BertForSequenceClassification", "BertConfig", "bert.", BERT + POOLER + CLASSIFIER
    ),
    "bert-decoder": bert_like(
        "BertLMHeadModel",
        "BertConfig",
        "bert.",
        BERT + BERT_CROSS + BERT_PREDICTIONS,
        BERT_TIED,
        is_decoder=True,
        add_cross_attention=True,
    ),
    "roberta": bert_like(
        "RobertaForMaskedLM",
        "RobertaConfig",
        "roberta.",
        BERT + ROBERTA_LM_HEAD,
        "lm_head.decoder.weight lm_head.decoder.bias",
    ),
    "roberta-bare": bert_like("RobertaModel", "RobertaConfig", "", BERT + POOLER),
    "roberta-classifier": bert_like(
        "RobertaForSequenceClassification", "RobertaConfig", "roberta.", BERT + ROBERTA_CLASSIFIER
    ),
    "roberta-answers": bert_like(
        "RobertaForQuestionAnswering",
        "RobertaConfig",
        "roberta.",
        BERT + "qa_outputs.{wb}  model - head - -\n",
    ),
    "t5": t5("T5ForConditionalGeneration", "", T5_10 + LM_HEAD, T5_TIED + " lm_head.weight"),
    "t5-gated": t5(
        "T5ForConditionalGeneration",
        "",
        T5_SHARED + T5_ENCODER + T5_DECODER + T5_GATED_MLPS + LM_HEAD,
        T5_TIED + " lm_head.weight",
        feed_forward_proj="gated-gelu",
    ),
    "t5-encoder": t5(
        "T5EncoderModel",
        "",
        T5_SHARED + T5_ENCODER + T5_ENCODER_MLP,
        "encoder.embed_tokens.weight",
    ),
    "t5-classifier": t5(
        "T5ForSequenceClassification", "transformer.", T5_10 + T5_CLASSIFIER, T5_TIED
    ),
    "vit": image_model(
        "ViTForImageClassification",
        "ViTConfig",
        "vit.",
        VIT_OUTSIDE + VIT_MEMORY + CLASSIFIER,
        VIT_OUTSIDE + VIT_DISK + CLASSIFIER,
    ),
    "vit-bare": image_model(
        "ViTModel",
        "ViTConfig",
        "",
        VIT_OUTSIDE + VIT_MEMORY + POOLER,
        VIT_OUTSIDE + VIT_DISK + POOLER,
    ),
    "vit-masked": image_model(  # its decoder is called by a name that says nothing
        "ViTForMaskedImageModeling",
        "ViTConfig",
        "vit.",
        VIT_OUTSIDE + MASK_TOKEN + VIT_MEMORY + "decoder.0.{wb}  model - other - -\n",
        VIT_OUTSIDE + MASK_TOKEN + VIT_DISK + "decoder.0.{wb}  model - other - -\n",
        encoder_stride=14,
    ),
    "dinov2": image_model(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        "dinov2.",
        DINO + DINO_MLP + DINO_ATTENTION_MEMORY + CLASSIFIER,
        DINO + DINO_MLP + OLD_ATTENTION + CLASSIFIER,
    ),
    "dinov2-bare": image_model(
        "Dinov2Model",
        "Dinov2Config",
        "",
        DINO + DINO_MLP + DINO_ATTENTION_MEMORY,
        DINO + DINO_MLP + OLD_ATTENTION,
    ),
    "dinov2-swiglu": image_model(
        "Dinov2Model",
        "Dinov2Config",
        "",
        DINO + DINO_SWIGLU_MEMORY + DINO_ATTENTION_MEMORY,
        DINO + DINO_SWIGLU_DISK + OLD_ATTENTION,
        use_swiglu_ffn=True,
    ),
    "dinov2-registers": image_model(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        "dinov2_with_registers.",
        DINO + REGISTERS + DINO_MLP + DINO_ATTENTION_MEMORY + CLASSIFIER,
        DINO + REGISTERS + DINO_MLP + OLD_ATTENTION + CLASSIFIER,
    ),
    "clip": clip(
        "CLIPModel",
        None,
        at("text_model.", CLIP_TEXT, "text")
        + at("vision_model.", CLIP_VISION, "vision")
        + TEXT_PROJECTION
        + VISUAL_PROJECTION
        + LOGIT_SCALE,
        ("text", "vision"),
    ),
    "clip-vision": clip(
        "CLIPVisionModelWithProjection",
        "vision_config",
        at("vision_model.", CLIP_VISION, "vision") + VISUAL_PROJECTION,
        ("vision",),
    ),
    "clip-text": clip(
        "CLIPTextModelWithProjection",
        "text_config",
        at("text_model.", CLIP_TEXT, "text") + TEXT_PROJECTION,
        ("text",),
    ),
    "clip-vision-bare": clip(
        "CLIPVisionModel", "vision_config", at("", CLIP_VISION, "model"), ("model",)
    ),
    "clip-text-bare": clip("CLIPTextModel", "text_config", at("", CLIP_TEXT, "model"), ("model",)),
    "clip-classifier": clip(
        "CLIPForImageClassification",
        None,
        at("vision_model.", CLIP_VISION, "vision") + CLASSIFIER,
        ("vision",),
    ),
    "siglip": Architecture(
        siglip,
        at("text_model.", SIGLIP_TEXT, "text")
        + at("vision_model.", SIGLIP_VISION, "vision")
        + LOGIT_SCALE
        + LOGIT_BIAS,
        towers=("text", "vision"),
    ),
}


# What tests/foreign_models.py builds. The tower of timm in open_clip has twelve blocks.
FOREIGN = {
    "open_clip": at("visual.", OPEN_CLIP_BLOCK + OPEN_CLIP_VISION, "vision")
    + at("", OPEN_CLIP_BLOCK + OPEN_CLIP_TEXT, "text")
    + LOGIT_SCALE
    + "text_projection  text - head - -\n",
    "open_clip-coca": at(
        "visual.",
        OPEN_CLIP_BLOCK + OPEN_CLIP_SCALES + OPEN_CLIP_VISION + OPEN_CLIP_POOL,
        "vision",
    )
    + at("text.", OPEN_CLIP_BLOCK + OPEN_CLIP_SCALES + OPEN_CLIP_TEXT, "text")
    + "text.cls_emb  text - embedding - -\n"
    + "text.text_projection.{wb}  text - head - -\n"
    + LOGIT_SCALE
    + LOGIT_BIAS,
    "open_clip-timm": at("visual.trunk.", TIMM + TIMM_CLASS, "vision")
    + "visual.head.proj.weight  vision - head - -\n"
    + at("text.", OPEN_CLIP_BLOCK + OPEN_CLIP_TEXT, "text")
    + "text.text_projection  text - head - -\n"
    + LOGIT_SCALE,
    "timm": at("", TIMM + TIMM_CLASS + TIMM_HEAD),
    "timm-norms": at("", TIMM + TIMM_CLASS + TIMM_MORE + TIMM_HEAD),
    "timm-pool": at("", TIMM + TIMM_POOL + TIMM_HEAD),
}
