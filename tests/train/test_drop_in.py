"""PRe in a loop of one's own: the loss and the gradients of prebench's core, on every architecture, without a trace."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from prebench import PredictiveRegularizer
from prebench.data.collator import Batch
from prebench.errors import ConfigError, ModelError, TrainingError
from prebench.train.objective import Objective
from tests.model.tiny_models import ARCHITECTURES, Tiny
from tests.train.gradients import WEIGHT, batch, gradients, objective, parts

ROOT = Path(__file__).parents[2]
TOLERANCE = {"atol": 1e-6, "rtol": 1e-4}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request) -> Tiny:
    built = ARCHITECTURES[request.param]()
    built.model.train()
    return built


def images_by_hand(tiny: Tiny) -> list[Tensor]:
    """Return the visual tokens of each image as a mask [2, T]; the tiles of Idefics3 and SmolVLM stand apart."""
    found = []
    for row, mask in enumerate(tiny.placeholders):
        edges = F.pad(mask.int(), (1, 1)).diff()
        for first, end in zip((edges == 1).nonzero(), (edges == -1).nonzero(), strict=True):
            image = torch.zeros_like(tiny.placeholders)
            image[row, first:end] = True
            found.append(image & tiny.mask)
    return found


def test_the_loss_is_the_formula_on_the_decoders_own_states(tiny):
    layers, seen = tiny.model.get_decoder().layers, []
    handles = [layers[n].register_forward_pre_hook(lambda _, args: seen.append(args[0])) for n in (0, 2)]
    with PredictiveRegularizer(tiny.model, layer=2, weight=0.5) as regularizer:
        tiny.model(**tiny.inputs)
        loss = regularizer.loss()
        weights = {name.removeprefix("predictor.predictors.0."): v for name, v in regularizer.state_dict().items()}
    anchor, hidden = seen[0].detach(), seen[1]
    inner = F.gelu(F.linear(hidden, weights["0.weight"], weights["0.bias"]))
    cosine = F.cosine_similarity(F.linear(inner, weights["2.weight"], weights["2.bias"]), anchor, dim=-1)
    expected = -torch.stack([cosine[mask].mean() for mask in images_by_hand(tiny)]).mean()
    torch.testing.assert_close(regularizer.pre_loss, expected.detach())
    torch.testing.assert_close(loss, 0.5 * expected)
    assert regularizer.count_images(tiny.inputs) == len(images_by_hand(tiny))
    for handle in handles:
        handle.remove()


def test_every_architecture_trains_and_is_left_as_it_was(tiny):
    before = set(tiny.model.state_dict())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny.model.modules()]
    regularizer = PredictiveRegularizer(tiny.model, layer="half")
    tiny.model.zero_grad()
    tiny.model(**tiny.inputs)
    regularizer.loss().backward()
    layers = tiny.model.get_decoder().layers
    assert all(p.grad.abs().sum() > 0 for p in layers[0].mlp.parameters() if p.grad is not None)
    assert all(p.grad is None or not p.grad.any() for p in layers[-1].parameters())
    assert regularizer.step() > 0
    assert set(tiny.model.state_dict()) == before
    regularizer.close()
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny.model.modules()] == hooks


def test_the_vision_encoder_can_be_the_anchor(tiny):
    if tiny.model.config.model_type in ("llava_next", "llava_onevision"):
        with pytest.raises(ModelError, match="take anchor pre_llm"):
            PredictiveRegularizer(tiny.model, anchor="pre_projector")
        return
    with PredictiveRegularizer(tiny.model, layer=2, anchor="pre_projector") as regularizer:
        tiny.model(**tiny.inputs)
        regularizer.loss().backward()
        assert -1 <= regularizer.pre_loss <= 1
        assert all(p.grad.any() for p in regularizer.parameters())


def own_loop(term: Objective, batches: list[Batch], model: Any = None, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of a loop of one's own over micro-batches, named as those of the core."""
    model = term.model if model is None else model
    with PredictiveRegularizer(model, layer="half", weight=WEIGHT, **options) as regularizer:
        images = sum(len(b.image_ids) for b in batches)
        targets = sum(b.num_targets for b in batches)
        for b in batches:
            inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values}
            loss = model(**inputs, labels=b.labels, num_items_in_batch=targets).loss + regularizer.loss(images)
            loss.backward()
        found = {f"model.{name}": p.grad for name, p in term.model.named_parameters() if p.grad is not None}
        names = [name.removeprefix("predictor.") for name in regularizer.state_dict()]
        predictor = {f"regularizer.{n}": p.grad for n, p in zip(names, regularizer.parameters(), strict=True)}
    return found | predictor


