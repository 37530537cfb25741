"""Generation: the model's own distribution, whatever the batch."""

import pytest
import torch
from tiny import tiny_model

from fastalign.errors import ConfigError
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.packing import collate
from fastalign.rollout.generate import generate, truncate
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


@pytest.mark.parametrize(
    "options", [{"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.4}, {"top_k": 6, "top_p": 0.8, "min_p": 0.2}], ids=lambda o: "+".join(o)
)
def test_truncated_samples_follow_the_renormalised_distribution(options):
    """Which tokens are left is asked of Transformers' own warpers; the log-probs are those of what is left."""
    from transformers.generation import logits_process

    from fastalign.models.trunk import stock_attention

    model, n, temperature = load_model(tiny_model("qwen3", vocab_size=8)), 4000, 4.0
    with stock_attention(model), torch.no_grad():
        scores = model(torch.tensor([[3]])).logits[:, -1].float() / temperature
    for warper, name in (("TopKLogitsWarper", "top_k"), ("TopPLogitsWarper", "top_p"), ("MinPLogitsWarper", "min_p")):
        if name in options:
            scores = getattr(logits_process, warper)(options[name])(None, scores)
    p = scores.double().softmax(-1)[0]
    left = p > 0
    assert 1 < int(left.sum()) < 8
    done = generate(model, [[3]] * n, max_new_tokens=1, eos_token_id=0, temperature=temperature, seed=5, **options)
    tokens = torch.tensor([c.tokens[0] for c in done])
    assert torch.allclose(torch.tensor([c.logps[0] for c in done]).double(), p[tokens].log(), atol=1e-5)
    counts = torch.bincount(tokens, minlength=8).double()
    assert int(counts[~left].sum()) == 0
    chi_square = ((counts - n * p) ** 2 / (n * p))[left].sum()
    assert chi_square < 24.3  # at most 7 degrees of freedom, less than one run in a thousand
    few = generate(model, [[3]] * 50, max_new_tokens=1, eos_token_id=0, temperature=temperature, seed=5, max_tokens=9, **options)
    assert [c.tokens for c in few] == [c.tokens for c in done[:50]]


def test_truncation_keeps_ties_of_top_k_and_one_token_at_least():
    p = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.7, 0.1, 0.1, 0.1]])
    assert torch.equal(truncate(p.log(), top_k=2)[0].isinf(), torch.tensor([True, False, False, False]))
    assert torch.allclose(truncate(p.log(), top_p=1e-9)[1].exp(), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert torch.allclose(truncate(p.log(), min_p=1.0)[0].exp(), torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]))
    assert torch.equal(truncate(p.log(), top_k=9), p.log())  # more than there are


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
    with pytest.raises(ConfigError, match="top_p in"):
        generate(model, [[1]], max_new_tokens=2, eos_token_id=0, top_p=0.0)
    assert generate(model, [], max_new_tokens=2, eos_token_id=0) == []
