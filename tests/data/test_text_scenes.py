"""What the language model reads before it sees pictures: the scene, the whole scene, and nothing that is hidden."""

import re

import numpy as np

from prebench.data.questions import PLACES
from prebench.data.scenes import Scene, SceneObject, generate_scene, patch_objects, render
from prebench.data.text_scenes import PHRASES, TextData, content_words, easy_vqa_text, scene_text
from prebench.model.builder import build_tokenizer

OBJECTS = (SceneObject("circle", "red", "large", 0, 2), SceneObject("star", "teal", "small", 2, 1))
SCENE = Scene(OBJECTS, "plain-grey", "solid", 0, "test")


def tokens(text):
    return build_tokenizer().tokenize(text)


def test_a_patch_is_one_token_in_reading_order():
    found = tokens(scene_text(SCENE))
    assert len(found) == 36
    assert [i for i, part in enumerate(found) if part == " red circle at the top right"] == [4, 5, 10, 11]
    assert [i for i, part in enumerate(found) if part == " teal star at the bottom"] == [26, 27, 32, 33]
    assert set(found) == {" nothing", " red circle at the top right", " teal star at the bottom"}


def test_text_and_picture_agree_patch_by_patch():
    for index in range(50):
        scene = generate_scene(0, "train", index)
        numbers = patch_objects(render(scene)[1]).reshape(-1)
        for number, token in zip(numbers, tokens(scene_text(scene)), strict=True):
            item = scene.objects[number - 1] if number else None
            expected = f" {item.name} at the {PLACES[item.row][item.col]}" if item else " nothing"
            assert token == expected


def test_every_phrase_is_one_token_and_made_of_single_tokens():
    for phrase in PHRASES:
        assert tokens(phrase) == [phrase]
    assert content_words(" red circle at the top left") == [" red", " circle", "top left"]
    assert content_words(" red circle") == [" red", " circle"]
    assert content_words("top left") == ["top left"]


def test_easy_vqa_in_words_is_one_block():
    for seed in range(30):
        found = tokens(easy_vqa_text("rectangle", "gray", np.random.default_rng(seed)))
        grid = np.asarray([part != " nothing" for part in found]).reshape(6, 6)
        rows, cols = np.nonzero(grid)
        assert len(found) == 36
        assert 1 <= grid.sum() == (np.ptp(rows) + 1) * (np.ptp(cols) + 1) <= 9


def test_conversations_are_pure_functions_and_hide_what_is_hidden():
    data = TextData(0, 8, suffix_share=0.5, caption_share=0.1, easy_vqa_share=0.2)
    hidden = re.compile(r"small|large|size|solid|strip|dot|plain|lines|checks|slope|warm|cool|grey|backg")
    kinds = set()
    for index in range(200):
        messages = data[index]
        assert messages == data[index]
        texts = [part["text"] for m in messages for part in m["content"]]
        assert all(part["type"] == "text" for m in messages for part in m["content"])
        assert not hidden.search(" ".join(texts))
        kinds.add((len(messages) == 2, "at the" in texts[0]))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
