"""One training run of one side, in a process of its own: `python -m bench.training_sides SPEC.json` writes the spec's `result` file.

Both sides are called as a user would call them. What is timed:
    steps      from the end of one optimizer step to the end of the next, data loading and logging included
    reference  a pass over the data before training, where the side makes one
What is weighed: peak resident memory up to the end of the last step, less that when model and data had been loaded. For
TRL this is after the trainer's constructor, which also loads the reference model; for fastalign before the reference pass.
Tokens are those of the sequences (the prompt once per completion), padding not counted. An online algorithm is given its answers,
see bench.given, so that no side generates.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.given import AnswersFromRows, answer_from_rows, no_reward
from bench.machine import peak_rss_mib, reset_peak_rss, rss_mib
from bench.workload import Shape
from fastalign.errors import DeviceMemoryError

STARTED = time.perf_counter()


@dataclass(frozen=True)
class Task:
    """One algorithm on both sides."""

    title: str
    config: str  # of fastalign
    trl: tuple[str, str, str]  # module, trainer, config
    both: dict[str, Any]  # options that the two configs know by the same name
    ours: dict[str, Any] = field(default_factory=dict)  # further ones of fastalign's config
    theirs: dict[str, Any] = field(default_factory=dict)  # and of TRL's, to mean the same
    same: dict[str, Any] = field(default_factory=dict)  # of ours where both sides must agree to rounding
    check_rate: float = 1e-3  # learning rate of the steps that are compared: each should tell, and none so much that rounding does
    data: str = "DataConfig"  # of fastalign
    samples: int = 8  # rows of the data in an optimizer step
    step_of: str = "8 pairs"  # what an optimizer step consists of
    iterations: int = 1  # optimizer steps with the same rows
    steps: int = 20  # measured ones by default
    answers: int = 0  # to each prompt, of an online algorithm
    reference: bool = True  # a side may make a reference pass before training
    packing: bool = False  # a side may lay several rows end to end
    shapes: dict[str, Shape] = field(default_factory=lambda: {"": Shape()})

    @property
    def prompts_shared(self) -> bool:
        """Whether sequences that are trained on together have the same prompt."""
        return bool(self.answers) or self.data == "DataConfig"


ANSWERS = 8
TASKS = {
    "sft": Task(
        "SFT",
        "SFTConfig",
        ("trl", "SFTTrainer", "SFTConfig"),
        {},
        data="SupervisedDataConfig",
        step_of="8 completions",
        reference=False,
        packing=True,
    ),
    "dpo": Task(
        "DPO",
        "DPOConfig",
        ("trl", "DPOTrainer", "DPOConfig"),
        {"beta": 0.1},
        shapes={
            "": Shape(),
            "2:1": Shape(prompt_words=(64, 192), completion_words=(32, 96)),
            "2:1, mostly trunk": Shape(4096, 384, 6, prompt_words=(64, 192), completion_words=(32, 96)),
        },
    ),
    "kto": Task(
        "KTO",
        "KTOConfig",
        ("trl", "KTOTrainer", "KTOConfig"),
        {"beta": 0.1},
        theirs={"train_sampling_strategy": "sequential"},  # the only order that it takes
        same={"kl_scope": "microbatch", "reference": "copy"},
        check_rate=1e-4,
        data="UnpairedDataConfig",
        step_of="8 labelled answers",
    ),
    "orpo": Task(
        "ORPO",
        "ORPOConfig",
        ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig"),
        {"beta": 0.1},
        same={"nll_scope": "all"},
        reference=False,
    ),
    "simpo": Task(
        "SimPO",
        "SimPOConfig",
        ("trl.experimental.cpo", "CPOTrainer", "CPOConfig"),
        {"beta": 2.0},
        theirs={"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0},
        reference=False,
    ),
    "grpo": Task(
        "The update of GRPO",
        "GRPOConfig",
        ("trl", "GRPOTrainer", "GRPOConfig"),
        {"beta": 0.04, "num_generations": ANSWERS, "num_iterations": 2, "max_completion_length": 256},
        ours={"rewards": ["repetition"]},  # never called
        theirs={"gradient_accumulation_steps": 4},  # micro-batches of 8 answers, its default
        check_rate=1e-4,
        data="PromptDataConfig",
        samples=4,
        step_of=f"4 prompts with {ANSWERS} answers each",
        iterations=2,
        steps=6,
        answers=ANSWERS,
        reference=False,
        shapes={
            "1:1": Shape(prompt_words=(64, 192), completion_words=(64, 192)),
            "4:1": Shape(prompt_words=(192, 320), completion_words=(32, 96)),
            "4:1, mostly trunk": Shape(4096, 384, 6, prompt_words=(192, 320), completion_words=(32, 96)),
        },
    ),
}


@dataclass(frozen=True)
class Side:
    """A library, and how it is called."""

    name: str  # fastalign or trl
    options: dict[str, Any]  # beside those that both sides get
    text: str

    def joins(self, task: Task) -> bool:
        """Whether the options mean anything to the task."""
        means = {"precompute_ref_log_probs": task.reference, "packing": task.packing, "share_prompts": task.prompts_shared}
        return all(means.get(option, True) for option in self.options)

    def fitted(self, task: Task, shape: Shape) -> dict[str, Any]:
        """The options for data of `shape`: where rows are packed, a step is one packed row as long as those of a step are on average."""
        if "packing" not in self.options:
            return self.options
        return self.options | {
            "max_length": max(round(task.samples * shape.mean_tokens), shape.most_tokens),
            "per_device_train_batch_size": 1,
        }


SIDES = {
    "fastalign": Side("fastalign", {}, "fastalign, defaults"),
    "fastalign_unshared": Side("fastalign", {"share_prompts": False}, "fastalign, prompts not shared"),
    "trl_default": Side("trl", {}, "TRL, defaults (gradient checkpointing)"),
    "trl_no_checkpointing": Side("trl", {"gradient_checkpointing": False}, "TRL without gradient checkpointing"),
    "trl_fastest": Side(
        "trl",
        {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
        "TRL without gradient checkpointing, reference log-probs precomputed",
    ),
    "trl_packed": Side("trl", {"gradient_checkpointing": False, "packing": True}, "TRL without gradient checkpointing, packed"),
}


@dataclass(frozen=True)
class Spec:
    task: str  # of TASKS
    side: str  # fastalign or trl
    model: str
    data: str
    output: str
    result: str
    options: dict[str, Any] = field(default_factory=dict)  # of the side's own config
    lora_rank: int = 0
    adapter: str | None = None  # an existing adapter to train further
    epochs: int = 1
    learning_rate: float = 1e-4
    seed: int = 42
    samples: int | None = None  # rows of the data in an optimizer step, where not the task's
    uncut: bool = False  # sequences may be of any length
    stop_after: int | None = None  # optimizer steps of this process; it then leaves a checkpoint
    resume: bool = False  # from that checkpoint
    device: str = "cpu"
    patched: bool = False  # TRL with the head operator in place of its own scores
    cuda_growth: float | None = None  # MiB of CUDA memory that may be taken once model and data are loaded
    dtype: str = "float32"  # of the weights; bfloat16: TRL under autocast, as it is by default
    cuda_gib: float | None = None  # of CUDA memory that may be taken in all
    search: int | None = None  # longest sequence that a search tries (bench.gpu_search)
    vocabulary: int = 2048  # of the words of what it trains on
    leave_after: int | None = None  # optimizer steps after which nothing more is done: no checkpoint, no model is written


@dataclass
class Recording:
    """What a run leaves behind; times in seconds, memory in MiB."""

    losses: list[float] = field(default_factory=list)  # per optimizer step
    grad_norms: list[float] = field(default_factory=list)  # per optimizer step; TRL's only where its logging_steps is 1
    tokens: list[int] = field(default_factory=list)  # per optimizer step
    ends: list[float] = field(default_factory=list)  # clock at the end of each optimizer step
    reference_seconds: float = 0.0
    startup_seconds: float = 0.0  # from the first import to the first optimizer step, without the reference pass
    rss_before: float = 0.0
    rss_peak: float = 0.0
    out_of_memory: bool = False
    cuda_before: float = 0.0  # where a CUDA device is used; resident memory is not weighed then
    cuda_peak: float = 0.0
    fits: int = 0  # of a search: the longest sequence that fits
    too_long: int | None = None  # and the shortest seen that does not

    def loaded(self) -> None:
        """Model and data are in memory."""
        self.startup_seconds = time.perf_counter() - STARTED
        if torch.cuda.is_initialized():
            self.cuda_before = torch.cuda.memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            return
        self.rss_before = rss_mib()
        reset_peak_rss()

    def step_ended(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self.cuda_peak = torch.cuda.max_memory_allocated() / 2**20
        self.ends.append(time.perf_counter())
        if not torch.cuda.is_initialized():
            self.rss_peak = peak_rss_mib()


def run_fastalign(spec: Spec) -> Recording:
    import fastalign
    from fastalign.data import config as data
    from fastalign.models.config import LoraConfig, ModelConfig

    record, task = Recording(), TASKS[spec.task]
    config_class: Any = getattr(fastalign, task.config)
    generations: list[int] = []

    class TimedConfig(config_class):
        def objective(self, model: Any, data: Any, folder: Any) -> Any:
            record.loaded()
            limit_cuda(spec.cuda_growth)
            started = time.perf_counter()
            objective = super().objective(model, data, folder)
            record.reference_seconds = time.perf_counter() - started if task.reference else 0.0
            if task.answers:
                answer_from_rows(objective, generations)
                record.loaded()  # its reference model is in memory, too, as TRL's is
            return objective

    def on_step(_: int, metrics: dict[str, float]) -> None:
        record.step_ended()
        record.losses.append(metrics["loss"])
        record.grad_norms.append(metrics["grad_norm"])
        record.tokens.append(generations[-1] if task.answers else int(metrics["num_tokens"]) - sum(record.tokens))
        if len(record.ends) == spec.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(record.ends) == spec.leave_after:
            raise Enough

    options = dict(spec.options)
    checkpointing = options.pop("gradient_checkpointing", False)  # an option of the model
    config = TimedConfig(
        model=ModelConfig(path=spec.model, dtype=spec.dtype, device=spec.device, gradient_checkpointing=checkpointing),
        data=getattr(data, task.data)(path=spec.data, **({"max_length": None} if spec.uncut else {})),
        lora=LoraConfig(adapter=spec.adapter) if spec.adapter else LoraConfig(r=spec.lora_rank),
        output=spec.output,
        resume=spec.resume,
        batch_size=spec.samples or task.samples,
        epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        seed=spec.seed,
        save_every=0,
        **task.both,
        **task.ours,
        **options,
    )
    with suppress(Enough):
        fastalign.train(config, callbacks=[on_step])
    return record


class Enough(Exception):
    """All steps that are measured have been made."""


def run_trl(spec: Spec) -> Recording:
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    record, task = Recording(), TASKS[spec.task]
    trl: Any = import_module(task.trl[0])
    trainer_class, config_class = getattr(trl, task.trl[1]), getattr(trl, task.trl[2])

    online: Any = (AnswersFromRows,) if task.answers else ()
    losses: list[float] = []  # of the micro-batches of a step
    tokens: list[int] = []

    class TimedTrainer(*online, trainer_class):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            tokens.append(real_tokens(inputs))
            return loss

        def _precompute_ref_logps(self, *args: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            record.reference_seconds += time.perf_counter() - started
            return dataset

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            record.step_ended()
            record.losses.append(sum(losses))
            record.tokens.append(sum(tokens))
            losses.clear()
            tokens.clear()
            if len(record.ends) == spec.stop_after:
                control.should_save = control.should_training_stop = True

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "grad_norm" in logs:
                record.grad_norms.append(logs["grad_norm"])

    arguments = config_class(
        output_dir=spec.output,
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        seed=spec.seed,
        use_cpu=spec.device == "cpu",
        bf16=spec.dtype == "bfloat16",
        report_to="none",
        disable_tqdm=True,
        **({} if spec.dtype == "float32" else {"model_init_kwargs": {"dtype": spec.dtype}}),
        **({"max_length": None} if spec.uncut else {}),
        **{"per_device_train_batch_size": spec.samples or 8, "save_strategy": "no", **task.both, **task.theirs, **spec.options},
    )
    model: Any = spec.model
    if spec.adapter or task.trl[0] != "trl":  # the experimental trainers do not read the folder's dtype
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if spec.adapter:
        model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules="all-linear")
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=spec.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        peft_config=lora if spec.lora_rank and not spec.adapter else None,
        callbacks=[Clock()],
        **({"reward_funcs": no_reward} if task.answers else {}),
    )
    record.loaded()
    record.startup_seconds -= record.reference_seconds
    limit_cuda(spec.cuda_growth)
    if spec.patched:
        from fastalign.dropin.trl import patch

        with patch() as found:
            trainer.train(resume_from_checkpoint=spec.resume)
        assert found.calls > 0, "the patch had no part in this"
    else:
        trainer.train(resume_from_checkpoint=spec.resume)
    return record


def limit_cuda(mib: float | None) -> None:
    """Let this process take no more than `mib` of CUDA memory beside what it holds."""
    if mib is not None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + mib * 2**20) / torch.cuda.get_device_properties(0).total_memory
        )


def limit_all(gib: float | None) -> None:
    """Let this process take no more than `gib` of CUDA memory."""
    if gib is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / torch.cuda.get_device_properties(0).total_memory))


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of the sequences that are trained on, by whatever masks a trainer has; those that only estimate a KL do not count."""
    if "position_ids" in inputs:
        return int(inputs["input_ids"].numel())  # rows are packed: nothing is padding
    names = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask", "completion_attention_mask")
    found = [name for name in names if name in inputs] or ["prompt_mask", "completion_mask"]
    return sum(int(inputs[name].sum()) for name in found)


if __name__ == "__main__":
    given = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    limit_all(given.cuda_gib)
    try:
        done = {"fastalign": run_fastalign, "trl": run_trl}[given.side](given)
    except (torch.OutOfMemoryError, DeviceMemoryError):
        done = Recording(out_of_memory=True)
    Path(given.result).write_text(json.dumps(asdict(done)))
