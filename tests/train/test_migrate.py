"""`fastalign migrate` against the config classes of TRL 1.16: no field is dropped in silence, and the converted run is TRL's."""

from __future__ import annotations

import dataclasses
import json
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import preference_rows, save_tiny

from fastalign import cli
from fastalign.errors import ConfigError
from fastalign.train.config import load
from fastalign.train.migrate import Migration, migrate
from fastalign.train.migrate_rules import RULES
from fastalign.train.migrate_table import OLDER, SCRIPT, TRAINERS, fields_of
from fastalign.train.options import options

trl = pytest.importorskip("trl", reason="TRL's config classes are the oracle; without them the tables are unproven")

CLASSES = {
    "sft": ("trl", "SFTConfig"), "reward": ("trl", "RewardConfig"), "dpo": ("trl", "DPOConfig"), "kto": ("trl", "KTOConfig"),
    "grpo": ("trl", "GRPOConfig"), "rloo": ("trl", "RLOOConfig"), "orpo": ("trl.experimental.orpo", "ORPOConfig"),
    "cpo": ("trl.experimental.cpo", "CPOConfig"), "gkd": ("trl.experimental.gkd", "GKDConfig"),
    "online_dpo": ("trl.experimental.online_dpo", "OnlineDPOConfig"),
}  # fmt: skip
# Fields that change nothing unless another one is set, too; the other one is what the test sets with them.
WITH = {
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"}, "discopop_tau": {"loss_type": ["discopop"]},
    "ref_model_mixup_alpha": {"sync_ref_model": True}, "use_bias_correction_kl": {"beta": 0.1}, "simpo_gamma": {"loss_type": "simpo"},
    "warmup_steps": {"max_steps": 100},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "lr_scheduler_type": "cosine", "eval_strategy": "steps", "save_strategy": "no", "logging_strategy": "epoch", "optim": "sgd",
    "train_sampling_strategy": "group_by_length", "truncation_mode": "keep_end", "f_divergence_type": "forward_kl", "beta": 0.25,
    "importance_sampling_level": "sequence", "scale_rewards": "batch", "report_to": "wandb", "model_init_kwargs": {"revision": "x"},
    "datasets": [{"path": "other"}], "lora_target_modules": ["q_proj"], "reward_funcs": ["my.reward"], "reward_model_path": "rm",
    "reward_model_name_or_path": "rm", "lora_modules_to_save": ["lm_head"], "reward_weights": [1.0], "completion_only_loss": True,
    "activation_checkpointing_kwargs": {"every_n_layers": 2}, "gradient_checkpointing_kwargs": {"every_n_layers": 2}, "env": {"A": "1"},
    "packing_strategy": "other", "dtype": "bfloat16", "test_split_size": 0.1, "missing_eos_penalty": 1.0, "loss_weights": [2.0],
    "bf16": False,
    "generation_batch_size": 16, "steps_per_generation": 2, "max_steps": 7, "chat_template_path": "other.jinja", "min_p": 0.1,
    "rpo_alpha": 0.5, "warmup_ratio": 0.1, "evaluation_strategy": "steps", "torch_dtype": "float16", "center_rewards_coefficient": 0.01,
    "off_policy_mask_threshold": 0.5, "lora_alpha": 64, "use_rslora": True, "ld_alpha": 0.5, "epsilon_high": 0.3, "delta": 2.0,
    "max_seq_length": 77, "warmup_steps": 10, "gradient_checkpointing": False, "activation_checkpointing": False,
    "teacher_model_name_or_path": "teacher", "bnb_4bit_quant_type": "fp4", "eval_steps": 5, "save_total_limit": 3,
    "dataset_name": "rows.jsonl", "dataset_config": "sub",
}  # fmt: skip
LOSSES = {"sft": "dft", "dpo": ["ipo"], "kto": "apo_zero_unpaired", "cpo": "hinge", "grpo": "grpo", "online_dpo": "ipo", "gkd": "dft"}


def trl_class(trainer: str) -> Any:
    module, name = CLASSES[trainer]
    return getattr(import_module(module), name)


def our_class(trainer: str) -> Any:
    module, name = cli.ALGORITHMS[trainer]
    return getattr(import_module(module), name)


