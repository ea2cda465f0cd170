"""Visual tokens through the LM head: counts, texts, entropy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from prebench.model.visual_states import language_model
from prebench.probe.diagnostics import decoded_rows
from prebench.probe.features import ProbeFeatures
from prebench.probe.lm_head import DecodedTokens, Decoder


@pytest.fixture(scope="module")
def loaded(tiny_export: Path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_export).eval()
    torch.nn.init.uniform_(language_model(model).norm.weight, 0.1, 3, generator=torch.Generator().manual_seed(0))
    return model, AutoProcessor.from_pretrained(tiny_export)


def test_states_count_as_their_most_likely_token(loaded):
    model, processor = loaded
    states = torch.randn((40, 32), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, processor)
    with torch.no_grad():
        decoder.add(states[:25])
        decoder.add(states[25:])
        ids = model.lm_head(language_model(model).norm(states)).argmax(dim=-1)
    found = decoder.result()
    expected = torch.bincount(ids)
    assert found.total == 40 and found.counts.tolist() == expected[expected > 0].tolist()
    whole = {
        i: text for i, text in zip(found.ids.tolist(), found.texts, strict=True) if text.isascii() and text.isalpha()
    }
    assert len(whole) > 3 and all(text == processor.tokenizer.decode([i]) for i, text in whole.items())


def test_a_token_that_the_tokenizer_does_not_know_has_its_number(loaded):
    model, processor = loaded
    head = torch.nn.Linear(32, 400, bias=False)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.weight[399] = 1
    model.get_output_embeddings = lambda: head
    decoder = Decoder(model, processor)
    with torch.no_grad():
        decoder.add(torch.ones(3, 32))
    del model.get_output_embeddings
    assert decoder.result().texts == ("#399",)


def test_a_model_without_a_head_gives_nothing(loaded):
    model, processor = loaded
    decoder = Decoder(model.model, processor)
    decoder.add(torch.ones(3, 32))
    assert decoder.result() is None


def decoded(counts: dict[int, int]) -> DecodedTokens:
    ids = np.array(sorted(counts))
    return DecodedTokens(ids, np.array([counts[i] for i in ids]), tuple(f"t{i}" for i in ids))


def test_entropy_and_the_most_frequent():
    assert decoded({3: 7}).entropy() == 0
    assert decoded(dict.fromkeys(range(8), 2)).entropy() == pytest.approx(3)
    assert decoded({5: 1, 2: 1, 9: 2}).most_frequent(2) == [("t9", 0.5), ("t2", 0.25)]


def test_parts_add_up():
    joined = DecodedTokens.join([decoded({1: 2, 5: 1}), decoded({5: 3, 0: 1})])
    assert dict(zip(joined.texts, joined.counts.tolist(), strict=True)) == {"t0": 1, "t1": 2, "t5": 4}
    assert joined.ids.tolist() == [0, 1, 5]


def test_rows_name_the_most_frequent_tokens():
    features = ProbeFeatures(
        np.zeros((2, 4, 3)), np.zeros((2, 3)), np.zeros((2, 4, 5)), np.zeros((2, 5)), decoded=decoded({4: 3, 7: 1})
    )
    rows = {(row.metric, row.attribute): row for row in decoded_rows(features)}
    assert {row.layer for row in rows.values()} == {3} and {row.n for row in rows.values()} == {4}
    assert rows["share", "t4"].value == 0.75 and rows["share", "t7"].value == 0.25
    assert rows["top10_share", ""].value == 1 and rows["token_entropy", ""].value == pytest.approx(0.811, abs=1e-3)
