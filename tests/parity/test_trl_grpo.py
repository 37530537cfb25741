"""An optimizer step of our GRPO and RLOO against TRL 1.16's: the same answers and advantages, each through its own forward, in float32."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of an online step with TRL's is unproven")
from accelerate import Accelerator
from support import relative_error
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import load_prompts
from fastalign.errors import ConfigError
from fastalign.losses.policy import POLICY_LOSSES
from fastalign.models.config import ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.grpo import GRPO, GRPOConfig
from fastalign.objectives.rloo import RLOO, RLOOConfig
from fastalign.objectives.rollouts import Rollouts
from fastalign.train.step import micro_batches, run_step

TRL_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
LENGTHS = (5, 1, 3, 7, 2, 7, 4, 6)  # of the answers; two groups of four
LONGEST, TEMPERATURE, CLIP_LOW, CLIP_HIGH = 7, 0.9, 0.2, 0.28


class Case:
    """One generation of two prompts: the same answers for both trainers, and a policy that has moved since."""

    def __init__(self, folder) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.forward = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        add_fused_lm_head(self.forward, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        self.folder, self.tokenizer = folder, tiny_tokenizer()
        rng = torch.Generator().manual_seed(0)
        self.answers = [torch.randint(10, 300, (n,), generator=rng) for n in LENGTHS]
        self.prompts = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in ("old river", "a green lamp holds the letter")]
        with torch.no_grad():
            logps = [self.logps(i) for i in range(len(LENGTHS))]
        self.old, self.ref, self.drawn = ([x + scale * torch.randn(x.shape, generator=rng) for x in logps] for scale in (0.3, 0.5, 0.6))
        self.advantages = torch.tensor([1.3, -0.7, 0.4, -1.0, 0.9, -1.2, 0.6, -0.3])

    def logps(self, i):
        prompt = self.prompts[i // 4]
        scores = (self.model(torch.cat((prompt, self.answers[i]))[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        return scores[len(prompt) - 1 : -1].gather(1, self.answers[i][:, None])[:, 0]

    def rollouts(self, corrected=False):
        return Rollouts(
            prompts=torch.arange(2).repeat_interleave(4),
            tokens=torch.cat(self.answers),
            lengths=torch.tensor(LENGTHS),
            finished=torch.tensor([n < LONGEST for n in LENGTHS]),
            rewards=torch.zeros(len(LENGTHS), 1),
            advantages=self.advantages,
            logps=torch.cat(self.old),
            ref_logps=torch.cat(self.ref),
            draws=torch.ones(2, dtype=torch.int64),
            sampling_logps=torch.cat(self.drawn) if corrected else torch.empty(0),
        )

    def ours(self, kind=GRPO, config_kind=GRPOConfig, step=1, **options):
        """(loss, gradients, denominators, metrics) of optimizer step `step` of the generation, cut into two micro-batches or more."""
        given = {"rewards": ["repetition"], "output": "unused", "batch_size": 2, "num_generations": 4, "num_iterations": 2, "seed": 0}
        given |= {"max_completion_length": LONGEST, "temperature": TEMPERATURE, "max_tokens": 40}
        model, data = (cls(path=str(self.folder / name)) for cls, name in ((ModelConfig, "model"), (PromptDataConfig, "prompts.jsonl")))
        model.dtype = "float32"
        config = config_kind(model=model, data=data, **given | options)
        config.validate()
        prompts = load_prompts(config.data, self.tokenizer)
        objective = kind(config, load_model(config.model, lora=config.lora), prompts)
        objective.rollouts, objective.generation = self.rollouts(objective.corrected), 0
        bins = micro_batches(list(objective.samples(step, prompts.samples)), config.max_tokens)
        assert len(bins) > 1
        sums, counts = run_step(objective, bins, device=torch.device("cpu"))
        values = {name: float(value) for name, value in sums.items()}
        return sums["loss"], {n: w.grad for n, w in objective.model.named_parameters()}, counts, objective.metrics(values, counts)

    def trl(self, trainer=GRPOTrainer, chosen=slice(None), completion=None, per_generation=1, correction=None, **options):
        """The same of TRL, all answers in one micro-batch."""
        rows = range(len(LENGTHS))[chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        prompts = pad([self.prompts[i // 4].flip(0) for i in rows], batch_first=True, padding_value=0).flip(1)
        shown = pad([torch.ones_like(self.prompts[i // 4]).flip(0) for i in rows], batch_first=True).flip(1)
        padded = {"ids": self.answers, "old": self.old, "ref": self.ref, "drawn": self.drawn}
        padded = {name: pad([x[i] for i in rows], batch_first=True) for name, x in padded.items()}
        mask = pad([torch.ones(LENGTHS[i], dtype=torch.int64) for i in rows], batch_first=True)
        mask = mask if completion is None else mask * completion[:, None]
        args = {"delta": None, "use_bias_correction_kl": True, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
        args |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
        stub = SimpleNamespace(
            args=SimpleNamespace(**args, steps_per_generation=per_generation),
            accelerator=Accelerator(cpu=True),
            model=SimpleNamespace(training=True),
            aux_loss_enabled=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=LONGEST,
            _metrics={"train": defaultdict(list)},
            _entropy_bonus_enabled=bool(options.get("entropy_coef")),
            use_vllm=correction is not None,
            vllm_importance_sampling_correction=correction is not None,
            epsilon_low=CLIP_LOW,
            get_high_entropy_mask=lambda *a: GRPOTrainer.get_high_entropy_mask(stub, *a),
            use_adaptive_entropy=False,
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            **{
                "beta": 0.0,
                "epsilon_high": CLIP_HIGH,
                "off_policy_mask_threshold": None,
                "importance_sampling_level": "token",
                "top_entropy_quantile": 1.0,
            }
            | options,
        )
        scored = trainer._get_per_token_logps_and_entropies.__wrapped__
        stub._get_per_token_logps_and_entropies = lambda *a, **k: scored(stub, *a, **k)
        inputs = {"prompt_ids": prompts, "prompt_mask": shown, "completion_ids": padded["ids"], "completion_mask": mask}
        inputs |= {"advantages": self.advantages[chosen], "old_per_token_logps": padded["old"], "ref_per_token_logps": padded["ref"]}
        inputs |= correction(padded) if correction else {}
        inputs |= {"old_logps": (padded["old"] * mask).sum(1), "num_items_in_batch": torch.tensor(float(sum(LENGTHS)))}
        self.forward.zero_grad()
        loss = trainer._compute_loss(stub, self.forward, inputs)
        loss.backward()
        metrics = {name: values[0] for name, values in stub._metrics["train"].items()}
        return loss.detach(), {n: w.grad.clone() for n, w in self.forward.named_parameters()}, metrics


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl-grpo")
    save_tiny(folder / "model")
    rows = [{"prompt": text} for text in ("old river", "a green lamp holds the letter")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Case(folder)


def check(ours, theirs, scale=1.0) -> None:
    assert float(ours[0]) * scale == pytest.approx(float(theirs[0]), rel=1e-4, abs=1e-6)
    size = max(float(grad.abs().max()) for grad in theirs[1].values())
    assert size > 1e-3
    for name, grad in theirs[1].items():
        assert float((ours[1][name] * scale - grad).abs().max()) <= 1e-4 * size, name


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", TRL_TYPES)
def test_a_step_of_grpo_is_trls(case, name, level, beta):
    high = 1.2 if name == "cispo" else CLIP_HIGH
    bounded = {} if name in ("sapo", "vespo") else {"epsilon_high": high}  # ours refuses what TRL ignores
    ours = case.ours(loss_type=name, importance_sampling_level=level, beta=beta, **bounded)
    theirs = case.trl(loss_type=name, importance_sampling_level=level, beta=beta, epsilon_high=high)
    check(ours, theirs)
    metrics = ours[3]
    assert metrics["entropy"] == pytest.approx(theirs[2]["entropy"], rel=1e-4)
    if beta:
        assert metrics["kl"] == pytest.approx(theirs[2]["kl"], rel=1e-4)
    if level == "token" and POLICY_LOSSES[name].token_loss is POLICY_LOSSES["grpo"].token_loss:
        assert metrics["clip_ratio/low_mean"] == pytest.approx(theirs[2]["clip_ratio/low_mean"]) and metrics["clip_ratio/low_mean"] > 0


def trl_weights(mode, clip_min, clip_max, mask):
    """What TRL's `_generate_and_score_completions` puts beside a generation of vLLM's, by its text: that method generates, too."""
    text = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    first = text.index("                per_token_logps_diff = (old_per_token_logps - sampling_per_token_logps) * mask")
    body = textwrap.dedent(text[first : text.index("            # Compute the per-token log probabilities for the reference model", first)])

    def weights(padded):
        names = {"mode": mode, "clip_min": clip_min, "clip_max": clip_max}
        stub = SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in names.items()})
        given = {"self": stub, "torch": torch, "math": math, "mask": mask}
        given |= {"old_per_token_logps": padded["old"], "sampling_per_token_logps": padded["drawn"]}
        exec(body, given)
        ratio = given["vllm_importance_sampling_ratio"]
        return {"importance_sampling_ratio": ratio, "sampling_per_token_logps": padded["drawn"]}

    return weights


@pytest.mark.parametrize("name", ["dapo", "grpo", "cispo", "vespo"])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_correction_of_what_another_engine_drew_is_trls(case, mode, name):
    """Bounds that some ratios exceed on either side; vespo takes the weights of tokens into its own."""
    low, high = 0.6, 1.5
    bounds = {"importance_sampling_clip_min": low, "importance_sampling_clip_max": high}
    bounded = {"vespo": {}, "cispo": {"epsilon_high": 1.2}}.get(name, {"epsilon_high": CLIP_HIGH})
    options = {"loss_type": name, "beta": 0.1, "importance_sampling_correction": mode, **bounded, **bounds}
    if name == "vespo" and mode.startswith("sequence"):
        with pytest.raises(ConfigError, match="importance_sampling_correction must be one of tokens for vespo"):
            case.ours(**options)
        return
    ours = case.ours(**options)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in LENGTHS], batch_first=True)
    high_ratio = bounded.get("epsilon_high", CLIP_HIGH)
    theirs = case.trl(loss_type=name, beta=0.1, epsilon_high=high_ratio, correction=trl_weights(mode, low, high, mask))
    check(ours, theirs)
    assert relative_error(ours[0], case.ours(loss_type=name, beta=0.1, **bounded)[0]) > 0.01, "the correction has no effect"
    metrics, differences = ours[3], [a - b for a, b in zip(case.old, case.drawn)]
    size = torch.cat(differences).abs()
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(float(size.mean()), rel=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(float(size.max()), rel=1e-5)
    ratios = (torch.stack([d.sum() for d in differences]) if mode.startswith("sequence") else torch.cat(differences)).exp()
    assert float(ratios.min()) < low and float(ratios.max()) > high
    for kind in ("min", "mean", "max"):
        assert metrics[f"sampling/importance_sampling_ratio/{kind}"] == pytest.approx(float(getattr(ratios, kind)()), rel=1e-5)


def test_answers_far_off_what_another_engine_drew_are_masked_as_in_trl(case):
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in LENGTHS], batch_first=True)
    options = {"loss_type": "dapo", "off_policy_mask_threshold": 0.05}
    ours = case.ours(epsilon_high=CLIP_HIGH, importance_sampling_correction="token_truncate", **options)
    check(ours, case.trl(correction=trl_weights("token_truncate", None, 3.0, mask), **options))


def test_answers_far_off_the_policy_are_masked_as_in_trl(case):
    options = {"loss_type": "dapo", "beta": 0.1, "off_policy_mask_threshold": 0.05}
    ours = case.ours(epsilon_high=CLIP_HIGH, **options)
    check(ours, case.trl(**options))
    assert relative_error(ours[0], case.ours(epsilon_high=CLIP_HIGH, loss_type="dapo", beta=0.1)[0]) > 0.01, "the mask has no effect"


@pytest.mark.parametrize("options", [{}, {"beta": 0.2}, {"entropy_coef": 0.1}, {"off_policy_mask_threshold": 0.05}], ids=str)
def test_the_tokens_of_highest_entropy_are_those_of_trl(case, options):
    """TRL's answers are all in one micro-batch; ours are cut into several."""
    options = {"loss_type": "dapo", "epsilon_high": CLIP_HIGH} | options
    ours = case.ours(top_entropy_quantile=0.3, **options)
    check(ours, case.trl(top_entropy_quantile=0.3, **options))
    assert relative_error(ours[0], case.ours(**options)[0]) > 0.01, "the quantile has no effect"