def converted(trainer: str, folder: Path, given: dict[str, Any]) -> Migration:
    file = folder / "args.json"
    file.write_text(json.dumps(given))
    return migrate(trainer, file, our_class(trainer))


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_table_has_every_field_of_trl_with_its_default_and_no_other(trainer: str) -> None:
    fields = {field.name: default_of(field) for field in dataclasses.fields(trl_class(trainer)) if field.init}
    rules = fields_of(trainer)
    assert not set(fields) - set(rules), "fields of TRL without a rule"
    assert not set(rules) - set(fields) - set(SCRIPT) - set(OLDER) - {"reward_funcs", "reward_model_name_or_path"}
    taken = {"output_dir": "trainer_output", "logging_steps": fields["logging_steps"]}
    for name, default in fields.items():
        assert rules[name].default == taken.get(name, default), name
    for name, rule in rules.items():
        assert sum(map(bool, (rule.option, rule.same, rule.lost, rule.rule))) == 1, name
        assert not rule.rule or rule.rule in RULES, name
        assert not rule.option or rule.option in options(our_class(trainer)) or name in OLDER, name
    for name in OLDER:
        assert name not in fields, f"{name} is not of an older version only"


def test_the_script_fields_are_those_of_trl() -> None:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
    from trl.scripts.grpo import GRPOScriptArguments

    found = {f.name: default_of(f) for kind in (ScriptArguments, DatasetMixtureConfig, ModelConfig) for f in dataclasses.fields(kind)}
    assert not set(found) - set(SCRIPT) - {"trust_remote_code"}
    assert not set(SCRIPT) - set(found) - {"env"}
    assert all(SCRIPT[name].default == value for name, value in found.items() if name in SCRIPT)
    mine = {field.name for field in dataclasses.fields(GRPOScriptArguments)} - {field.name for field in dataclasses.fields(ScriptArguments)}
    assert mine <= set(fields_of("grpo"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_field_can_change_without_a_word(trainer: str, tmp_path: Path) -> None:
    """Another value of any one field changes an option, or is spoken of by its name."""
    for name, rule in fields_of(trainer).items():
        others = {**WITH.get(name, {}), **({"use_peft": True} if name.startswith(("lora_", "use_rs", "use_do")) else {})}
        value = LOSSES.get(trainer) if name == "loss_type" else OTHER.get(name, _another(rule.default))
        before, after = converted(trainer, tmp_path, others), converted(trainer, tmp_path, {**others, name: value})
        said = [line for line in (*after.lost, *after.same) if line.startswith(name) and line not in (*before.lost, *before.same)]
        assert said or after.options != before.options or after.notes != before.notes, f"{name}: {value!r} is dropped in silence"
        if rule.lost:
            assert said and rule.lost in said[0], name
        if rule.option:
            assert after.options[rule.option] == value, name


def test_moments_in_8_bits_are_carried_over(tmp_path: Path) -> None:
    assert converted("dpo", tmp_path, {"optim": "paged_adamw_8bit"}).options["optimizer"] == "adamw_8bit"


def _another(default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2 if default else 0.25
    if isinstance(default, int):
        return default + 1
    return "other" if isinstance(default, str) else {"some": 1} if default is None else ["other"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_dump_of_the_defaults_is_carried_over_whole(trainer: str, tmp_path: Path) -> None:
    """to_dict() of a config that was built: what __post_init__ made of the defaults is no change."""
    needed = {"reward_model_path": "rm"} if trainer == "online_dpo" else {}
    arguments = trl_class(trainer)(output_dir=str(tmp_path), use_cpu=True, bf16=False, **needed)
    found = converted(trainer, tmp_path, arguments.to_dict())
    assert found.lost == []
    assert {line.split(":")[0] for line in found.same} <= {"disable_tqdm", "dataloader_pin_memory"}
    written = tmp_path / "run.yaml"
    written.write_text(found.yaml("run.yaml"))
    config = load(written, our_class(trainer))
    assert (config.seed, config.model.dtype, config.model.device, config.log_every) == (42, "float32", "cpu", 10)
    assert config.learning_rate == arguments.learning_rate
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert config.batch_size == (batch // arguments.num_generations if trainer in ("grpo", "rloo") else batch)
    assert any(line == "seed: 42 (ours: 0)" for line in found.differing)
    for line in found.differing:
        option, value = line.split(": ")[0], line.split(" (ours")[0].split(": ", 1)[1]
        assert value != line.split("(ours: ")[1].rstrip(")"), line
        assert option in found.options


def test_yaml_as_trl_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text(
        "model_name_or_path: my-model\nlearning_rate: 5e-7\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 8\n"
        "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.2]\nmax_length: 4096\nuse_peft: true\nlora_r: 8\nuse_rslora: true\n"
        "lr_scheduler_type: constant_with_warmup\nwarmup_steps: 15\nmax_steps: 200\nlabel_smoothing: 0.1\npush_to_hub: true\n"
        "eval_strategy: steps\neval_steps: 50\nlerning_rate: 1\n"
    )
    found = migrate("dpo", file, our_class("dpo"))
    wanted = {
        "model.path": "my-model", "learning_rate": 5e-7, "batch_size": 16, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2],
        "data.max_length": 4096, "max_tokens": 8192, "lora.r": 8, "lora.alpha": 32, "lora.rslora": True, "lr_schedule": "constant",
        "warmup_ratio": 0.075, "max_steps": 200, "eval_every": 50, "data.eval_split": "test", "model.dtype": "bfloat16",
    }  # fmt: skip
    assert {name: found.options.get(name) for name in wanted} == wanted
    assert "label_smoothing" not in found.options
    said = " ".join(found.lost)
    assert "label_smoothing: 0.1 (TRL does not read it for this loss; here sigmoid with --label_smoothing is cDPO)" in said
    assert "push_to_hub: true (nothing is uploaded by a run" in said
    assert "lerning_rate: 1 (no field of TRL 1.16's config; did you mean learning_rate?)" in said


@pytest.mark.parametrize(
    ("trainer", "given", "wanted"),
    [
        ("grpo", {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_generations": 4, "steps_per_generation": 6},
         {"batch_size": 8, "steps_per_generation": 3, "data.max_length": None, "max_completion_length": 512}),
        ("grpo", {"loss_type": "cispo", "epsilon": 0.3}, {"loss_type": "cispo", "epsilon_high": 0.3}),
        ("grpo", {"loss_type": "sapo", "sapo_temperature_pos": 2.0}, {"loss_options": {"temperature_pos": 2.0, "temperature_neg": 1.05}}),
        ("grpo", {"scale_rewards": False, "reward_funcs": ["accuracy_reward", "my.own.reward", "get_soft_overlong_punishment"]},
         {"scale_rewards": "none", "rewards": ["trl.rewards:accuracy_reward", "my.own:reward", "soft_overlong:1280:256"]}),
        ("cpo", {"loss_type": "simpo", "alpha": 0.25, "simpo_gamma": 0.7}, {"loss_type": "alphapo", "alpha": 0.25, "simpo_gamma": 0.7}),
        ("orpo", {}, {"nll_scope": "all"}),
        ("gkd", {"beta": 1}, {"divergence": "reverse_kl", "sampling_temperature": 0.9, "max_completion_length": 128}),
        ("sft", {"dataset_text_field": "body", "bf16": False}, {"data.columns": {"text": "body"}, "model.dtype": "float32"}),
        ("sft", {"datasets": [{"path": "a/b", "name": "c", "split": "d"}]}, {"data.path": "a/b", "data.subset": "c", "data.split": "d"}),
        ("dpo", {"max_grad_norm": 0, "save_strategy": "no", "save_total_limit": 5},
         {"max_grad_norm": None, "save_every": 0, "keep_checkpoints": 5}),
    ],
)  # fmt: skip
def test_fields_that_belong_together(trainer: str, given: Any, wanted: Any, tmp_path: Path) -> None:
    found = converted(trainer, tmp_path, given)
    assert {name: found.options.get(name, "not there") for name in wanted} == wanted
    assert not [line for line in found.lost if "until this is mended" in line]


@pytest.mark.parametrize(
    ("trainer", "given", "words"),
    [
        ("grpo", {"per_device_train_batch_size": 12}, "12 x 1 answers a step (8 answers to a prompt do not divide them"),
        ("dpo", {"warmup_steps": 100}, "warmup_steps: 100 (steps of how many is not known: set --warmup_ratio"),
        ("dpo", {"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: polynomial (there are linear, cosine and constant"),
        ("dpo", {"save_strategy": "epoch"}, "save_strategy: epoch (set --save_every"),
        ("dpo", {"report_to": ["mlflow", "wandb"]}, "report_to: mlflow (there are tensorboard, wandb and trackio"),
        ("dpo", {"loss_type": ["exo_pair"]}, "until this is mended: label_smoothing must be more than 0 with exo_pair"),
        ("dpo", {"loss_type": ["new_one"]}, "loss_type: new_one (there are sigmoid"),
        ("sft", {"datasets": [{"path": "a"}, {"path": "b"}]}, "datasets: b (a run reads one data set"),
        ("grpo", {"use_vllm": True}, "use_vllm: true (of vLLM inside of TRL's process; here a plain vLLM server answers"),
    ],
)
def test_what_cannot_be_carried_over_is_said(trainer: str, given: Any, words: str, tmp_path: Path) -> None:
    assert any(words in line for line in converted(trainer, tmp_path, given).lost)


def test_files_that_are_no_config_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "pickled.yaml").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "zip.json").write_bytes(b"PK\3\4rest")
    for name in ("training_args.bin", "pickled.yaml", "zip.json"):
        with pytest.raises(ConfigError, match=r"a pickle, which would run code of its own to be read.*json.dump"):
            migrate("dpo", tmp_path / name, our_class("dpo"))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object with the fields of a config, got list"):
        migrate("dpo", tmp_path / "list.json", our_class("dpo"))
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ConfigError, match=r"torn.json: not valid JSON"):
        migrate("dpo", tmp_path / "torn.json", our_class("dpo"))
    for line, words in (
        ("migrate ppo x", "got 'ppo'; TRL 1.16 has no PPO any more"),
        ("migrate dpoo x", "did you mean dpo?"),
        ("migrate dpo", "migrate needs a file"),
        ("migrate dpo nowhere.yaml", "nowhere.yaml: cannot read the config file"),
    ):
        assert cli.main(line.split()) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["dpo", "sft"])
def test_a_run_of_the_converted_config_takes_trls_step(trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step of the very command that is printed, and of TRL's trainer with the config that was converted: the same loss and gradient."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    save_tiny(tmp_path / "model", "qwen3")
    rows = preference_rows(6)
    if trainer == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.4} if trainer == "dpo" else {"loss_type": "dft"}
    arguments = trl_class(trainer)(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=6, gradient_accumulation_steps=1, max_steps=2, learning_rate=1e-3,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, adam_epsilon=1e-6, **loss,
    )  # fmt: skip
    args = tmp_path / "args.yaml"
    args.write_text(yaml.safe_dump(json.loads(arguments.to_json_string())))
    assert cli.main(["migrate", trainer, str(args)]) == 0
    assert "not carried over" not in capsys.readouterr().out
    files = ["--model.path", str(tmp_path / "model"), "--data.path", str(tmp_path / "rows.jsonl")]
    assert cli.main([trainer, "--config", str(tmp_path / "args.fastalign.yaml"), *files]) == 0
    ours = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    kind = trl.DPOTrainer if trainer == "dpo" else trl.SFTTrainer
    teacher = kind(
        model=str(tmp_path / "model"), args=arguments, processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        train_dataset=load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")),
    )  # fmt: skip
    teacher.train()
    theirs = [row for row in teacher.state.log_history if "loss" in row]
    assert len(theirs) == 2
    for mine, other in zip(ours, theirs):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3) and mine["grad_norm"] > 0
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"])
    with pytest.raises(AssertionError):
        assert ours[0]["loss"] == pytest.approx(ours[1]["loss"], rel=1e-3)  # the tolerance tells one step from the next
    assert cli.main(["migrate", trainer, str(args)]) == 2
    assert "is there already; set --overwrite" in capsys.readouterr().err
