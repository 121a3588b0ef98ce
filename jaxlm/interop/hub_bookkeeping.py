"""Lists the fields of config.json that say nothing about a forward pass, and why others matter.

They are what published folders and the programs that write them leave there: transformers 3 to 5,
its trainers and generation, unsloth, trl, axolotl, megatron's and mlx's converters.
"""

from __future__ import annotations

from typing import Any

_WRITERS = """
  transformers_version unsloth_version unsloth_fixed is_llama_config mlx_version model_name
  finetuning_task task_specific_params problem_type num_labels id2label label2id
  tokenizer_class processor_class tokenizer_type tokenizer model_max_length max_sequence_length
  seq_length max_seq_len padding_side truncation_side chat_template
"""
_COMPUTE = """
  use_cache cache_implementation attn_implementation attention_implementation use_flash_attn
  use_flash_attention use_flash_attention_2 use_cache_quantization use_cache_kernel fused_mlp
  use_kernels use_fused_rope use_fused_swiglu torchscript use_bfloat16 use_fp16 tf_legacy_loss
  chunk_size_feed_forward pretraining_tp tensor_parallel low_cpu_mem_usage return_dict
  use_return_dict output_attentions output_hidden_states gradient_checkpointing
  gradient_checkpointing_kwargs use_reentrant
"""
_TRAINING = """
  initializer_range initializer_factor init_std init_method neftune_noise_alpha
  max_grad_norm label_smoothing is_decoder tie_encoder_decoder cross_attention_hidden_size
  router_aux_loss_coef output_router_logits classifier_dropout
"""
_TOKENS = """
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
  decoder_start_token_id bos_token eos_token pad_token unk_token add_bos_token add_eos_token
"""
_GENERATION = """
  max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
  num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff
  eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
  bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
  forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
  begin_suppress_tokens prefix generation_config
"""
HARMLESS = frozenset(" ".join((_WRITERS, _COMPUTE, _TRAINING, _TOKENS, _GENERATION)).split())

HARMLESS_AS: dict[str, tuple[Any, str]] = {
  "is_encoder_decoder": (False, "must be false: there is no encoder here"),
  "add_cross_attention": (False, "must be false: there is no encoder here"),
  "is_causal": (True, "must be true: attention here is causal"),
  "pruned_heads": ({}, "must be empty: all heads of a layer are computed"),
  "partial_rotary_factor": (1.0, "must be 1: the whole head is rotated"),
  "rope_interleaved": (False, "must be false: a head's halves are rotated, not its pairs"),
  "use_mrope": (False, "must be false: a position is one number here, not three"),
  "mlp_bias": (False, "must be false: the family has no such biases"),
  "num_nextn_predict_layers": (0, "must be 0: this family predicts one token"),
  **{
    key: (0.0, "must be 0: there is no dropout here")
    for key in (
      "attention_dropout",
      "attn_pdrop",
      "attention_probs_dropout_prob",
      "dropout",
      "embd_pdrop",
      "embd_dropout",
      "embedding_dropout",
      "hidden_dropout",
      "hidden_dropout_prob",
      "resid_pdrop",
      "resid_dropout",
      "mlp_dropout",
    )
  },
}
"""Fields that change nothing at this one value, and the rule that others break."""

_QUANTIZED = (
  "says that the weights are quantized, or become so when they are loaded; here they are read as "
  "they are, in float32, bfloat16 or float16"
)
REASONS = {
  "quantization_config": _QUANTIZED,
  "compression_config": _QUANTIZED,
  "quantization": _QUANTIZED,
  "auto_map": "names code of the repository for the model, which is not run here",
}
"""Why a field may change the numbers, where more can be said than that it is unknown."""


def is_harmless(key: str, value: Any) -> bool:
  """Returns whether a field that nothing here reads cannot change the numbers.

  Names that begin with an underscore are private to the program that wrote them. `auto_map` may
  name code for everything but the model.
  """
  if key == "auto_map" and isinstance(value, dict):
    return not any(str(name).startswith("AutoModel") for name in value)
  return value is None or key.startswith("_") or key in HARMLESS
