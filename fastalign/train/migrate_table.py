"""What becomes of every field of a TRL 1.16 config: table by table, with TRL's default.

`to`: an option of ours has the same value; `same`: it makes no difference here, and why; `lost`: it is not carried over, and why, or what
to do; `by`: a rule of `migrate_rules` reads it, with others. Later tables override earlier ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rule(NamedTuple):
    """One field: exactly one of the last four is not empty."""

    default: Any
    option: str = ""
    same: str = ""
    lost: str = ""
    rule: str = ""
    dumped: tuple[Any, ...] = ()  # what a dump may have in place of the default


def to(default: Any, option: str) -> Rule:
    return Rule(default, option=option)


def same(default: Any, why: str, *dumped: Any) -> Rule:
    return Rule(default, same=why, dumped=dumped)


def lost(default: Any, why: str, *dumped: Any) -> Rule:
    return Rule(default, lost=why, dumped=dumped)


def by(default: Any, rule: str, *dumped: Any) -> Rule:
    return Rule(default, rule=rule, dumped=dumped)


def all_of(rules: dict[str, Any], kind: Any, why: str) -> dict[str, Rule]:
    """Several fields with one reason."""
    return {name: kind(default, why) for name, default in rules.items()}


_HUB = "nothing is uploaded by a run; huggingface-cli upload NAME RUN/final does it"
_DEVICES = "it configures several devices, which is up to the launcher here"
_LOADER = "samples are tokenized once and packed in memory; there is no loader to configure"
_LOGS = "of what is printed, not of what is computed"
_VLLM = "of vLLM inside of TRL's process; here a plain vLLM server answers: --engine vllm_server --vllm.url http://HOST:PORT/v1 (LoRA only)"
_BEST = "no checkpoint is chosen by its metrics; evaluate them with fastalign eval"

TRAINING: dict[str, Rule] = {
    "output_dir": to("trainer_output", "output"),
    "learning_rate": to(5e-5, "learning_rate"),
    "weight_decay": to(0.0, "weight_decay"),
    "adam_beta1": to(0.9, "adam_beta1"),
    "adam_beta2": to(0.999, "adam_beta2"),
    "adam_epsilon": to(1e-8, "adam_epsilon"),
    "seed": to(42, "seed"),
    "per_device_train_batch_size": by(8, "batch"),
    "gradient_accumulation_steps": by(1, "batch"),
    "num_train_epochs": by(3.0, "duration"),
    "max_steps": by(-1, "duration"),
    "lr_scheduler_type": by("linear", "schedule"),
    "warmup_steps": by(0, "schedule"),
    "lr_scheduler_kwargs": lost(None, "the schedules here have no parameters", {}),
    "optim": by("adamw_torch_fused", "optimizer"),
    "optim_args": lost(None, "AdamW takes adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "optim_target_modules": lost(None, "AdamW trains all weights, or those of an adapter (lora.targets)"),
    "max_grad_norm": by(1.0, "clipping"),
    "average_tokens_across_devices": same(True, "means are always over the tokens of the whole step"),
    "label_smoothing_factor": same(0.0, "this trainer's loss does not read it"),
    "bf16": by(None, "precision"),
    "fp16": by(False, "precision"),
    "tf32": lost(None, "set torch.backends.cuda.matmul.allow_tf32 yourself; log-probs are computed in float32"),
    "use_cpu": by(False, "precision"),
    **all_of({"bf16_full_eval": False, "fp16_full_eval": False}, same, "held-out data are evaluated in the precision of training"),
    "activation_checkpointing": by(None, "checkpointing", False, True),
    "activation_checkpointing_kwargs": by(None, "checkpointing"),
    "gradient_checkpointing": by(None, "checkpointing"),
    "gradient_checkpointing_kwargs": by(None, "checkpointing"),
    **all_of({"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}, same, "nothing is compiled"),
    **all_of({"use_liger_kernel": False, "liger_kernel_config": None}, same, "the head is always fused with the loss"),
    "use_cache": same(False, "training keeps no cache of keys and values"),
    "neftune_noise_alpha": lost(None, "no noise is added to embeddings"),
    "torch_empty_cache_steps": same(None, "the cache is emptied where memory runs out"),
    "auto_find_batch_size": same(False, "a step that does not fit is repeated in smaller micro-batches, with the same result"),
    "logging_strategy": by("steps", "logging"),
    "logging_steps": by(10, "logging"),
    "logging_first_step": lost(False, "set --log_every 1 to see the first step"),
    "logging_nan_inf_filter": same(True, "steps that are not finite are skipped, counted and named"),
    "include_num_input_tokens_seen": same("no", "num_tokens is always logged"),
    **all_of(
        {"log_on_each_node": True, "log_level": "passive", "log_level_replica": "warning", "disable_tqdm": None}, same, _LOGS
    ),
    "report_to": by("none", "loggers", [], ["none"]),
    "run_name": lost(None, "a run is named by its folder, --output"),
    **all_of(
        {"project": "huggingface", "trackio_space_id": None, "trackio_bucket_id": None, "trackio_static_space_id": None},
        lost, "the loggers take their projects from their own environment variables",
    ),
    "eval_strategy": by("no", "evaluation"),
    "eval_steps": by(None, "evaluation"),
    "eval_delay": lost(0, "evaluations begin with step --eval_every"),
    "eval_on_start": lost(False, "evaluate the model before training by fastalign eval --model.path MODEL"),
    "include_for_metrics": lost([], "metrics are those of the objective"),
    **all_of(
        {
            "per_device_eval_batch_size": 8, "prediction_loss_only": False, "eval_do_concat_batches": True, "batch_eval_metrics": False,
            "eval_use_gather_object": False, "eval_accumulation_steps": None,
        },
        same, "evaluation packs by max_tokens, and keeps sums, not predictions",
    ),
    "save_strategy": by("steps", "saving"),
    "save_steps": by(500, "saving"),
    "save_total_limit": by(None, "saving"),
    "save_only_model": lost(False, "checkpoints are whole, so that a run resumes exactly; final/ holds the model alone"),
    **all_of({"save_on_each_node": False, "enable_jit_checkpoint": False}, same, "a stopped run always leaves a checkpoint, in one place"),
    "push_to_hub": lost(False, _HUB),
    "hub_token": lost(None, _HUB, "<HUB_TOKEN>"),
    **all_of(
        {
            "hub_private_repo": None, "hub_model_id": None, "hub_strategy": "every_save", "hub_always_push": False, "hub_revision": None,
        },
        lost, _HUB,
    ),
    **all_of({"load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None}, lost, _BEST),
    "ignore_data_skip": lost(False, "a resumed run always goes on where it stopped"),
    "restore_callback_states_from_checkpoint": same(False, "there are no callbacks on the command line"),
    "full_determinism": same(False, "a rerun gives the same bits anyway"),
    "data_seed": lost(None, "the order of the data follows --seed"),
    "accelerator_config": lost(None, _DEVICES, {
        "dispatch_batches": None, "even_batches": True, "gradient_accumulation_kwargs": None, "non_blocking": False,
        "split_batches": False, "use_seedable_sampler": True,
    }),
    "parallelism_config": lost(None, _DEVICES),
    "fsdp": lost(None, _DEVICES, [], "", False),
    "fsdp_config": lost(None, _DEVICES, {}),
    "deepspeed": lost(None, _DEVICES),
    **all_of(
        {
            "ddp_find_unused_parameters": None, "ddp_bucket_cap_mb": None, "ddp_broadcast_buffers": None, "ddp_static_graph": None,
            "ddp_backend": None, "ddp_timeout": 1800, "local_rank": -1,
        },
        same, _DEVICES,
    ),
    "dataloader_drop_last": lost(False, "the last step of an epoch takes what is left"),
    **all_of(
        {
            "dataloader_num_workers": 0, "dataloader_pin_memory": True, "dataloader_persistent_workers": False,
            "dataloader_prefetch_factor": None, "dataloader_multiprocessing_context": None, "dataloader_in_order": True,
            "remove_unused_columns": True, "label_names": None, "length_column_name": "length",
        },
        same, _LOADER,
    ),
    "train_sampling_strategy": lost("random", "every epoch is a permutation of its own, drawn from the seed"),
    "debug": lost("", "use --debug, or --profile 3", []),
    "skip_memory_metrics": same(True, "memory is always measured (mem/*)"),
    **all_of({"do_train": False, "do_eval": False, "do_predict": False}, same, "the command says what is done"),
    "resume_from_checkpoint": lost(None, "a checkpoint of TRL's is no checkpoint of ours; start from its model with --model.path"),
}  # fmt: skip

# Of every trainer of TRL, beside Transformers' own.
COMMON: dict[str, Rule] = {
    "gradient_checkpointing": by(True, "checkpointing"),
    "model_init_kwargs": by(None, "model_options"),
    "trust_remote_code": to(False, "model.trust_remote_code"),
    "dataset_num_proc": same(None, "tokenizing takes one process"),
    "pad_to_multiple_of": same("auto", "nothing is padded", None),
    "router_aux_loss_coef": lost(None, "the auxiliary loss of experts is weighted by router_aux_loss_coef of the model's config.json"),
    "activation_offloading": lost(
        False, "set model.gradient_checkpointing and model.checkpoint_offload: the inputs of the layers wait in host memory"
    ),
    "disable_dropout": by(True, "dropout"),
}

# What the scripts behind `trl dpo` and its like read from the same file.
SCRIPT: dict[str, Rule] = {
    "dataset_name": by(None, "data"),
    "dataset_config": by(None, "data"),
    "dataset_train_split": by("train", "data"),
    "dataset_test_split": by("test", "evaluation"),
    "dataset_streaming": lost(False, "data are read whole; what does not fit in memory has to be cut first"),
    "streaming": lost(False, "data are read whole; what does not fit in memory has to be cut first"),
    "datasets": by([], "data"),
    "test_split_size": by(None, "evaluation"),
    "ignore_bias_buffers": same(False, "a workaround for several devices"),
    "env": lost(None, "set environment variables in the shell"),
    "model_name_or_path": to(None, "model.path"),
    "model_revision": lost("main", "download that revision, and name its folder with --model.path"),
    "dtype": by("float32", "precision"),
    "attn_implementation": same(None, "packed attention is chosen by what is installed, with the same result"),
    "use_peft": by(False, "adapter"),
    **{
        name: by(default, "adapter")
        for name, default in {
            "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": None, "lora_modules_to_save": None,
            "lora_target_parameters": None, "use_rslora": False, "use_dora": False,
        }.items()
    },
    "lora_task_type": same("CAUSAL_LM", "it follows from the command"),
    "load_in_8bit": lost(False, "there are 4-bit weights: --model.quantization nf4"),
    "load_in_4bit": by(False, "quantization"),
    "bnb_4bit_quant_type": by("nf4", "quantization"),
    "use_bnb_nested_quant": by(False, "quantization"),
    "bnb_4bit_quant_storage": by(None, "quantization"),
}  # fmt: skip

_SFT: dict[str, Rule] = {
    "learning_rate": to(2e-5, "learning_rate"),
    "label_smoothing_factor": to(0.0, "label_smoothing"),
    "max_length": to(1024, "data.max_length"),
    "truncation_mode": to("keep_start", "data.truncation"),
    "completion_only_loss": to(None, "data.completion_only"),
    "assistant_only_loss": to(False, "data.assistant_only"),
    "loss_type": to("nll", "loss_type"),
    "dataset_text_field": by("text", "text_column"),
    "chat_template_path": by(None, "chat_template"),
    "dataset_kwargs": lost(None, "rows are always prepared; drop skip_prepare_dataset"),
    "eos_token": lost(None, "set eos_token in the tokenizer's own files", "<EOS_TOKEN>"),
    "pad_token": same(None, "nothing is padded", "<PAD_TOKEN>"),
    "shuffle_dataset": same(False, "every epoch is shuffled"),
    "packing": lost(False, "always so, but batch_size counts texts where TRL counts packed rows: raise batch_size accordingly"),
    "packing_strategy": same("bfd", "texts are packed whole; attention never crosses from one to another", "bfd_split", "wrapped"),
    **all_of({"padding_free": False, "eval_packing": None}, same, "samples are always packed, without padding"),
}  # fmt: skip

_PREFERENCE: dict[str, Rule] = {
    "learning_rate": to(1e-6, "learning_rate"),
    "beta": to(0.1, "beta"),
    "max_length": to(1024, "data.max_length"),
}
_REFERENCE: dict[str, Rule] = {
    "precompute_ref_log_probs": by(False, "reference"),
    "precompute_ref_batch_size": same(None, "the reference packs by max_tokens"),
}
_OLD_PREFERENCE: dict[str, Rule] = {  # of the experimental ORPO and CPO
    "max_completion_length": lost(None, "data.max_length bounds prompt and answer together"),
    "generate_during_eval": lost(False, "fastalign eval --judge.* compares answers"),
    "is_encoder_decoder": lost(None, "decoders are trained here"),
}

_SAMPLING: dict[str, Rule] = {
    "top_p": to(1.0, "top_p"),
    "top_k": to(0, "top_k"),
    "min_p": by(None, "sampling"),
    "repetition_penalty": lost(1.0, "answers are drawn from the model as it is; repetition is a reward: --rewards '[repetition]'"),
    "generation_kwargs": lost(None, "temperature, top_k, top_p and min_p are what sampling has", {}),
    "cache_implementation": same(None, "the cache fits itself to the answers"),
    "ds3_gather_for_generation": same(True, "of DeepSpeed"),
    "use_vllm": lost(False, _VLLM),
    **all_of(
        {
            "vllm_mode": "colocate", "vllm_model_impl": "vllm", "vllm_enable_sleep_mode": False, "vllm_structured_outputs_regex": None,
            "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000, "vllm_server_timeout": 240.0,
            "vllm_group_port": 51216, "vllm_gpu_memory_utilization": 0.3, "vllm_tensor_parallel_size": 1,
        },
        lost, _VLLM,
    ),
}  # fmt: skip

_ONLINE: dict[str, Rule] = {
    **_SAMPLING,
    "learning_rate": to(1e-6, "learning_rate"),
    "remove_unused_columns": same(False, _LOADER),
    "disable_dropout": by(False, "dropout"),
    "num_generations": to(8, "num_generations"),
    "num_generations_eval": lost(None, "held-out prompts get num_generations answers"),
    "max_completion_length": to(512, "max_completion_length"),
    "temperature": to(1.0, "temperature"),
    "generation_batch_size": by(None, "batch", 8),
    "steps_per_generation": by(None, "batch", 1),
    "num_iterations": to(1, "num_iterations"),
    "mask_truncated_completions": to(False, "mask_truncated_completions"),
    "reward_weights": to(None, "reward_weights"),
    "shuffle_dataset": lost(True, "every epoch is shuffled"),
    "chat_template_kwargs": lost(None, "give the rows a column chat_template_kwargs"),
    "vllm_max_model_length": lost(None, _VLLM),
    "log_completions": same(False, "answers are kept in completions.jsonl, every --completions_every steps"),
    **all_of(
        {"log_multimodal": True, "num_completions_to_print": None, "log_unique_prompts": False},
        same, "of what is printed; see completions.jsonl",
    ),
    **all_of(
        {"use_transformers_continuous_batching": False, "transformers_continuous_batching_config": None, "use_transformers_paged": False},
        same, "answers are generated in batches of --generation_tokens",
    ),
    **all_of(
        {"sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512},
        lost, "the reference of online runs stays as it is",
    ),
    "reward_funcs": by(None, "rewards"),
    "reward_model_name_or_path": by(None, "rewards"),
}  # fmt: skip

_GRPO_LOSS = {
    "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": None, "delta": None, "beta": 0.0, "importance_sampling_level": "token",
    "use_bias_correction_kl": True, "scale_rewards": "group", "sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0, "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "off_policy_mask_threshold": None,
}  # fmt: skip

TRAINERS: dict[str, dict[str, Rule]] = {
    "sft": _SFT,
    "reward": {
        "learning_rate": to(1e-4, "learning_rate"),
        "max_length": to(1024, "data.max_length"),
        "center_rewards_coefficient": by(None, "centring"),
        "chat_template_path": by(None, "chat_template"),
        "eos_token": lost(None, "set eos_token in the tokenizer's own files", "<EOS_TOKEN>"),
        "pad_token": same(None, "nothing is padded", "<PAD_TOKEN>"),
    },
    "dpo": {
        **_PREFERENCE, **_REFERENCE,
        "truncation_mode": to("keep_start", "data.truncation"),
        "padding_free": same(False, "samples are always packed, without padding"),
        "pad_token": same(None, "nothing is padded", "<PAD_TOKEN>"),
        **{
            name: by(default, "dpo_loss")
            for name, default in {
                "loss_type": ["sigmoid"], "loss_weights": None, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
                "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05, "sync_ref_model": False, "ref_model_mixup_alpha": 0.6,
                "ref_model_sync_steps": 512,
            }.items()
        },
        "ld_alpha": to(None, "ld_alpha"),
        "use_weighting": to(False, "use_weighting"),
    },
    "kto": {
        **_PREFERENCE, **_REFERENCE,
        "loss_type": to("kto", "loss_type"),
        "desirable_weight": to(1.0, "desirable_weight"),
        "undesirable_weight": to(1.0, "undesirable_weight"),
        "train_sampling_strategy": lost("sequential", "every epoch is shuffled; answers are mismatched by their place in the data"),
        **all_of(
            {"sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512},
            lost, "the reference of KTO stays as it is",
        ),
    },
    "orpo": {**_PREFERENCE, **_OLD_PREFERENCE, "padding_value": same(None, "nothing is padded")},
    "cpo": {
        **_PREFERENCE, **_OLD_PREFERENCE,
        **{
            name: by(default, "cpo_loss")
            for name, default in {
                "loss_type": "sigmoid", "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0,
            }.items()
        },
    },
    "grpo": {
        **_ONLINE,
        **{name: by(default, "grpo_loss") for name, default in _GRPO_LOSS.items()},
        "top_entropy_quantile": to(1.0, "top_entropy_quantile"),
        "entropy_coef": to(0.0, "entropy_coef"),
        **all_of(
            {
                "use_adaptive_entropy": False, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0, "entropy_coef_delta": 0.005,
                "entropy_target": 0.2,
            },
            lost, "entropy_coef stays as it is",
        ),
        "multi_objective_aggregation": lost("sum_then_normalize", "rewards are added up, then compared"),
        "max_tool_calling_iterations": lost(None, "answers call no tools"),
        "cast_lm_head_to_fp32": same(False, "log-probs are float32 whatever the dtype of the model"),
        "log_completions_hub_repo": lost(None, _HUB),
        **all_of(
            {
                "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "sequence_mask",
                "vllm_importance_sampling_clip_max": 3.0, "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_cap": None,
            },
            lost, "it counts with vLLM; here it is importance_sampling_correction and its clip_max and clip_min",
        ),
    },
    "rloo": {
        **_ONLINE,
        "num_generations": to(2, "num_generations"),
        "beta": to(0.05, "beta"),
        "epsilon": to(0.2, "epsilon"),
        "epsilon_high": to(None, "epsilon_high"),
        "normalize_advantages": to(False, "normalize_advantages"),
        "reward_clip_range": lost(None, "clip inside of the reward function"),
    },
    "gkd": {
        **_SFT,
        "label_smoothing_factor": same(0.0, "the divergence does not read it"),
        "loss_type": same("nll", "the divergence does not read it"),
        "temperature": to(0.9, "sampling_temperature"),
        "lmbda": to(0.5, "lmbda"),
        "beta": by(0.5, "divergence"),
        "max_new_tokens": to(128, "max_completion_length"),
        "teacher_model_name_or_path": to(None, "teacher.path"),
        "teacher_model_init_kwargs": lost(None, "set --teacher.dtype"),
        "seq_kd": to(False, "seq_kd"),
    },
    "online_dpo": {
        **_SAMPLING,
        "learning_rate": to(5e-7, "learning_rate"),
        "remove_unused_columns": same(False, _LOADER),
        "beta": by([0.1], "single_beta"),
        "loss_type": to("sigmoid", "loss_type"),
        "max_new_tokens": to(64, "max_completion_length"),
        "max_length": lost(512, "data.max_length bounds the prompt, max_completion_length the answer"),
        "temperature": to(0.9, "temperature"),
        "missing_eos_penalty": to(None, "missing_eos_penalty"),
        "reward_model_path": by(None, "rewards"),
        "reward_weights": to(None, "reward_weights"),
        "vllm_gpu_memory_utilization": lost(0.55, _VLLM),
    },
}  # fmt: skip

# Names that older versions of Transformers and TRL had, whose files are still about.
OLDER: dict[str, Rule] = {
    "warmup_ratio": by(0.0, "schedule"),
    "evaluation_strategy": by(None, "evaluation"),
    "torch_dtype": by(None, "precision"),
    "overwrite_output_dir": lost(False, "set --overwrite on the command line"),
    "group_by_length": lost(False, "every epoch is a permutation of its own, drawn from the seed"),
    "logging_dir": same(None, "logs are in the run's folder"),
    "max_prompt_length": lost(None, "data.max_length bounds prompt and answer together (of online runs: the prompt)"),
    "max_seq_length": to(None, "data.max_length"),
    "use_liger_loss": same(False, "the head is always fused with the loss"),
    "rpo_alpha": to(None, "rpo_alpha"),
    "reference_free": to(False, "reference_free"),
    "no_cuda": by(False, "precision"),
    "save_safetensors": same(True, "everything is saved as safetensors"),
}
ONLY_FOR = {"rpo_alpha": ("dpo",), "reference_free": ("dpo",), "max_seq_length": ("sft", "gkd")}  # of `OLDER`
NOT_FOR: dict[str, tuple[str, ...]] = {  # of `COMMON`
    "disable_dropout": ("sft",),
    "router_aux_loss_coef": ("reward", "orpo", "cpo", "online_dpo"),
    "activation_offloading": ("orpo", "cpo", "grpo", "rloo", "online_dpo"),
    "pad_to_multiple_of": ("orpo", "cpo", "online_dpo"),
    "dataset_num_proc": ("grpo", "rloo", "online_dpo"),
}


def fields_of(trainer: str) -> dict[str, Rule]:
    """Every field that the config of a trainer may have, with its rule."""
    older = {name: rule for name, rule in OLDER.items() if trainer in ONLY_FOR.get(name, TRAINERS)}
    common = {name: rule for name, rule in COMMON.items() if trainer not in NOT_FOR.get(name, ())}
    return {**SCRIPT, **TRAINING, **common, **TRAINERS[trainer], **older}