def test_a_step_of_rloo_is_trls(case):
    check(case.ours(RLOO, RLOOConfig, epsilon_high=CLIP_HIGH, beta=0.0), case.trl(RLOOTrainer))


def test_truncated_answers_do_not_count_here_and_count_as_zeros_in_trl(case):
    done = case.rollouts().finished
    assert 0 < int(done.sum()) < len(LENGTHS)
    ours = case.ours(loss_type="grpo", epsilon_high=CLIP_HIGH, mask_truncated_completions=True)
    theirs = case.trl(loss_type="grpo", completion=done.long())
    assert relative_error(ours[0], theirs[0]) > 0.05
    check(ours, theirs, scale=float(done.sum()) / len(LENGTHS))


def test_tokens_are_counted_over_a_step_here_and_over_a_generation_in_trl(case):
    """The second of two steps of a generation, four answers each."""
    ours = case.ours(loss_type="dapo", epsilon_high=CLIP_HIGH, batch_size=1, steps_per_generation=2, num_iterations=1, max_tokens=30)
    theirs = case.trl(loss_type="dapo", chosen=slice(4, None), per_generation=2)
    assert ours[2]["tokens"] == sum(LENGTHS[4:]) != sum(LENGTHS) / 2
    assert relative_error(ours[0], theirs[0]) > 0.05
    check(ours, theirs, scale=sum(LENGTHS[4:]) / (sum(LENGTHS) / 2))
