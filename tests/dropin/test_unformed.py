"""Logits that are not formed: every answer is that of the logits themselves, in value and gradient, and costs no needless pass."""

import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from fastalign.dropin.unformed import (
    Asked,
    entropy_from_logits,
    or_else,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
    unformed_logits,
)
from fastalign.errors import ConfigError
from fastalign.models.heads import head_spec

IDS = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.6
MODELS = {
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "softcap": lambda: tiny_model("gemma2"),
    "bias": lambda: tiny_model("phi"),
    "lora": lambda: get_peft_model(
        tiny_model("granite"), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    ),
}


def dense_logps(logits, index):
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]


def dense_entropy(logits):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


@pytest.fixture(params=MODELS)
def both(request):
    """(the model, its logits unformed, its logits)."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with unformed_logits(model, head_spec(model), Asked({})):
        logits = model(input_ids=IDS).logits
    return model, logits, model(input_ids=IDS).logits


def assert_same(model, mine, dense):
    torch.testing.assert_close(mine, dense, rtol=1e-4, atol=1e-5)
    leaves = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.linspace(0.5, 1.5, dense.numel()).view(dense.shape)
    got, wanted = (torch.autograd.grad(x, leaves, upstream, retain_graph=True, allow_unused=True) for x in (mine, dense))
    assert sum(float(g.norm()) for g in wanted if g is not None) > 0.1
    for a, b in zip(got, wanted):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


ROWS = {
    "shifted": (lambda x: x[..., :-1, :], IDS[:, 1:]),
    "last": (lambda x: x[:, -4:, :][:, :-1], IDS[:, -3:]),
    "masked": (lambda x: x[MASK], IDS[MASK]),
    "half, masked": (lambda x: x[:2][MASK[:2]], IDS[:2][MASK[:2]]),
    "one, masked": (lambda x: x[1, 2:][MASK[1, 2:]], IDS[1, 2:][MASK[1, 2:]]),
    "listed": (lambda x: x[[2, 0], ...], IDS[[2, 0]]),
    "selected": (lambda x: x.index_select(0, torch.tensor([3, 1])), IDS[[3, 1]]),
    "second chunk": (lambda x: x.chunk(2, dim=0)[1], IDS[2:]),
    "flat": (lambda x: torch.flatten(x[:2, :-1], end_dim=1), IDS[:2, 1:].flatten()),
    "viewed": (lambda x: x.contiguous().view(-1, x.shape[-1]), IDS.flatten()),
    "scaled": (lambda x: x / 0.7, IDS),
    "scaled in place": (lambda x: x[:, 1:].clone().div_(0.7) if isinstance(x, torch.Tensor) else x[:, 1:].div_(0.7), IDS[:, 1:]),
}


@pytest.mark.parametrize("rows", ROWS)
def test_log_probs_of_rows(both, rows):
    model, logits, dense = both
    choose, index = ROWS[rows]
    mine, dense = choose(logits), choose(dense)
    assert mine.shape == dense.shape and mine.ndim == dense.ndim and mine.size(-1) == dense.size(-1) and len(mine) == len(dense)
    assert_same(model, selective_log_softmax(mine, index), dense_logps(dense, index))


def test_statistics(both):
    _, logits, dense = both
    mine, dense = logits[:, :-1], dense[:, :-1].detach()
    close = {"rtol": 1e-4, "atol": 1e-5}
    labels = IDS[:, 1:]
    top = dense.argmax(-1)
    mixed = torch.where(MASK[:, 1:], top, labels)  # some are the most likely
    for known in (False, True):
        if known:
            selective_log_softmax(mine, labels)
        torch.testing.assert_close(mine.mean(-1), dense.mean(-1), **close)
        torch.testing.assert_close(mine.mean(), dense.mean(), **close)
        torch.testing.assert_close(mine[:2].nansum(), dense[:2].nansum(), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(torch.logsumexp(mine, dim=-1), dense.logsumexp(-1), **close)
        torch.testing.assert_close(torch.logsumexp(2.0 * mine, dim=-1), (2 * dense).logsumexp(-1), **close)
        torch.testing.assert_close(
            torch.logsumexp(2 * F.log_softmax(mine, dim=-1), dim=-1), (2 * dense.log_softmax(-1)).logsumexp(-1), **close
        )
        torch.testing.assert_close(entropy_from_logits(mine.detach()), dense_entropy(dense), **close)
        every = torch.ones_like(mixed, dtype=torch.bool)
        for mask in (every, MASK[:, 1:]):
            expected = (top == mixed) & mask
            assert expected.any() and not expected.all()
            assert ((mine.argmax(dim=-1) == mixed) & mask).equal(expected)


def test_a_likelihood_term_uses_the_log_probs_again(both):
    """As DPO's: padding has label 0, and rows with it do not count."""
    model, logits, dense = both
    labels = IDS.where(MASK, torch.zeros_like(IDS))
    selective_log_softmax(logits, labels)
    calls = logits.asked.calls
    mine = F.cross_entropy(logits[:2, :-1].flatten(0, 1), labels[:2, :-1].flatten(), ignore_index=0)
    assert logits.asked.calls == calls == 1
    assert_same(model, mine, F.cross_entropy(dense[:2, :-1].flatten(0, 1), labels[:2, :-1].flatten(), ignore_index=0))
    assert_same(model, torch.nn.CrossEntropyLoss(reduction="sum")(logits[0], IDS[1]), F.cross_entropy(dense[0], IDS[1], reduction="sum"))