@pytest.fixture(scope="module")
def built() -> Objective:
    return objective()


@pytest.fixture
def term(built) -> Objective:
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def core(built) -> dict[str, Tensor]:
    return gradients(copy.deepcopy(built))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradients_are_those_of_the_core(core, term, accumulation):
    assert_equal(own_loop(term, parts(accumulation)), core)


def test_the_gradients_with_the_encoder_as_anchor_are_those_of_the_core(term):
    expected = gradients(objective("pre_projector"))
    assert_equal(own_loop(term, parts(2), anchor="pre_projector"), expected)


@pytest.mark.parametrize("re_entrant", [False, True])
def test_activation_checkpointing_keeps_the_gradient(core, term, re_entrant):
    term.model.gradient_checkpointing_enable({"use_reentrant": re_entrant})
    assert_equal(own_loop(term, parts(1)), core)


def test_lora_adapters_get_their_share_before_and_after_wrapping(core, built):
    """At the start B is 0: the model is the plain one, and dL/dB = scale * dL/dW A^T."""
    from peft import LoraConfig, get_peft_model

    for wrapped_first in (True, False):
        term = copy.deepcopy(built)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=r".*language_model.*\.[qv]_proj",
            modules_to_save=["multi_modal_projector"],
        )
        plain = PredictiveRegularizer(term.model, weight=WEIGHT) if not wrapped_first else None
        model = get_peft_model(term.model, config).train()
        regularizer = plain or PredictiveRegularizer(model, weight=WEIGHT)
        b = batch()
        inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values}
        (model(**inputs, labels=b.labels).loss + regularizer.loss()).backward()
        adapters = {n: p for n, p in model.named_parameters() if "lora_B" in n}
        assert len(adapters) == 8
        for name, p in adapters.items():
            plain_name = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
            a = dict(model.named_parameters())[name.replace("lora_B", "lora_A")].detach()
            torch.testing.assert_close(p.grad, 2.0 * core[f"model.{plain_name}"] @ a.T, **TOLERANCE)
        for name, p in zip(regularizer.state_dict(), regularizer.parameters(), strict=True):
            torch.testing.assert_close(p.grad, core[f"regularizer.{name.removeprefix('predictor.')}"], **TOLERANCE)


def test_weight_zero_fits_the_predictor_and_leaves_the_model_alone(term):
    b = batch()
    inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values}
    with PredictiveRegularizer(term.model, weight=0) as regularizer:
        term.model(**inputs)
        regularizer.loss().backward()
        assert all(p.grad is None for p in term.model.parameters())
        assert all(p.grad is not None and p.grad.any() for p in regularizer.parameters())


def test_a_micro_batch_without_images_has_no_loss_and_counts_for_nothing(term):
    text = torch.tensor([[5, 6, 7, 8]])
    with PredictiveRegularizer(term.model) as regularizer:
        term.model(input_ids=text)
        loss = regularizer.loss()
        loss.backward()
        assert loss.item() == 0 and regularizer.count_images({"input_ids": text}) == 0
        assert all(p.grad is not None and not p.grad.any() for p in regularizer.parameters())


def test_weights_of_16_bits_without_autocast(term):
    term.model.to(torch.bfloat16)
    b = batch()
    with PredictiveRegularizer(term.model) as regularizer:
        term.model(b.input_ids, pixel_values=b.pixel_values.bfloat16(), attention_mask=b.attention_mask)
        regularizer.loss().backward()
        assert all(p.grad.dtype == torch.float32 for p in regularizer.parameters())


