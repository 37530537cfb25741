"""What must hold whatever the numbers: invariances, edges, reruns, errors."""

import pytest
import torch
from problems import ALL_OUTPUTS, make
from support import relative_error

import fastalign
from fastalign import linear_logps, linear_loss

BUDGETS = (None, 301 * 4 * 70, 301 * 4 * 8, 300)


def test_slab_and_tile_sizes_do_not_matter():
    problem = make(n=200, dtype=torch.float64, rich=True)
    want = problem.gradients(schedule="keep")
    for budget in BUDGETS:
        for got in (problem.gradients(schedule="recompute", budget=budget), problem.slab_gradients(budget=budget)):
            assert max(relative_error(a, b) for a, b in zip(got, want)) < 1e-12


def test_order_of_rows_does_not_matter():
    problem = make(n=64, dtype=torch.float64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    out = linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS)
    shuffled = linear_logps(problem.hidden[order], problem.weight, problem.target[order], outputs=ALL_OUTPUTS)
    for a, b in zip(out[:5], shuffled[:5]):
        assert relative_error(b, a[order]) < 1e-13


@pytest.mark.parametrize("how", ["keep", "recompute", "slab", "frozen"])
def test_ignored_rows_may_hold_nan_and_get_zero_gradient(how):
    problem = make(frozen=how == "frozen")
    poisoned = problem.hidden.detach().clone()
    poisoned[problem.target == -100] = float("nan")
    want = problem.slab_gradients() if how == "slab" else problem.gradients(schedule=how)
    problem.hidden = poisoned.requires_grad_()
    got = problem.slab_gradients() if how == "slab" else problem.gradients(schedule=how)
    assert not got[0][problem.target == -100].any()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("how", ["keep", "recompute", "slab"])
def test_rows_without_a_coefficient_are_dropped_exactly(how):
    problem = make(n=90, dtype=torch.float64, rich=True)
    for c in problem.coefficients.values():
        c[10:60] = 0
    gold = torch.autograd.grad(problem.loss(problem.reference()), problem.leaves)
    for budget in BUDGETS:
        got = problem.slab_gradients(budget=budget) if how == "slab" else problem.gradients(schedule=how, budget=budget)
        assert max(relative_error(a, b) for a, b in zip(got, gold)) < 1e-12
        assert not got[0][10:60].any()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("ignored", [0, 1], ids=["live", "all ignored"])
def test_no_rows_and_one_row(n, ignored):
    problem = make(n=n, ignored=ignored)
    out = linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS)
    assert all(x.shape == (n,) for x in out)
    for gradients in (problem.gradients(), problem.slab_gradients()):
        assert gradients[0].shape == problem.hidden.shape and gradients[1].shape == problem.weight.shape
        live = n and not ignored
        assert bool(gradients[1].any()) == bool(live) and gradients[1].isfinite().all()


def test_one_token_vocabulary_has_probability_one():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    out = linear_logps(hidden, weight, torch.zeros(3, dtype=torch.int64), outputs=ALL_OUTPUTS)
    assert not out.logps.any() and not out.entropy.any() and out.is_top1.all()
    assert not torch.autograd.grad(out.logps.sum(), weight)[0].any()


def test_leading_shapes_and_strided_weights():
    problem = make(n=24, dtype=torch.float64)
    wide = torch.randn(301, 40, dtype=torch.float64)
    wide[:, ::2][:, :16] = problem.weight.detach()
    strided = wide[:, ::2][:, :16].requires_grad_()
    assert not strided.is_contiguous()
    flat = linear_logps(problem.hidden, problem.weight, problem.target).logps
    folded = linear_logps(problem.hidden.view(2, 3, 4, 16), strided, problem.target.view(2, 3, 4)).logps
    assert folded.shape == (2, 3, 4) and torch.allclose(folded.flatten(), flat, rtol=1e-13)
    (d,) = torch.autograd.grad(folded.sum(), [strided])
    (want,) = torch.autograd.grad(flat.sum(), [problem.weight])
    assert relative_error(d, want) < 1e-13


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_gradient_of_one_side_only(which):
    problem = make(dtype=torch.float64)
    full = problem.gradients()[0 if which == "hidden" else 1]
    frozen = problem.weight if which == "hidden" else problem.hidden
    frozen.requires_grad_(False)
    for got in (problem.gradients(), problem.slab_gradients()):
        assert len(got) == 1 and relative_error(got[0], full) < 1e-13


