"""Fields of a TRL config that no single option of ours has the value of: one rule for those that belong together.

A rule reads the values of all fields, defaults filled in, and says what it made of them: an option, a field that makes no difference,
or one that is not carried over. A field is spoken of where its value is not TRL's default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastalign.losses.preference import PREFERENCE_LOSSES


class Outcome:
    """What a config becomes, so far."""

    def __init__(self, trainer: str, values: dict[str, Any], changed: set[str]) -> None:
        self.trainer, self.values, self.changed = trainer, values, changed
        self.options: dict[str, Any] = {}  # of ours, dotted
        self.sources: dict[str, tuple[str, ...]] = {}  # the fields that an option comes from
        self.lost: list[str] = []
        self.same: list[str] = []
        self.notes: list[str] = []

    def set(self, option: str, value: Any, *fields: str) -> None:
        self.options[option] = value
        self.sources[option] = fields

    def drop(self, where: list[str], why: str, *fields: str) -> None:
        """Say of those fields that are not at TRL's default why they are in `where`."""
        for field in fields:
            if field in self.changed:
                where.append(f"{field}: {text_of(self.values[field])} ({why})")


def text_of(value: Any) -> str:
    """As YAML has it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def batch(out: Outcome) -> None:
    v = out.values
    size, accumulated = int(v["per_device_train_batch_size"]), int(v["gradient_accumulation_steps"])
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if out.trainer not in ("grpo", "rloo"):
        out.set("batch_size", size * accumulated, *fields)
        return
    answers = int(v["num_generations"])
    prompts, rest = divmod(size * accumulated, answers)
    if rest or not prompts:
        out.lost.append(
            f"{' x '.join(fields)}: {size} x {accumulated} answers a step ({answers} answers to a prompt do not divide them; "
            f"batch_size counts prompts: {max(prompts, 1)} of them here)"
        )
    out.set("batch_size", max(prompts, 1), *fields, "num_generations")
    parts = v["steps_per_generation"]
    if parts is None:
        parts = v["generation_batch_size"] / size if v["generation_batch_size"] else accumulated
    steps, over = divmod(float(parts), accumulated)
    if over:
        out.lost.append(
            f"steps_per_generation: {parts:g} (micro-batches, of which a step takes {accumulated}; ours counts whole optimizer steps)"
        )
    out.set("steps_per_generation", max(1, int(steps)), "steps_per_generation", "generation_batch_size")


def duration(out: Outcome) -> None:
    out.set("epochs", float(out.values["num_train_epochs"]), "num_train_epochs")
    if int(out.values["max_steps"]) > 0:
        out.set("max_steps", int(out.values["max_steps"]), "max_steps")


def schedule(out: Outcome) -> None:
    v = out.values
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
    if v["lr_scheduler_type"] in names:
        out.set("lr_schedule", names[v["lr_scheduler_type"]], "lr_scheduler_type")
    else:
        out.drop(out.lost, "there are linear, cosine and constant, each with warm-up", "lr_scheduler_type")
    warmup = float(v["warmup_steps"] or v.get("warmup_ratio") or 0)
    if v["lr_scheduler_type"] == "constant":
        out.drop(out.same, "a constant rate has no warm-up in TRL either", "warmup_steps", "warmup_ratio")
        return
    if warmup >= 1:
        steps = int(v["max_steps"])
        if steps <= 0:
            out.drop(out.lost, "steps of how many is not known: set --warmup_ratio to their share, or max_steps", "warmup_steps")
            return
        warmup = math.floor(1e6 * min(warmup / steps, 1.0)) / 1e6  # rounded up to whole steps again
    if warmup:
        out.set("warmup_ratio", min(warmup, 0.999999), "warmup_steps", "warmup_ratio", "max_steps")


def optimizer(out: Outcome) -> None:
    if out.values["optim"] in ("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "paged_adamw_8bit"):
        out.set("optimizer", "adamw_8bit", "optim")
    elif out.values["optim"] not in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"):
        out.drop(out.lost, "AdamW trains here, by optimizer with moments in 8 bits or on the host", "optim")
    else:
        out.drop(out.same, "AdamW, in its fused form", "optim")


def clipping(out: Outcome) -> None:
    out.set("max_grad_norm", out.values["max_grad_norm"] or None, "max_grad_norm")


def precision(out: Outcome) -> None:
    v = out.values
    model_options = v["model_init_kwargs"] or {}
    dtype = str(v.get("torch_dtype") or model_options.get("dtype") or model_options.get("torch_dtype") or v["dtype"] or "auto")
    dtype = dtype.removeprefix("torch.")
    if v["fp16"]:
        out.drop(out.lost, "float16 has no loss scaling here; bfloat16 takes its place", "fp16")
    half = bool(v["fp16"]) or (v["bf16"] is None or bool(v["bf16"]))
    if half and dtype in ("float32", "auto"):
        out.notes.append(
            "bf16: TRL keeps float32 weights and computes in bfloat16; here the weights are bfloat16, with float32 copies that take the "
            "updates (master_weights). For float32 throughout set --model.dtype float32"
        )
    out.set("model.dtype", "bfloat16" if half else dtype, "bf16", "fp16", "dtype", "torch_dtype")
    if v["use_cpu"] or v.get("no_cuda"):
        out.set("model.device", "cpu", "use_cpu", "no_cuda")


def checkpointing(out: Outcome) -> None:
    v = out.values
    wanted = v["activation_checkpointing"] if v["activation_checkpointing"] is not None else v["gradient_checkpointing"]
    out.set("model.gradient_checkpointing", bool(wanted), "activation_checkpointing", "gradient_checkpointing")
    for field in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if set(v[field] or {}) - {"use_reentrant"}:
            out.drop(out.lost, "every layer is computed again", field)
        else:
            out.drop(out.same, "checkpointing is not reentrant", field)


def logging(out: Outcome) -> None:
    v = out.values
    every = float(v["logging_steps"])
    if v["logging_strategy"] == "steps" and every >= 1:
        out.set("log_every", int(every), "logging_steps", "logging_strategy")
    else:
        out.drop(out.lost, "metrics are written every log_every steps, a whole number", "logging_strategy", "logging_steps")


def loggers(out: Outcome) -> None:
    wanted = out.values["report_to"]
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or [])
    known = [name for name in wanted if name in ("tensorboard", "wandb", "trackio")]
    if other := [name for name in wanted if name not in (*known, "none")]:
        out.lost.append(f"report_to: {', '.join(other)} (there are tensorboard, wandb and trackio, beside metrics.jsonl)")
    if known:
        out.set("loggers", known, "report_to")


def evaluation(out: Outcome) -> None:
    v = out.values
    strategy = v.get("evaluation_strategy") or v["eval_strategy"]
    if strategy in ("no", False, None):
        out.drop(out.same, "nothing is evaluated", "eval_steps", "dataset_test_split")
    elif strategy == "steps":
        every = float(v["eval_steps"] or v["logging_steps"])
        if every >= 1:
            out.set("eval_every", int(every), "eval_steps", "logging_steps", "eval_strategy", "evaluation_strategy")
        else:
            out.drop(out.lost, "steps of how many is not known: set --eval_every", "eval_steps")
    else:
        out.drop(out.lost, "set --eval_every to the steps of an epoch; held-out data are evaluated at the end anyway",
                 "eval_strategy", "evaluation_strategy", "eval_steps")  # fmt: skip
    if v["test_split_size"]:
        if 0 < float(v["test_split_size"]) < 1:
            out.set("data.eval_fraction", float(v["test_split_size"]), "test_split_size")
        else:
            out.drop(out.lost, "set --data.eval_fraction to their share of the rows", "test_split_size")
    elif strategy not in ("no", False, None):
        out.set("data.eval_split", v["dataset_test_split"], "dataset_test_split")


def saving(out: Outcome) -> None:
    v = out.values
    if v["save_strategy"] == "no":
        out.set("save_every", 0, "save_strategy")
        out.drop(out.same, "nothing is saved before the end", "save_steps")
    elif v["save_strategy"] == "steps" and float(v["save_steps"]) >= 1:
        out.set("save_every", int(float(v["save_steps"])), "save_steps", "save_strategy")
    else:
        out.drop(out.lost, "set --save_every to a number of steps", "save_strategy", "save_steps")
    if v["save_total_limit"]:
        out.set("keep_checkpoints", int(v["save_total_limit"]), "save_total_limit")


def model_options(out: Outcome) -> None:
    given = out.values["model_init_kwargs"] or {}
    quantized = given.get("quantization_config") or {}
    if isinstance(quantized, dict) and quantized.get("load_in_4bit"):
        out.set("model.quantization", "nf4", "model_init_kwargs")
    elif quantized:
        out.lost.append("model_init_kwargs.quantization_config (there are 4-bit weights: --model.quantization nf4)")
    for name in sorted(set(given) - {"dtype", "torch_dtype", "quantization_config"}):
        known = {"attn_implementation": "packed attention is chosen by what is installed", "use_cache": "training keeps no cache"}
        where = out.same if name in known else out.lost
        why = known.get(name, "the model is loaded with model.dtype, model.device and model.trust_remote_code")
        where.append(f"model_init_kwargs.{name}: {text_of(given[name])} ({why})")


def dropout(out: Outcome) -> None:
    if not out.values["disable_dropout"]:
        out.notes.append(
            "disable_dropout: the model's own dropout is off here, as in TRL's preference trainers; --model.dropout true keeps it"
        )
    else:
        out.drop(out.same, "the model's own dropout is off", "disable_dropout")


def data(out: Outcome) -> None:
    v = out.values
    found = v["datasets"] or []
    if found and not v["dataset_name"]:
        first = found[0] if isinstance(found[0], dict) else {"path": found[0]}
        files = first.get("data_files")
        out.set("data.path", files if isinstance(files, str) else first.get("path"), "datasets")
        if first.get("name"):
            out.set("data.subset", first["name"], "datasets")
        out.set("data.split", first.get("split") or "train", "datasets")
        if others := [str(each.get("path") if isinstance(each, dict) else each) for each in found[1:]]:
            out.lost.append(f"datasets: {', '.join(others)} (a run reads one data set; put their rows into one file)")
        if more := sorted(set(first) - {"path", "name", "split", "data_files"}):
            out.lost.append(
                f"datasets: {', '.join(more)} of {first.get('path')} (a run reads whole rows, of which --data.columns names columns)"
            )
        out.drop(out.same, "datasets are named", "dataset_train_split", "dataset_config")
        return
    out.drop(out.lost, "dataset_name is named, too, and taken", "datasets")
    if v["dataset_name"]:
        out.set("data.path", v["dataset_name"], "dataset_name")
    out.set("data.split", v["dataset_train_split"], "dataset_train_split")
    if v["dataset_config"]:
        out.set("data.subset", v["dataset_config"], "dataset_config")


def adapter(out: Outcome) -> None:
    v = out.values
    fields = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    if not v["use_peft"]:
        out.drop(out.same, "use_peft is false", *fields, "lora_target_parameters", "use_rslora", "use_dora")
        return
    out.set("lora.r", int(v["lora_r"]), "lora_r", "use_peft")
    out.set("lora.alpha", float(v["lora_alpha"]), "lora_alpha")
    out.set("lora.rslora", bool(v["use_rslora"]), "use_rslora")
    out.set("lora.dora", bool(v["use_dora"]), "use_dora")
    out.set("lora.dropout", float(v["lora_dropout"]), "lora_dropout")
    targets = v["lora_target_modules"]
    if targets:
        one = targets[0] if isinstance(targets, list) and len(targets) == 1 else targets
        out.set("lora.targets", "all-linear" if one == "all-linear" else targets, "lora_target_modules")
    else:
        out.notes.append(
            "lora_target_modules: PEFT chooses by the architecture (often q_proj and v_proj); here all linear layers are adapted"
        )
    if v["lora_modules_to_save"]:
        out.set("lora.modules_to_save", v["lora_modules_to_save"], "lora_modules_to_save")
    out.drop(out.lost, "adapters are of whole linear layers", "lora_target_parameters")


def quantization(out: Outcome) -> None:
    v = out.values
    rest = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    if not v["load_in_4bit"]:
        out.drop(out.same, "load_in_4bit is false", *rest)
        return
    out.set("model.quantization", "nf4", "load_in_4bit")
    out.drop(out.lost, "4-bit weights are nf4 with the defaults of bitsandbytes", *rest)


def text_column(out: Outcome) -> None:
    if out.values["dataset_text_field"] != "text":
        out.set("data.columns", {"text": out.values["dataset_text_field"]}, "dataset_text_field")


def chat_template(out: Outcome) -> None:
    path = out.values["chat_template_path"]
    if path and str(path).endswith((".jinja", ".j2")):
        out.set("data.chat_template", path, "chat_template_path")
    else:
        out.drop(
            out.lost,
            "name a Jinja file with --data.chat_template; a tokenizer's folder has it as chat_template.jinja",
            "chat_template_path",
        )


def reference(out: Outcome) -> None:
    if out.values["precompute_ref_log_probs"]:
        out.set("reference", "cache", "precompute_ref_log_probs")


def dpo_loss(out: Outcome) -> None:
    v = out.values
    types = [v["loss_type"]] if isinstance(v["loss_type"], str) else list(v["loss_type"])
    if unknown := [name for name in types if name not in (*PREFERENCE_LOSSES, "sft")]:
        out.lost.append(f"loss_type: {', '.join(unknown)} (there are {', '.join(PREFERENCE_LOSSES)} and sft)")
        types = [name for name in types if name not in unknown]
    if types:
        out.set("loss_type", types[0] if len(types) == 1 else types, "loss_type")
    if v["loss_weights"] is not None:
        out.set("loss_weights", v["loss_weights"], "loss_weights")
    if set(types) & {"exo_pair", "robust", "aot", "aot_unpaired"}:
        out.set("label_smoothing", v["label_smoothing"], "label_smoothing")
    else:
        why = (
            "TRL does not read it for this loss; here sigmoid with --label_smoothing is cDPO"
            if "sigmoid" in types
            else "this loss has none"
        )
        out.drop(out.lost, why, "label_smoothing")
    out.set("f_divergence_type", getattr(v["f_divergence_type"], "value", v["f_divergence_type"]), "f_divergence_type")
    _only_if(out, v["f_divergence_type"] == "alpha_divergence", "of alpha_divergence", "f_alpha_divergence_coef")
    _only_if(out, "discopop" in types, "of discopop", "discopop_tau")
    out.set("sync_ref_model", bool(v["sync_ref_model"]), "sync_ref_model")
    _only_if(out, bool(v["sync_ref_model"]), "of sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")


def cpo_loss(out: Outcome) -> None:
    v = out.values
    shaped = v["loss_type"] == "simpo" and bool(v["alpha"])
    out.set("loss_type", "alphapo" if shaped else v["loss_type"], "loss_type", "alpha")
    _only_if(out, shaped, "of AlphaPO, loss_type simpo", "alpha")
    _only_if(out, v["loss_type"] == "simpo", "of simpo", "simpo_gamma")
    _only_if(out, v["loss_type"] in ("sigmoid", "simpo"), "of sigmoid and simpo", "label_smoothing")
    out.set("cpo_alpha", v["cpo_alpha"], "cpo_alpha")


def grpo_loss(out: Outcome) -> None:
    v = out.values
    kind, level = v["loss_type"], v["importance_sampling_level"]
    out.set("loss_type", kind, "loss_type")
    clips = kind not in ("cispo", "sapo", "vespo")
    _only_if(out, clips, "of losses that clip ratios", "epsilon", "delta")
    _only_if(out, clips or kind == "cispo", "of losses that bound ratios", "epsilon_high")
    if kind == "cispo" and v["epsilon_high"] is None:
        out.set("epsilon_high", v["epsilon"], "epsilon")
    if level != "token" or kind == "luspo":
        out.set("importance_sampling_level", level, "importance_sampling_level")
    out.set("beta", v["beta"], "beta")
    _only_if(out, float(v["beta"]) > 0, "of the KL penalty, beta above 0", "use_bias_correction_kl")
    scale = {True: "group", False: "none"}.get(v["scale_rewards"], v["scale_rewards"])
    out.set("scale_rewards", scale, "scale_rewards")
    _only_if(out, v["off_policy_mask_threshold"] is not None, "none", "off_policy_mask_threshold")
    names = {"sapo": {"temperature_pos": "sapo_temperature_pos", "temperature_neg": "sapo_temperature_neg"},
             "vespo": {name: f"vespo_{name}" for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}}  # fmt: skip
    for of, options in names.items():
        if kind != of:
            out.drop(out.same, f"of {of}", *options.values())
        elif any(field in out.changed for field in options.values()):
            out.set("loss_options", {ours: v[theirs] for ours, theirs in options.items()}, *options.values())


def sampling(out: Outcome) -> None:
    out.set("min_p", out.values["min_p"] or 0.0, "min_p")


def rewards(out: Outcome) -> None:
    v = out.values
    built_in = {"accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"}
    found = [name for field in ("reward_model_path", "reward_model_name_or_path") for name in _listed(v.get(field))]
    for name in _listed(v.get("reward_funcs")):
        if name in built_in:
            found.append(f"trl.rewards:{name}")
        elif name == "get_soft_overlong_punishment":
            found.append("soft_overlong:1280:256")
        else:
            module, _, function = name.rpartition(".")
            found.append(f"{module}:{function}" if module else name)
    if found:
        out.set("rewards", found, "reward_funcs", "reward_model_name_or_path", "reward_model_path")
    else:
        out.notes.append(
            "reward functions are code, which no config of TRL names: add --rewards FILE.py:FUNCTION; theirs have the signature of TRL's"
        )


def centring(out: Outcome) -> None:
    out.set("center_coef", out.values["center_rewards_coefficient"] or 0.0, "center_rewards_coefficient")


def divergence(out: Outcome) -> None:
    beta = float(out.values["beta"])
    if beta in (0.0, 1.0):
        out.set("divergence", "reverse_kl" if beta else "forward_kl", "beta")
    else:
        out.set("beta", beta, "beta")


def single_beta(out: Outcome) -> None:
    betas = _listed(out.values["beta"])
    out.set("beta", float(betas[0]), "beta")
    if len(betas) > 1:
        out.lost.append(f"beta: {betas} (one for all epochs: the first is taken)")


def _only_if(out: Outcome, counts: bool, why: str, *fields: str) -> None:
    """Options of the same name that change something only under a condition; ours refuse them otherwise."""
    for field in fields:
        if counts:
            out.set(field, out.values[field], field)
        else:
            out.drop(out.same, f"it counts only as an option {why}", field)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


RULES: dict[str, Callable[[Outcome], None]] = {
    rule.__name__: rule
    for rule in (
        batch, duration, schedule, optimizer, clipping, precision, checkpointing, logging, loggers, evaluation, saving, model_options,
        dropout, data, adapter, quantization, text_column, chat_template, reference, dpo_loss, cpo_loss, grpo_loss, sampling, rewards,
        centring,
        divergence, single_beta,
    )
}  # fmt: skip