def test_only_forward_passes_of_a_training_are_read(term):
    b = batch()
    inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values}
    with PredictiveRegularizer(term.model) as regularizer:
        with torch.no_grad():
            term.model(**inputs)
        term.model.eval()
        term.model(**inputs)
        with pytest.raises(TrainingError, match="no forward pass since the last call"):
            regularizer.loss()
        term.model.train()
        term.model(**inputs)
        regularizer.loss()
        with pytest.raises(TrainingError, match="no forward pass since the last call"):
            regularizer.loss()
        hooks = sum(len(m._forward_pre_hooks) for m in term.model.modules())
        with pytest.raises(ValueError, match="mage features and image tokens"):
            term.model(**inputs | {"pixel_values": b.pixel_values[:1]})
        assert sum(len(m._forward_pre_hooks) for m in term.model.modules()) == hooks, "a failed pass left hooks behind"
    assert not any(m._forward_pre_hooks for m in term.model.modules())


def test_what_can_not_work_is_said_in_a_line(term):
    for options, message in (
        ({"anchor": "shuffled"}, "anchor 'shuffled': choose pre_llm or pre_projector"),
        ({"weight": -1}, "PredictiveRegularizer: weight"),
        ({"layer": "middle"}, "PredictiveRegularizer: layer: write quarter"),
    ):
        with pytest.raises(ConfigError, match=message):
            PredictiveRegularizer(term.model, **options)
    with pytest.raises(ModelError, match="9 lies outside 1"):
        PredictiveRegularizer(term.model, layer=9)
    term.model.requires_grad_(False)
    with PredictiveRegularizer(term.model) as regularizer:
        term.model(batch().input_ids, pixel_values=batch().pixel_values)
        with pytest.raises(TrainingError, match="no gradient reaches layer 2"):
            regularizer.loss()
        with pytest.raises(ModelError, match="without input_ids"):
            term.model(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_gradient_that_is_not_finite_moves_nothing(term):
    with PredictiveRegularizer(term.model) as regularizer:
        before = [p.detach().clone() for p in regularizer.parameters()]
        for p in regularizer.parameters():
            p.grad = torch.full_like(p, float("inf"))
        with pytest.raises(TrainingError, match="norm of the predictor's gradients is inf; stopped before its step"):
            regularizer.step()
        assert all(torch.equal(p, old) for p, old in zip(regularizer.parameters(), before, strict=True))


def test_its_step_is_adamw_on_gradients_of_limited_norm(term):
    with PredictiveRegularizer(term.model, learning_rate=0.01, max_grad_norm=0.5) as regularizer:
        expected = [torch.nn.Parameter(p.detach().clone()) for p in regularizer.parameters()]
        optimizer = torch.optim.AdamW(expected, lr=0.01)
        for size in (100.0, 0.001):  # Adam feels the first limit in the second step
            for p in (*regularizer.parameters(), *expected):
                p.grad = torch.full_like(p, size)
            norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
            assert regularizer.step() == pytest.approx(float(norm))
            optimizer.step()
        for p, value in zip(regularizer.parameters(), expected, strict=True):
            torch.testing.assert_close(p, value)


def test_its_state_goes_through_safetensors_and_on(tmp_path, term):
    def steps(regularizer: PredictiveRegularizer, number: int) -> None:
        for _ in range(number):
            term.model(b.input_ids, pixel_values=b.pixel_values, attention_mask=b.attention_mask)
            regularizer.loss().backward()
            regularizer.step()

    b = batch()
    with PredictiveRegularizer(term.model) as whole:
        steps(whole, 3)
    with PredictiveRegularizer(term.model) as first:
        steps(first, 1)
        save_file(first.state_dict(), tmp_path / "state.safetensors")
    with PredictiveRegularizer(term.model, seed=1) as second:
        second.load_state_dict(load_file(tmp_path / "state.safetensors"))
        steps(second, 2)
        for name, value in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name
    with (
        PredictiveRegularizer(term.model, hidden_size=5) as other,
        pytest.raises(ModelError, match="another predictor"),
    ):
        other.load_state_dict(whole.state_dict())


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(core, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run(
        [
            sys.executable,
            *launcher,
            str(ROOT / "tests/train/drop_in_processes.py"),
            str(tmp_path / "found.safetensors"),
        ],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert_equal(load_file(tmp_path / "found.safetensors"), core)