@pytest.mark.parametrize("schedule", ["keep", "recompute", "frozen"])
def test_second_backward_gives_the_same(schedule):
    problem = make(rich=True, frozen=schedule == "frozen")
    out = linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS, schedule=schedule, **problem.options)
    first = torch.autograd.grad(problem.loss(out), problem.leaves, retain_graph=True)
    second = torch.autograd.grad(problem.loss(out), problem.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_backward_of_the_slab_schedule():
    problem = make(rich=True)
    loss = linear_loss(problem.hidden, problem.weight, problem.target, problem.loss, outputs=tuple(problem.coefficients), **problem.options)
    first = [g.clone() for g in torch.autograd.grad(loss, problem.leaves, retain_graph=True)]
    doubled = torch.autograd.grad(2 * loss, problem.leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, doubled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["keep", "recompute", "slab"])
def test_reruns_are_bitwise_equal(how, dtype):
    problem = make(n=300, dtype=dtype, rich=True)
    runs = [problem.slab_gradients(budget=90000) if how == "slab" else problem.gradients(schedule=how, budget=90000) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("budget", BUDGETS)
def test_groups_are_never_split(budget):
    problem = make(n=60, dtype=torch.float64, terms=("logps",))
    groups, seen = [0, 7, 7, 20, 50, 60], []

    def loss_fn(out, rows):
        seen.append((rows.start, rows.stop))
        starts = [g for g in sorted(set(groups)) if rows.start <= g < rows.stop]
        ends = [*starts[1:], rows.stop]
        sums = [out.logps[a - rows.start : b - rows.start].sum() for a, b in zip(starts, ends)]
        return -torch.nn.functional.logsigmoid(torch.stack(sums) / 10).sum()

    loss = linear_loss(problem.hidden, problem.weight, problem.target, loss_fn, groups=groups, budget=budget)
    got = torch.autograd.grad(loss, problem.leaves)
    assert all(a in groups and b in groups for a, b in seen)
    assert [a for a, _ in seen[1:]] == [b for _, b in seen[:-1]] and seen[0][0] == 0 and seen[-1][1] == 60
    full = loss_fn(linear_logps(problem.hidden, problem.weight, problem.target, impl="reference"), slice(0, 60))
    want = torch.autograd.grad(full, problem.leaves)
    assert relative_error(loss, full) < 1e-13
    assert max(relative_error(a, b) for a, b in zip(got, want)) < 1e-12


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["logps", "loss"])
def test_weight_gradient_added_into_a_buffer(how, buffer):
    problem = make(n=80, dtype=torch.bfloat16)
    want = problem.to(torch.float64).gradients()
    start = torch.randn(301, 16).to(buffer)
    total = start.clone()
    problem.weight.requires_grad_(False)
    got = problem.gradients(d_weight=total, schedule="recompute") if how == "logps" else problem.slab_gradients(d_weight=total)
    assert len(got) == 1 and relative_error(got[0], want[0]) < 5e-3
    added = total.float() - start.float()
    assert relative_error(added, want[1].float()) < (5e-3 if buffer == torch.float32 else 5e-2)


def test_buffer_refuses_a_second_or_scaled_backward():
    problem = make(terms=("logps",))
    for scale, calls, message in ((2.0, 1, "incoming gradient of 1"), (1.0, 2, "differentiated twice")):
        buffer = torch.zeros_like(problem.weight)
        loss = linear_loss(problem.hidden, problem.weight, problem.target, problem.loss, d_weight=buffer)
        for _ in range(calls - 1):
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=message):
            (scale * loss).backward(retain_graph=True)


