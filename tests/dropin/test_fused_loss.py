"""Transformers models with `fused_loss`: the loss and the gradients of their own forward, and Trainer's own steps, without logits."""

import pytest
import torch
from largest import Largest
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import Trainer, TrainingArguments

from fastalign.dropin.transformers import fused_loss
from fastalign.errors import ConfigError

FAMILIES = ["llama", "qwen3", "gemma2", "granite", "cohere2", "phi", "mixtral", "gpt2"]


def batch(seed=0, rows=3, length=9):
    ids = torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 5:] = -100
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, scale=1.0, **inputs):
    model.zero_grad()
    output = model(**inputs)
    (scale * output.loss).backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, scale=1.0):
    expected, wanted = run(model, scale, **inputs)
    with fused_loss(model) as found:
        output, grads = run(model, scale, **inputs)
    assert found.calls == 1
    assert output.logits.shape[1] == 0 and expected.logits.shape[1] > 0
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == wanted.keys()
    assert sum(float(g.norm()) for g in wanted.values()) > 0.1
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_a_family(family):
    assert_same(tiny_model(family).train(), batch(), scale=0.5)


@pytest.mark.parametrize("items", [11, torch.tensor(11)])
def test_num_items_in_batch(items):
    assert_same(tiny_model("llama"), batch() | {"num_items_in_batch": items})


def test_shift_labels():
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert_same(tiny_model("llama"), inputs | {"shift_labels": shifted})


def test_gradient_checkpointing():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model, batch() | {"use_cache": False})


def test_a_lora_on_the_head_and_switched_off():
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), lora)
    assert_same(model, batch())
    inputs = batch()
    with torch.no_grad(), model.disable_adapter():
        expected = model(**inputs).loss
    with fused_loss(model), torch.no_grad():
        on = model(**inputs).loss
        with model.disable_adapter():
            off = model(**inputs).loss
    torch.testing.assert_close(off, expected, rtol=1e-5, atol=1e-6)
    assert abs(on - off) > 1e-3


def test_positional_arguments_and_no_labels():
    model, inputs = tiny_model("llama"), batch()
    with fused_loss(model), torch.no_grad():
        assert model(inputs["input_ids"]).logits.shape[1] == 9
        by_place = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss
        assert by_place == model(**inputs).loss


def test_no_logits_exist():
    model, inputs = tiny_model("llama", vocab_size=2049), batch(rows=16, length=30)
    with Largest(2049) as own:
        run(model, **inputs)
    with fused_loss(model, budget=64 * 2049 * 4), Largest(2049) as fused:
        run(model, **inputs)
    assert own.rows >= 16 * 29
    assert fused.rows <= 64


def test_a_batch_without_labels_is_a_zero_with_gradients():
    model, inputs = tiny_model("llama"), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with fused_loss(model):
        output, grads = run(model, **inputs)
    assert output.loss == 0 and all((g == 0).all() for g in grads.values()) and grads


def rows(count):
    found = []
    for i in range(count):
        one = batch(i, rows=1)
        found.append({name: x[0] for name, x in one.items()})
    return found


def test_trainer_takes_the_same_steps(tmp_path):
    """With gradient accumulation, so that `num_items_in_batch` and the scale of the loss matter."""

    def train(fused):
        model = tiny_model("llama")
        args = TrainingArguments(str(tmp_path), max_steps=5, learning_rate=1e-3, adam_epsilon=1e-6, per_device_train_batch_size=2,
                                 gradient_accumulation_steps=2, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
                                 disable_tqdm=True, seed=0)  # fmt: skip
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        with fused_loss(model) if fused else torch.enable_grad() as found:
            trainer = Trainer(model, args, train_dataset=rows(20))
            trainer.train()
        assert not fused or found.calls == 10
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, {n: p.detach() for n, p in model.named_parameters()}, start

    (losses, weights, start), (expected, wanted, _) = train(True), train(False)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name in wanted:
        assert (weights[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name
        assert (wanted[name] - start[name]).norm() > 0


def test_undo_and_refusals():
    model, inputs = tiny_model("llama"), batch()
    found = fused_loss(model)
    with pytest.raises(ConfigError, match="replaced already"):
        fused_loss(model)
    with pytest.raises(ConfigError, match="leave them out"):
        model(**inputs, logits_to_keep=2)
    outer, model.forward = model.forward, lambda *a, **k: outer(*a, **k)  # a wrapper over ours, as accelerate puts one
    found.undo()
    assert model(**inputs).logits.shape[1] == 9
    assert found.calls == 0
    model.forward = outer
    found.undo()
    assert "forward" not in vars(model)
