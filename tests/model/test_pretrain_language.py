"""The language model's pretraining: its optimiser, its start, and that it learns from text alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from prebench.data.text_scenes import PHRASES, content_words
from prebench.model.builder import build_model, build_processor, build_tokenizer
from prebench.model.pretrain_language import LanguageRecipe, Muon, build_language_model, pretrain_language
from prebench.runtime import seed_everything
from prebench.schema import ModelConfig, VisionTowerConfig

EMBEDDED = ModelConfig.model_validate({"language_model": {"pretrained": "embedded"}})


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_muon_steps_along_an_orthogonal_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    gradients = [torch.randn(shape, generator=generator) for _ in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    Muon(parameters, lr=0.1).step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        u, _, v = np.linalg.svd(gradient.numpy(), full_matrices=False)
        step = -parameter.detach().numpy() / (0.2 * 0.1 * max(shape) ** 0.5)
        # Five Newton-Schulz steps leave singular values near 1, in the gradient's own basis.
        inner = u.T @ step @ v.T
        assert np.all((np.diag(inner) > 0.5) & (np.diag(inner) < 1.5))
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.05


def test_a_phrase_starts_as_the_sum_of_its_words():
    tokenizer = build_tokenizer()
    weight = build_language_model(tokenizer, LanguageRecipe()).get_input_embeddings().weight

    def of(text):
        return weight[tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)[0])]

    for phrase in PHRASES[::25]:
        words = content_words(phrase)
        if len(words) > 1:
            assert torch.allclose(of(phrase), sum(of(word) for word in words) / len(words) ** 0.5)


@pytest.mark.slow
def test_it_learns_and_writes_a_plain_folder(tmp_path):
    processor = build_processor(VisionTowerConfig(pretrained=None), build_tokenizer())
    recipe = dataclasses.replace(LanguageRecipe(), steps=12, batch_size=8, warmup_steps=2)
    losses = []
    seed_everything(0)
    found = pretrain_language(tmp_path, processor, recipe, 0, lambda _done, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert set(found) >= {"color", "shape", "relation", "position"} and "rare" not in found
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.hidden_size == 64


def test_the_shipped_model_is_what_a_run_starts_from():
    tokenizer = build_tokenizer()
    first, second = (build_model(EMBEDDED, tokenizer, seed).state_dict() for seed in (0, 1))
    scratch = build_model(ModelConfig(), tokenizer, 0).state_dict()
    for name in first:
        same = torch.equal(first[name], second[name])
        assert same != ("multi_modal_projector" in name and "bias" not in name.partition("linear_2")[2]), name
    assert not torch.equal(first["lm_head.weight"], scratch["lm_head.weight"])