def test_no_grad_keeps_nothing():
    problem = make()
    with torch.no_grad():
        out = linear_logps(problem.hidden, problem.weight, problem.target, outputs=("entropy",))
        loss = linear_loss(problem.hidden, problem.weight, problem.target, lambda out, rows: out.logps.sum())
    assert not out.logps.requires_grad and not out.entropy.requires_grad
    assert torch.allclose(loss, out.logps.sum())


def test_differentiable_names_what_gets_a_gradient():
    problem = make(frozen=True)
    out = linear_logps(problem.hidden, problem.weight, problem.target, outputs=("entropy", "lse"), differentiable=("logps",))
    assert out.logps.requires_grad and not out.entropy.requires_grad and not out.lse.requires_grad


def test_known_number_of_live_rows_changes_nothing():
    problem = make()
    live = int((problem.target != -100).sum())
    assert all(torch.equal(a, b) for a, b in zip(problem.gradients(live_rows=live), problem.gradients()))


def _half_without_coefficient():
    problem = make(terms=("logps",))
    problem.coefficients["logps"][::2] = 0
    active = (problem.coefficients["logps"] != 0) & (problem.target != -100)
    return problem, active


@pytest.mark.parametrize("schedule", ["slab", "keep", "recompute", "frozen"])
def test_naming_the_active_rows_changes_nothing(schedule):
    problem, active = _half_without_coefficient()
    if schedule == "frozen":
        problem.weight.requires_grad_(False)

    def gradients(**options):
        if schedule == "slab":
            loss = linear_loss(problem.hidden, problem.weight, problem.target, problem.loss, budget=90000, **options)
        else:
            loss = problem.loss(linear_logps(problem.hidden, problem.weight, problem.target, schedule=schedule, budget=90000, **options))
        return torch.autograd.grad(loss, problem.leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(active=active), gradients()))


@pytest.mark.parametrize("schedule", ["slab", "keep", "recompute"])
def test_an_inactive_row_with_a_gradient_is_an_error(schedule):
    problem, active = _half_without_coefficient()
    active[active.nonzero()[0]] = False

    def run():
        if schedule == "slab":
            return linear_loss(problem.hidden, problem.weight, problem.target, problem.loss, active=active)
        problem.loss(linear_logps(problem.hidden, problem.weight, problem.target, schedule=schedule, active=active)).backward()

    with pytest.raises(ValueError, match="active leaves out live row"):
        run()


def test_active_must_match_the_target():
    problem, active = _half_without_coefficient()
    for wrong in (active[1:], active.float()):
        with pytest.raises(ValueError, match="active must be bool of the shape of target"):
            linear_logps(problem.hidden, problem.weight, problem.target, active=wrong)


def test_autocast_is_not_entered():
    problem = make()
    plain = linear_logps(problem.hidden, problem.weight, problem.target).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logps(problem.hidden, problem.weight, problem.target).logps
    assert torch.equal(plain, inside)


