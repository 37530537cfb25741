"""The model card of a run: `final/README.md`, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastalign import __version__
from fastalign.train.config import flat, write_text
from fastalign.train.metrics import read_metrics
from fastalign.train.options import options, shown
from fastalign.train.page import text_of
from fastalign.train.report import final_metrics, is_eval

_SHOWN = (
    "loss", "divergence", "kl", "nll", "nll_loss", "mean_token_accuracy", "accuracy", "margin", "mean_reward",
    "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "num_tokens",
    "reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/mean_length", "completions/clipped_ratio",
    "objective/kl", "objective/rlhf_reward", "val/explained_variance",
)  # fmt: skip


@dataclass(frozen=True)
class _Method:
    """What the card of an algorithm says."""

    tag: str  # on the hub
    data: str  # what the model was trained on
    noun: str  # of one sample, in the plural
    note: str  # on the metrics


_PREFERENCE = _Method(
    "preference-optimization",
    "preferences",
    "pairs",
    "Rewards are implicit: beta times the log-ratio to the reference model, in nats; accuracy is the share of pairs whose chosen "
    "answer has the higher one.",
)
_LIKELIHOOD = _Method(
    "preference-optimization",
    "preferences",
    "pairs",
    "Rewards are implicit: beta times the log-prob of an answer, summed or per token as the loss takes it, without a reference; "
    "accuracy is the share of pairs whose chosen answer has the higher one.",
)
_ONLINE = _Method(
    "reinforcement-learning",
    "prompts",
    "prompts",
    "reward is the mean of the weighted sum of the reward functions over the model's own answers, reward_std its standard deviation among "
    "the answers to a prompt, frac_reward_zero_std the share of prompts whose answers were all rewarded alike.",
)
_METHODS = {
    "grpo": _ONLINE,
    "rloo": _ONLINE,
    "reinforce_pp": _ONLINE,
    "ppo": _Method(
        "reinforcement-learning",
        "prompts",
        "prompts",
        "reward is the mean of the weighted sum of the reward functions over the model's own answers, objective/kl the divergence of an "
        "answer from the initial model in nats, objective/rlhf_reward the reward less what beta takes for it; val/explained_variance is "
        "the share of the variance of the returns that the critic foresaw.",
    ),
    "online_dpo": _Method(
        "preference-optimization",
        "prompts",
        "prompts",
        "Rewards are implicit: beta times the log-ratio to the reference model, in nats; accuracy is the share of pairs whose chosen "
        "answer has the higher one. reward is what the reward functions or the judge gave the model's own answers.",
    ),
    "orpo": _LIKELIHOOD,
    "cpo": _LIKELIHOOD,
    "simpo": _LIKELIHOOD,
    "kto": _Method(
        "preference-optimization",
        "labelled answers",
        "answers",
        "Rewards are implicit: beta times the log-ratio to the reference model, in nats, of desirable (chosen) and undesirable "
        "(rejected) answers; kl is KTO's estimate of the distance from the reference.",
    ),
    "sft": _Method("sft", "examples", "samples", "Losses are nats per token; exp(nll) is the perplexity."),
    "distill": _Method("distillation", "examples", "samples", "divergence is that from the teacher, in nats per token."),
    "gkd": _Method(
        "distillation",
        "prompts",
        "samples",
        "divergence is that from the teacher, in nats per token, on the completions of the data or the model's own answers (on_policy).",
    ),
    "reward": _Method(
        "reward-model",
        "preferences",
        "comparisons",
        "accuracy is the share of pairs whose better answer has the higher score, margin the mean difference of their scores.",
    ),
}

_PAPERS = {
    "dpo": ("https://arxiv.org/abs/2305.18290", """@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290}
}"""),
    "kto": ("https://arxiv.org/abs/2402.01306", """@inproceedings{ethayarajh2024kto,
  title = {{KTO}: Model Alignment as Prospect Theoretic Optimization},
  author = {Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2402.01306}
}"""),
    "orpo": ("https://arxiv.org/abs/2403.07691", """@inproceedings{hong2024orpo,
  title = {{ORPO}: Monolithic Preference Optimization without Reference Model},
  author = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2024},
  url = {https://arxiv.org/abs/2403.07691}
}"""),
    "cpo": ("https://arxiv.org/abs/2401.08417", """@inproceedings{xu2024contrastive,
  title = {Contrastive Preference Optimization: Pushing the Boundaries of {LLM} Performance in Machine Translation},
  author = {Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and Van Durme, Benjamin and Murray, Kenton
    and Kim, Young Jin},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2401.08417}
}"""),
    "simpo": ("https://arxiv.org/abs/2405.14734", """@inproceedings{meng2024simpo,
  title = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2405.14734}
}"""),
    **dict.fromkeys(("distill", "gkd"), ("https://arxiv.org/abs/2306.13649", """@inproceedings{agarwal2024policy,
  title = {On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
  author = {Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and others},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  url = {https://arxiv.org/abs/2306.13649}
}""")),
    "grpo": ("https://arxiv.org/abs/2402.03300", """@article{shao2024deepseekmath,
  title = {{DeepSeekMath}: Pushing the Limits of Mathematical Reasoning in Open Language Models},
  author = {Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and others},
  journal = {arXiv:2402.03300},
  year = {2024},
  url = {https://arxiv.org/abs/2402.03300}
}"""),
    "rloo": ("https://arxiv.org/abs/2402.14740", """@inproceedings{ahmadian2024back,
  title = {Back to Basics: Revisiting {REINFORCE}-Style Optimization for Learning from Human Feedback in {LLMs}},
  author = {Ahmadian, Arash and Cremer, Chris and Gall{\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and others},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2024},
  url = {https://arxiv.org/abs/2402.14740}
}"""),
    "reinforce_pp": ("https://arxiv.org/abs/2501.03262", """@article{hu2025reinforce,
  title = {{REINFORCE++}: A Simple and Efficient Approach for Aligning Large Language Models},
  author = {Hu, Jian},
  journal = {arXiv:2501.03262},
  year = {2025},
  url = {https://arxiv.org/abs/2501.03262}
}"""),
    "ppo": ("https://arxiv.org/abs/1707.06347", """@article{schulman2017proximal,
  title = {Proximal Policy Optimization Algorithms},
  author = {Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg},
  journal = {arXiv:1707.06347},
  year = {2017},
  url = {https://arxiv.org/abs/1707.06347}
}"""),
    "online_dpo": ("https://arxiv.org/abs/2402.04792", """@article{guo2024direct,
  title = {Direct Language Model Alignment from Online {AI} Feedback},
  author = {Guo, Shangmin and Zhang, Biao and Liu, Tianlin and Liu, Tianqi and Khalman, Misha and Llinares, Felipe and others},
  journal = {arXiv:2402.04792},
  year = {2024},
  url = {https://arxiv.org/abs/2402.04792}
}"""),
    "reward": ("https://arxiv.org/abs/2009.01325", """@inproceedings{stiennon2020learning,
  title = {Learning to Summarize from Human Feedback},
  author = {Stiennon, Nisan and Ouyang, Long and Wu, Jeffrey and Ziegler, Daniel M. and Lowe, Ryan and Voss, Chelsea and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020},
  url = {https://arxiv.org/abs/2009.01325}
}"""),
}  # fmt: skip


def write_card(run_dir: Path | str, config: Any) -> Path:
    """Write the model card of the run in `run_dir`, whose `final/` exists, and return its path.

    It says what was trained on what, with which command and versions, and how it ended. Absolute paths are cut to their last
    part: a card is published, and the folders of its author are nobody's business.
    """
    run = Path(run_dir)
    rows = read_metrics(run / "metrics.jsonl")
    train, evals = [row for row in rows if not is_eval(row)], [row for row in rows if is_eval(row)]
    adapter = (run / "final" / "adapter_config.json").is_file()
    base, data = _public(config.model.path), _public(config.data.path)
    name, method = f"{_last(base)}-{config.name}", _METHODS.get(config.name, _PREFERENCE)
    table = [
        f"| {metric} | {text_of(mean)} | {text_of(held_out)} |"
        for metric, _, mean, _, held_out in final_metrics(train, evals)
        if metric in _SHOWN and (mean is not None or held_out is not None)
    ]
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, base, data, adapter), sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"{'A LoRA adapter for' if adapter else 'A fine-tuned version of'} `{base}`, trained on the {method.data} in `{data}` by "
        f"{config.name.upper()} ({_options_line(config)}) with fastalign {__version__}, "
        f"{train[-1]['step'] if train else 0} optimizer steps.\n",
        f"## Use\n\n```python\n{_usage(config.name, adapter)}\n```\n",
        f"## Training\n\n```bash\n{command(config, public=True)}\n```\n",
        _rewards(config),
        _counts(run / "data.json", method.noun),
        "## Results\n\n| metric | training, end | held out |\n|---|---:|---:|\n" + "\n".join(table) + "\n" if table else "",
        f"Training figures are means over the last tenth of the steps. {method.note}\n" if table else "",
        f"## Versions\n\n{_versions()}\n",
        _citation(config.name),
    ]
    card = run / "final" / "README.md"
    write_text(card, "\n".join(part for part in parts if part))
    return card


def command(config: Any, *, public: bool = False) -> str:
    """The shortest command line that repeats the run: every option that differs from its default.

    With `public` absolute paths are cut to their last part.
    """
    defaults = options(type(config))
    words = ["fastalign", config.name]
    for name, value in flat(config).items():
        if name in ("resume", "overwrite") or value == defaults[name].default:
            continue
        if value is True:
            words.append(f"--{name}")
            continue
        if public and isinstance(value, (list, tuple)):
            value = [_public(part) if isinstance(part, str) else part for part in value]
        text = json.dumps(value) if isinstance(value, (dict, list, tuple)) else repr(value) if isinstance(value, float) else shown(value)
        words += [f"--{name}", shlex.quote(_public(text) if public else text)]
    return " ".join(words)


def _front_matter(config: Any, base: str, data: str, adapter: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"base_model": base, "library_name": "peft" if adapter else "transformers"}
    front["pipeline_tag"] = "text-classification" if config.name == "reward" else "text-generation"
    tags = ["fastalign", config.name, _METHODS.get(config.name, _PREFERENCE).tag, *(["lora"] if adapter else [])]
    front["tags"] = list(dict.fromkeys(tags))
    if "/" in data and "." not in _last(data):  # a data set of the hub, not a file
        front["datasets"] = [data]
    front["model_name"] = f"{_last(base)}-{config.name}"
    return front


def _options_line(config: Any) -> str:
    names = ("loss_type", "beta", "learning_rate", "batch_size", "seed", "lora.r")
    values: Mapping[str, Any] = flat(config)
    values = {name: _public(value) if isinstance(value, str) else value for name, value in values.items()}
    return ", ".join(f"{name} {shown(values[name])}" for name in names if values.get(name) not in (None, 0, ""))


def _usage(algorithm: str, adapter: bool) -> str:
    task = "SequenceClassification" if algorithm == "reward" else "CausalLM"
    auto = f"AutoPeftModelFor{task}" if adapter else f"AutoModelFor{task}"
    one_score = ", num_labels=1" if adapter and algorithm == "reward" else ""
    lines = [
        f"from {'peft' if adapter else 'transformers'} import {auto}",
        "from transformers import AutoTokenizer\n",
        'folder = "final"  # this folder, or its name on the hub',
        f"model = {auto}.from_pretrained(folder{one_score})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if algorithm == "reward":
        lines.append('score = model(**tokenizer(text, return_tensors="pt")).logits  # of the prompt with its answer, as it was trained on')
    return "\n".join(lines)


def _rewards(config: Any) -> str:
    """What an online run was rewarded for."""
    names = getattr(config, "reward_names", [])
    weights = getattr(config, "reward_weights", None) or [1.0] * len(names)
    said = [
        f"a judge, `{_public(config.judge.function or config.judge.model)}`" if name == "judge" else f"`{_public(name)}`" for name in names
    ]
    lines = [f"- {name}{'' if weight == 1 else f', weight {weight:g}'}" for name, weight in zip(said, weights)]
    return "## Rewards\n\n" + "\n".join(lines) + "\n" if lines else ""


def _counts(path: Path, noun: str) -> str:
    if not path.is_file():
        return ""
    counts = json.loads(path.read_text(encoding="utf-8"))
    dropped = counts.get("dropped") or {}
    lines = [f"{counts[key]:,} {label}" for key, label in (("train", f"{noun} trained on"), ("held_out", "held out")) if counts.get(key)]
    lines += [f"{count:,} rows dropped: {reason}" for reason, count in dropped.items()]
    return "## Data\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _versions() -> str:
    packages = ("torch", "transformers", "peft")
    return ", ".join([f"fastalign {__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)])


def _citation(algorithm: str) -> str:
    if algorithm not in _PAPERS:
        return ""
    url, entry = _PAPERS[algorithm]
    return f"## Citation\n\nThe method: {url}\n\n```bibtex\n{entry}\n```\n"


def _public(path: str) -> str:
    return _last(path) if path.startswith(("/", "~")) or path[1:3] in (":\\", ":/") else path


def _last(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
