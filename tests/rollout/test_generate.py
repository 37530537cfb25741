"""Generation: the model's own distribution, whatever the batch."""

import pytest
import torch
from tiny import tiny_model

from fastalign.errors import ConfigError
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.packing import collate
from fastalign.rollout.generate import generate
from fastalign.types import Sample

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [5, 6, 7], [30, 31]]


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gpt2"])
def model(request):
    return load_model(tiny_model(request.param))


def test_greedy_is_that_of_transformers_one_prompt_at_a_time(model):
    from fastalign.models.trunk import stock_attention

    got = generate(model, PROMPTS, max_new_tokens=12, eos_token_id=0, temperature=0.0)
    for prompt, completion in zip(PROMPTS, got):
        with stock_attention(model):
            want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)
        assert list(completion.tokens) == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_that_training_would_compute(model, temperature):
    done = generate(model, PROMPTS, max_new_tokens=10, eos_token_id=0, temperature=temperature, seed=3)
    batch = collate([Sample(i, tuple(p), (c.tokens,)) for i, (p, c) in enumerate(zip(PROMPTS, done))])
    head = head_spec(model)
    with torch.no_grad():
        hidden = trunk(model, batch).hidden[batch.live]
        want = head.logps(hidden, batch.live_target, temperature=temperature).logps
    got = torch.tensor([x for c in done for x in c.logps])
    assert torch.allclose(got, want, atol=2e-5)


def test_sampling_depends_on_the_seed_and_not_on_the_batch(model):
    together = generate(model, PROMPTS, max_new_tokens=8, eos_token_id=0, seed=1)
    apart = generate(model, PROMPTS, max_new_tokens=8, eos_token_id=0, seed=1, max_tokens=1)
    assert [c.tokens for c in together] == [c.tokens for c in apart]
    assert together[0].tokens != together[3].tokens  # the same prompt is sampled twice
    assert together != generate(model, PROMPTS, max_new_tokens=8, eos_token_id=0, seed=2)


def test_samples_follow_the_distribution():
    model = load_model(tiny_model("qwen3", vocab_size=8))
    n = 4000
    first = generate(model, [[3]] * n, max_new_tokens=1, eos_token_id=0, temperature=4.0, seed=5)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in first]), minlength=8).double()
    log_p = {c.tokens[0]: c.logps[0] for c in first}
    p = torch.tensor([log_p.get(i, -torch.inf) for i in range(8)]).double().exp()
    assert abs(float(p.sum()) - 1) < 1e-3  # every token was drawn, with its own probability
    chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, one run in a thousand


def test_a_completion_ends_with_its_end_of_sequence_token(model):
    done = generate(model, [[3]] * 200, max_new_tokens=6, eos_token_id=list(range(1, 160)), seed=0)
    assert {c.finished for c in done} == {True, False}
    for c in done:
        assert c.finished == (1 <= c.tokens[-1] < 160) and all(not 1 <= t < 160 for t in c.tokens[:-1])
        assert len(c.tokens) == len(c.logps) and (c.finished or len(c.tokens) == 6)


def test_generation_config_of_the_model_has_no_say_and_is_put_back(model):
    before = generate(model, PROMPTS, max_new_tokens=8, eos_token_id=0, seed=1)
    own = model.generation_config
    own.repetition_penalty = 5.0
    try:
        assert generate(model, PROMPTS, max_new_tokens=8, eos_token_id=0, seed=1) == before
        assert model.generation_config is own
    finally:
        own.repetition_penalty = 1.0


def test_bad_input(model):
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=2, eos_token_id=0)
    with pytest.raises(ConfigError, match="temperature"):
        generate(model, [[1]], max_new_tokens=2, eos_token_id=0, temperature=-1.0)
    assert generate(model, [], max_new_tokens=2, eos_token_id=0) == []