def _call(**changes):
    problem = make()
    given = {"hidden": problem.hidden, "weight": problem.weight, "target": problem.target, **changes}
    return linear_logps(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.full((37,), 301)}, r"target\[0\] = 301 is outside the vocabulary of weight, 0..300"),
        ({"target": torch.full((37,), -1)}, r"target\[0\] = -1 .* ignore_index = -100"),
        ({"target": torch.zeros(37, dtype=torch.int32)}, "target must be int64"),
        ({"target": torch.zeros(36, dtype=torch.int64)}, r"target must be int64 of shape \(37,\)"),
        ({"weight": torch.zeros(301, 15)}, "must share D"),
        ({"weight": torch.zeros(301, 16, dtype=torch.bfloat16)}, "weight is torch.bfloat16, hidden torch.float32: cast"),
        ({"hidden": torch.zeros(37, 16, dtype=torch.int64)}, "hidden must be floating point"),
        ({"bias": torch.zeros(300)}, r"bias must be \(301,\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(5)}, "temperature must be a number or have the shape of target"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"outputs": ("logp",)}, "outputs takes names out of"),
        ({"schedule": "slab"}, "call linear_loss"),
        ({"schedule": "frozen"}, "weight, bias or lora requires one"),
        ({"schedule": "fast"}, "schedule must be 'auto' or one of"),
        ({"impl": "cuda"}, "impl must be 'auto' or one of"),
        ({"budget": 0}, "budget must be a positive number of bytes"),
        ({"lora": (torch.zeros(37, 2), torch.zeros(300, 2))}, "lora must be a pair"),
        ({"d_weight": torch.zeros(301, 16, dtype=torch.float64)}, "d_weight must be"),
        ({"weight": torch.zeros(301, 16, device="meta")}, "weight is on meta, hidden on cpu"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_errors_of_the_loss():
    problem = make()
    outside = torch.ones(37, requires_grad=True)
    for loss_fn, message in (
        (lambda out, rows: out.logps, "scalar tensor, got shape"),
        (lambda out, rows: 1.0, "scalar tensor, got <class 'float'>"),
        (lambda out, rows: (out.logps * outside[rows] * 2).sum(), r"shape \(37,\) that requires a gradient and would get none"),
    ):
        with pytest.raises(ValueError, match=message):
            fastalign.linear_loss(problem.hidden, problem.weight, problem.target, loss_fn)
    with pytest.raises(ValueError, match="groups must rise from 0 to the number of rows 37"):
        fastalign.linear_loss(problem.hidden, problem.weight, problem.target, problem.loss, groups=[0, 36])


@pytest.mark.parametrize("how", ["keep", "recompute", "frozen", "slab", "divergence", "divergence of slabs"])
def test_a_second_derivative_is_refused_not_left_out(how):
    problem = make(n=9, frozen=how == "frozen")
    operands = (problem.hidden, problem.weight, problem.target)
    if how == "slab":
        loss = linear_loss(*operands, lambda out, rows: -out.logps.sum())
    elif how.startswith("divergence"):
        pair = (problem.hidden, problem.weight, problem.hidden.detach().flip(0), problem.weight.detach())
        kept = {"mask": problem.target != -100}
        if how == "divergence":
            loss = fastalign.linear_divergence(*pair, **kept).sum()
        else:
            loss = fastalign.linear_divergence_loss(*pair, lambda out, rows: out.divergence.sum(), problem.target)
    else:
        loss = linear_logps(*operands, schedule=how).logps.sum()
    (plain,) = torch.autograd.grad(loss, problem.hidden, retain_graph=True)
    assert plain.any()
    with pytest.raises(RuntimeError, match=r"no gradient of its own, which create_graph=True asks for; use impl='reference'"):
        torch.autograd.grad(loss, problem.hidden, create_graph=True)


def test_the_reference_has_a_second_derivative():
    problem = make(n=9, dtype=torch.float64)
    logps = linear_logps(problem.hidden, problem.weight, problem.target, impl="reference").logps
    (first,) = torch.autograd.grad(logps.sum(), problem.hidden, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), problem.hidden)
    assert second.any()


def test_a_temperature_that_wants_a_gradient_is_refused():
    problem = make(n=9)
    temperature = torch.ones(9, requires_grad=True)
    with pytest.raises(ValueError, match="temperature gets no gradient, but requires one: detach it"):
        linear_logps(problem.hidden, problem.weight, problem.target, temperature=temperature)
    with torch.no_grad():
        linear_logps(problem.hidden, problem.weight, problem.target, temperature=temperature)
