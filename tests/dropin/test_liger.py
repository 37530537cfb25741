"""The classes of liger-kernel under their names: its loss, its metrics and its gradients, from the head operator."""

import math
from inspect import Parameter, signature

import pytest
import torch

from fastalign.dropin import liger as ours
from fastalign.head.reference import reference_logps
from fastalign.losses.preference import PREFERENCE_LOSSES

theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="without liger-kernel its numbers are not compared")

LIGERS_DPO = ["sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]


def problem(sequences=6, length=5, width=7, vocabulary=13, *, full=False, seed=0):
    """hidden (B, T, D), weight, bias, reference's three, target (B, T) with ignored positions, some of them in the middle."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    target = torch.randint(vocabulary, (sequences, length), generator=rng)
    if not full:
        target[torch.rand(sequences, length, generator=rng) < 0.4] = -100
        target[:, -1] = 3  # every sequence keeps a target, for Liger divides by their number
    hidden, weight, bias = normal(sequences, length, width), normal(vocabulary, width), normal(vocabulary)
    return hidden, weight, bias, (normal(sequences, length, width), normal(vocabulary, width), normal(vocabulary)), target


def run(module, call, hidden, weight, bias, scale=1.7):
    """Loss, metrics and the three gradients of `call(module, hidden, weight, bias)`, through an upstream factor."""
    leaves = [x if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    result = call(module, *leaves)
    loss, metrics = result if isinstance(result, tuple) and isinstance(result[1], tuple) else (result, ())
    if isinstance(loss, tuple):
        loss, metrics = loss[0], loss[1:]
    (scale * loss).backward()
    return loss.detach(), metrics, [x.grad for x in leaves if x is not None]


def assert_equal(mine, liger):
    torch.testing.assert_close(mine[0], liger[0], rtol=1e-4, atol=1e-5)
    assert len(mine[1]) == len(liger[1])
    for index, (a, b) in enumerate(zip(mine[1], liger[1])):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-4, msg=lambda m, i=index: f"metric {i}: {m}")
    assert len(mine[2]) == len(liger[2])
    for a, b in zip(mine[2], liger[2]):
        assert b.norm() > 1e-3, "no gradient: the comparison would prove nothing"
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def compare(name, call, options, hidden, weight, bias):
    mine = run(getattr(ours, name)(**options), call, hidden, weight, bias)
    assert_equal(mine, run(getattr(theirs, name)(**options, compiled=False), call, hidden, weight, bias))


@pytest.mark.parametrize("name", ["DPO", "ORPO", "CPO", "SimPO", "KTO", "GRPO", "JSD"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_parameters_are_ligers(name, method):
    """Same names, order and defaults; ours adds keyword-only ones at the end."""

    def parameters(module):
        found = signature(getattr(getattr(module, f"LigerFusedLinear{name}Loss"), method)).parameters.values()
        return [(p.name, p.default) for p in found if p.kind is not Parameter.KEYWORD_ONLY]

    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("loss_type", LIGERS_DPO)
@pytest.mark.parametrize("with_bias", [True, False])
def test_dpo(loss_type, with_bias):
    hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), target = problem()
    bias, ref_bias = (bias, ref_bias) if with_bias else (None, None)
    options = {"loss_type": loss_type, "beta": 0.3}
    options |= {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    options |= {"discopop_tau": 0.2} if loss_type == "discopop" else {}
    compare(
        "LigerFusedLinearDPOLoss", lambda m, h, w, b: m(w, h, target, b, ref_hidden, ref_weight, ref_bias), options, hidden, weight, bias
    )


@pytest.mark.parametrize(
    "options",
    [
        {"compute_nll_loss": True, "alpha": 0.7},
        {"average_log_prob": True},
        {"use_ref_model": False},
        {"ignore_index": 3},
        {"chunk_size": 3},
    ],
    ids=str,
)
def test_options_of_dpo(options):
    hidden, weight, bias, reference, target = problem(sequences=8, length=9, seed=1)
    if "ignore_index" in options:
        target = target.masked_fill(target == -100, 3)
        target[:, 0] = 2
    compare("LigerFusedLinearDPOLoss", lambda m, h, w, b: m(w, h, target, b, *reference), options, hidden, weight, bias)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ORPO", {}),
        ("ORPO", {"beta": 0.5, "compute_nll_loss": False}),
        ("CPO", {}),
        ("CPO", {"label_smoothing": 0.2, "alpha": 0.3, "average_log_prob": True}),
        ("CPO", {"compute_nll_loss": False, "beta": 0.7}),
        ("SimPO", {}),
        ("SimPO", {"gamma": 1.5, "beta": 2.0, "label_smoothing": 0.1, "compute_nll_loss": False}),
    ],
    ids=str,
)
def test_losses_without_a_reference(name, options):
    hidden, weight, bias, _, target = problem(seed=2)
    compare(f"LigerFusedLinear{name}Loss", lambda m, h, w, b: m(w, h, target, b), options, hidden, weight, bias)


def test_orpo_with_targets_of_its_likelihood_term():
    hidden, weight, bias, _, target = problem(seed=3)
    other = torch.where(target == -100, 4, target)
    other[0, 0] = -100
    compare("LigerFusedLinearORPOLoss", lambda m, h, w, b: m(w, h, target, b, other), {}, hidden, weight, bias)


@pytest.mark.parametrize("options", [{}, {"use_ref_model": True, "beta": 0.4}, {"use_ref_model": True, "average_log_prob": True}], ids=str)
@pytest.mark.parametrize("kl", [None, 0.3])
def test_kto(options, kl):
    hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), target = problem(sequences=5, seed=4)
    labels = torch.tensor([True, False, False, True, True])
    shift = None if kl is None else torch.tensor(kl)
    compare(
        "LigerFusedLinearKTOLoss",
        lambda m, h, w, b: m(h, w, target, b, labels, ref_hidden, ref_weight, ref_bias, shift),
        options,
        hidden,
        weight,
        bias,
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd(beta, temperature):
    hidden, weight, bias, (ref_hidden, _, _), target = problem(seed=5)
    teacher, teacher_bias = torch.randn(13, 7, generator=torch.Generator().manual_seed(6)), torch.linspace(-1, 1, 13)
    options = {"beta": beta, "temperature": temperature, "weight_hard_loss": 0.3, "return_soft_hard_loss": True}

    def call(module, h, w, b):
        loss, soft, hard = module(h.flatten(0, 1), w, ref_hidden.flatten(0, 1), teacher, target.flatten(), b, teacher_bias)
        return loss, (soft, hard)

    compare("LigerFusedLinearJSDLoss", call, options, hidden, weight, bias)


def test_jsd_of_a_teacher_with_a_padded_vocabulary():
    hidden, weight, bias, (ref_hidden, _, _), target = problem(seed=7)
    teacher = torch.randn(16, 7, generator=torch.Generator().manual_seed(8))

    def call(module, h, w, b):
        return module(h.flatten(0, 1), w, ref_hidden.flatten(0, 1), teacher, target.flatten(), b), ()

    compare("LigerFusedLinearJSDLoss", call, {}, hidden, weight, bias)


def rollouts(seed=9, full=False):
    hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), target = problem(sequences=4, length=6, full=full, seed=seed)
    mask = (target != -100).float()
    ids = target.clamp(min=0)
    mine = reference_logps(hidden.flatten(0, 1), weight, ids.flatten(), bias=bias).logps.view(ids.shape)
    old = mine + 0.4 * torch.randn(ids.shape, generator=torch.Generator().manual_seed(seed))
    return hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), ids, mask, old, torch.tensor([1.0, -0.5, 0.0, 2.0])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(loss_type, beta):
    hidden, weight, bias, reference, ids, mask, old, advantages = rollouts()
    options = {"loss_type": loss_type, "beta": beta, "max_completion_length": 11}
    if loss_type == "cispo":
        options["epsilon_high"] = 1.3
    compare(
        "LigerFusedLinearGRPOLoss",
        lambda m, h, w, b: m(h, w, ids, mask, advantages, b, None, old, *reference),
        options,
        hidden,
        weight,
        bias,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"delta": 1.2, "epsilon_low": 0.1, "epsilon_high": 0.3},
        {"use_bias_correction_kl": True},
        {"temperature": 0.7, "beta": 0.0},
        {"use_ref_model": False},
    ],
    ids=str,
)
def test_options_of_grpo(options):
    hidden, weight, bias, reference, ids, mask, old, advantages = rollouts(seed=10)
    compare(
        "LigerFusedLinearGRPOLoss",
        lambda m, h, w, b: m(h, w, ids, mask, advantages, b, None, old, *reference),
        options,
        hidden,
        weight,
        bias,
    )


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_grpo_with_given_reference_sampler_and_count(loss_type, per_sequence):
    hidden, weight, bias, _, ids, mask, old, advantages = rollouts(seed=11)
    ratio = torch.linspace(0.5, 1.5, 24).view(4, 6).where(mask.bool(), torch.ones(()))
    ratio = ratio[:, -1:] if per_sequence else ratio
    given = {"ref_per_token_logps": old - 0.2, "old_per_token_logps": old, "vllm_is_ratio": ratio, "num_items_in_batch": torch.tensor(40)}
    compare(
        "LigerFusedLinearGRPOLoss",
        lambda m, h, w, b: m(h, w, ids, mask, advantages, b, **given),
        {"loss_type": loss_type},
        hidden,
        weight,
        bias,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_counts_tokens_of_the_mask(level):
    """Liger's luspo is ours where no token is masked; where some are, Liger's number moves with what stands on the padding."""
    options = {"loss_type": "luspo", "importance_sampling_level": level}
    hidden, weight, bias, reference, ids, mask, old, advantages = rollouts(seed=12, full=True)
    call = lambda m, h, w, b: m(h, w, ids, mask, advantages, b, None, old, *reference)  # noqa: E731
    compare("LigerFusedLinearGRPOLoss", call, options, hidden, weight, bias)

    mask[:, 4:] = 0
    moved = hidden.clone()
    moved[:, 4:] += 1.0  # hidden states of padding
    mine = [
        ours.LigerFusedLinearGRPOLoss(**options)(h, weight, ids, mask, advantages, bias, None, old, *reference)[0] for h in (hidden, moved)
    ]
    liger = [
        theirs.LigerFusedLinearGRPOLoss(**options, compiled=False)(
            h.clone().requires_grad_(), weight, ids, mask, advantages, bias, None, old, *reference
        )[0]
        for h in (hidden, moved)
    ]
    assert mine[0] == mine[1]
    assert abs(liger[0] - liger[1]) > 1e-3


def test_label_smoothing_makes_sigmoid_cdpo():
    """Liger takes the option and ignores it; ours is -(1-e) log sigmoid(z) - e log sigmoid(-z)."""
    hidden, weight, bias, reference, target = problem(seed=13)
    values = [
        module(weight, hidden, target, bias, *reference)
        for module in (
            theirs.LigerFusedLinearDPOLoss(compiled=False),
            theirs.LigerFusedLinearDPOLoss(compiled=False, label_smoothing=0.2),
            ours.LigerFusedLinearDPOLoss(label_smoothing=0.2),
        )
    ]
    margin = values[0][1][5] - values[0][1][6]
    smoothed = (-0.8 * torch.nn.functional.logsigmoid(margin) - 0.2 * torch.nn.functional.logsigmoid(-margin)).mean()
    assert values[0][0] == values[1][0]
    assert float(values[2][0]) == pytest.approx(float(smoothed), rel=1e-5)
    assert abs(values[2][0] - values[0][0]) > 0.01


@pytest.mark.parametrize("loss_type", sorted(set(PREFERENCE_LOSSES) - set(LIGERS_DPO)))
def test_dpo_losses_that_liger_lacks(loss_type):
    """Against the loss on log-probs from materialised logits, in value and in all gradients."""
    hidden, weight, bias, reference, target = problem(seed=14)
    lengths = (target != -100).sum(1)
    own = {"chosen_lengths": lengths[:3], "rejected_lengths": lengths[3:]} if loss_type in ("ipo", "sigmoid_norm") else {}

    def dense(_, h, w, b):
        sums = [
            reference_logps(x.flatten(0, 1), y, target.flatten(), bias=z).logps.view(target.shape).sum(1)
            for x, y, z in ((h, w, b), reference)
        ]
        result = PREFERENCE_LOSSES[loss_type](sums[0][:3], sums[0][3:], sums[1][:3], sums[1][3:], beta=0.3, **own)
        return result.loss.mean(), (sums[0][:3], sums[0][3:], result.chosen_rewards, result.rejected_rewards)

    mine = run(
        ours.LigerFusedLinearDPOLoss(loss_type=loss_type, beta=0.3), lambda m, h, w, b: m(w, h, target, b, *reference), hidden, weight, bias
    )
    chosen, rejected, *_, chosen_rewards, rejected_rewards = mine[1]
    assert_equal((mine[0], (chosen, rejected, chosen_rewards, rejected_rewards), mine[2]), run(None, dense, hidden, weight, bias))


def test_slabs_do_not_change_the_numbers():
    """A budget of a few rows cuts the batch into slabs of whole pairs."""
    hidden, weight, bias, reference, target = problem(sequences=64, length=9, vocabulary=301, seed=15)
    call = lambda m, h, w, b: m(w, h, target, b, *reference)  # noqa: E731
    whole = run(ours.LigerFusedLinearDPOLoss(compute_nll_loss=True), call, hidden, weight, bias)
    cut = run(ours.LigerFusedLinearDPOLoss(compute_nll_loss=True, budget=200_000), call, hidden, weight, bias)
    assert_equal(cut, whole)


def test_half_precision_sums_the_gradient_of_the_weight_in_float32():
    """Many pairs with nearly equal rows: bfloat16 additions, one per pair, lose what a float32 sum keeps."""
    hidden, weight, _, reference, target = problem(sequences=128, length=4, seed=16)
    hidden[:] = hidden[0]
    target[:64], target[64:] = target[0], target[64]
    call = lambda m, h, w, b: m(w, h, target, None, reference[0].to(h.dtype), reference[1].to(h.dtype))  # noqa: E731
    rounded = [x.bfloat16() for x in (hidden, weight)]
    exact = run(ours.LigerFusedLinearDPOLoss(), call, *(x.float() for x in rounded), None)[2][1]
    mine, liger = (
        run(m, call, *rounded, None)[2][1].float() for m in (ours.LigerFusedLinearDPOLoss(), theirs.LigerFusedLinearDPOLoss(compiled=False))
    )
    assert (mine - exact).norm() < 0.01 * exact.norm()
    assert (liger - exact).norm() > 2 * (mine - exact).norm()


def test_autocast():
    hidden, weight, bias, reference, target = problem(seed=17)
    call = lambda m, h, w, b: m(w, h, target, b, *reference)  # noqa: E731
    exact = run(ours.LigerFusedLinearDPOLoss(), call, hidden, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, grads = run(ours.LigerFusedLinearDPOLoss(), call, hidden, weight, bias)
    assert float(loss) == pytest.approx(float(exact[0]), rel=0.02)
    assert loss != exact[0]
    assert all(g.dtype == torch.float32 and (g - e).norm() < 0.05 * e.norm() for g, e in zip(grads, exact[2]))


def test_a_sequence_without_targets_is_no_nan():
    hidden, weight, bias, _, target = problem(seed=18)
    target[4] = -100
    loss, metrics, grads = run(ours.LigerFusedLinearSimPOLoss(), lambda m, h, w, b: m(w, h, target, b), hidden, weight, bias)
    assert math.isfinite(loss) and all(g.isfinite().all() and g.norm() > 0 for g in grads)
    assert metrics[1][1] == 0
    liger = theirs.LigerFusedLinearSimPOLoss(compiled=False)(weight, hidden, target, bias)[0]
    assert math.isnan(liger)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_pair_without_targets_counts_as_a_pair(where):
    """DPO divides by all pairs, and one without a target costs log 2; so it does in Liger, which divides sums by nothing here."""
    hidden, weight, bias, reference, target = problem(seed=19)
    pair = 0 if where == "first" else 2
    target[[pair, 3 + pair]] = -100
    compare("LigerFusedLinearDPOLoss", lambda m, h, w, b: m(w, h, target, b, *reference), {}, hidden, weight, bias)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ours.LigerFusedLinearDPOLoss(loss_type="nope"), "no loss of DPO is called 'nope'"),
        (lambda: ours.LigerFusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1), "label_smoothing would change nothing"),
        (lambda: ours.LigerFusedLinearDPOLoss(loss_type="exo_pair"), "above 0 for 'exo_pair'"),
        (lambda: ours.LigerFusedLinearDPOLoss(discopop_tau=1.0), "discopop_tau would change nothing"),
        (lambda: ours.LigerFusedLinearDPOLoss(loss_type="ipo", average_log_prob=True), "divide by the lengths twice"),
        (lambda: ours.LigerFusedLinearGRPOLoss(loss_type="dr_grpo"), "max_completion_length"),
        (lambda: ours.LigerFusedLinearGRPOLoss(loss_type="vespo", importance_sampling_level="sequence"), "does not go with 'vespo'"),
        (lambda: ours.LigerFusedLinearGRPOLoss(loss_type="cispo", delta=2.0), "delta must be positive and bounds"),
        (lambda: ours.LigerFusedLinearJSDLoss(temperature=0.0), "temperature must be positive"),
    ],
)
def test_options_that_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_tensors_that_are_refused():
    hidden, weight, bias, _, target = problem()
    with pytest.raises(ValueError, match="use_ref_model=False"):
        ours.LigerFusedLinearDPOLoss()(weight, hidden, target, bias)
    with pytest.raises(ValueError, match="P chosen and then P rejected sequences, got 5"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden[:5], target[:5], bias)
    with pytest.raises(ValueError, match=r"_input must be \(B, T, D\)"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden.flatten(0, 1), target.flatten(), bias)
    with pytest.raises(ValueError, match="preference_labels must be bool"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, target, bias)
    with pytest.raises(ValueError, match="kl is one number"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, target, bias, torch.ones(6, dtype=torch.bool), kl=torch.zeros(6))
    with pytest.raises(ValueError, match="nll_target would change nothing"):
        ours.LigerFusedLinearORPOLoss(compute_nll_loss=False)(weight, hidden, target, bias, target)