def test_entropy_with_a_gradient_comes_from_one_pass(both):
    model, logits, dense = both
    logps, entropy = selective_log_softmax_and_entropy(logits, IDS, temperature=0.8, row_mask=MASK)
    assert logits.asked.calls == 1
    assert_same(model, logps + 0.3 * entropy, (dense_logps(dense / 0.8, IDS) + 0.3 * dense_entropy(dense / 0.8)) * MASK)
    logps, entropy = selective_log_softmax_and_entropy(logits, IDS, entropy_requires_grad=False)
    assert logps.requires_grad and not entropy.requires_grad
    separate = entropy_from_logits(logits[:, 1:])
    assert_same(model, separate, dense_entropy(dense[:, 1:]))


def test_what_was_asked_once_is_computed_in_the_pass_of_the_log_probs(monkeypatch):
    model, asked = tiny_model("gemma2"), Asked({})
    from fastalign.dropin.unformed import Unformed

    passes = []
    own = Unformed._pass
    monkeypatch.setattr(Unformed, "_pass", lambda self, *a, **k: passes.append(k["outputs"]) or own(self, *a, **k))
    spec = head_spec(model)
    for _ in range(2):
        with unformed_logits(model, spec, asked):
            logits = model(input_ids=IDS).logits
            with torch.no_grad():
                selective_log_softmax(model(input_ids=IDS).logits, IDS)  # a reference, of which no one asks more
        selective_log_softmax(logits, IDS)
        entropy_from_logits(logits.detach())
        logits[:2].mean(-1)
        _ = (logits.argmax(-1) == IDS) & MASK
    assert passes[0] == passes[1] == passes[5] == ()
    assert passes[6:] == [("entropy", "is_top1", "mean_logits")]


def test_rows_that_were_not_scored_are_computed_when_they_are_asked_for(both):
    model, logits, dense = both
    _, entropy = selective_log_softmax_and_entropy(logits, IDS, row_mask=MASK, entropy_requires_grad=False)
    torch.testing.assert_close(entropy, dense_entropy(dense.detach()) * MASK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy_from_logits(logits.detach()), dense_entropy(dense.detach()), rtol=1e-4, atol=1e-5)
    assert not selective_log_softmax(logits, IDS, row_mask=MASK)[~MASK].any()
    assert_same(model, selective_log_softmax(logits, IDS), dense_logps(dense, IDS))


def test_a_detached_view_gives_no_gradient(both):
    _, logits, _ = both
    assert not selective_log_softmax(logits.detach(), IDS).requires_grad
    assert selective_log_softmax(logits, IDS).requires_grad
    assert not selective_log_softmax(logits.detach(), IDS).requires_grad


def test_labels_give_the_loss_of_the_model():
    model = tiny_model("mixtral").train()
    labels = IDS.where(MASK, torch.full_like(IDS, -100))
    dense = model(input_ids=IDS, labels=labels, num_items_in_batch=7)
    with unformed_logits(model, head_spec(model), Asked({})):
        mine = model(input_ids=IDS, labels=labels, num_items_in_batch=7)
    assert next(iter(mine)) == "loss"
    assert_same(model, mine.loss, dense.loss)
    assert mine.logits.shape == dense.logits.shape


def test_no_logits_exist():
    model, ids = tiny_model("llama", vocab_size=2049), IDS.repeat(6, 1)
    spec = head_spec(model)
    with Largest(2049) as largest, unformed_logits(model, spec, Asked({"budget": 40 * 2049 * 4})):
        logits = model(input_ids=ids).logits[:, :-1]
        selective_log_softmax(logits, ids[:, 1:]).sum().backward()
        entropy_from_logits(logits.detach())
        logits.mean()
    assert largest.rows <= 40 < ids.numel()


def test_what_only_logits_can_answer_is_refused(both):
    _, logits, _ = both
    for ask in (
        lambda: logits[..., 3],
        lambda: logits[..., 2:],
        lambda: logits[None],
        lambda: logits.softmax(-1),
        lambda: torch.topk(logits, 5),
        lambda: logits.view(-1, 7),
        lambda: logits.flatten(),
        lambda: logits.chunk(2, dim=-1),
        lambda: logits.index_select(2, torch.tensor([1])),
        lambda: logits.mean(0),
        lambda: logits.argmax(-1) & MASK,
        lambda: 3.0 * F.log_softmax(logits, dim=-1),
        lambda: F.cross_entropy(logits.view(-1, logits.shape[-1]), IDS.flatten(), label_smoothing=0.1),
    ):
        with pytest.raises(ConfigError, match="the patch forms no logits"):
            ask()


def test_the_forward_is_put_back_and_logits_stay_theirs():
    model = tiny_model("llama")
    spec = head_spec(model)
    with pytest.raises(ZeroDivisionError), unformed_logits(model, spec, Asked({})), unformed_logits(model, spec, Asked({})):
        _ = 1 / 0
    assert "forward" not in vars(model)
    theirs = or_else(entropy_from_logits, lambda logits, chunk_size=1: (logits, chunk_size))
    assert theirs(IDS, chunk_size=3) == (IDS, 3)
