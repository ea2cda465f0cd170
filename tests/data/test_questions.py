import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from prebench.data.questions import SHARES, ask, caption
from prebench.data.scenes import COLORS, SHAPES, Scene, SceneObject, generate_scene

NAME = r"(\w+) (\w+)"


def oracle(scene, text):
    """Answer a question from the scene alone, by a reading of the text that shares no code with the generator."""
    objects = scene.objects

    def named(color, shape):
        return next((o for o in objects if (o.color, o.shape) == (color, shape)), None)

    head, _, options = text.partition(" There are several options:\n")
    if options:
        right = oracle(scene, head)
        return next(line[0] for line in options.split("\n") if line[3:] == right)
    if match := re.fullmatch(rf"is there a {NAME}(?: in the image)?\?", text):
        return "yes" if named(*match.groups()) else "no"
    if match := re.fullmatch(rf"are there a {NAME} and a {NAME}\?", text):
        a, b, c, d = match.groups()
        return "yes" if named(a, b) and named(c, d) else "no"
    if match := re.fullmatch(r"(?:(\w+) or (\w+): )?what color is the (\w+)\?", text):
        (only,) = {o.color for o in objects if o.shape == match[3]}
        assert match[1] is None or only in match.groups()[:2]
        return only
    if match := re.fullmatch(r"which shape is (\w+)\?", text):
        (only,) = {o.shape for o in objects if o.color == match[1]}
        return only
    if text == "how many objects are there?":
        return str(len(objects))
    if match := re.fullmatch(r"how many objects are (\w+)\?", text):
        return str(sum(o.color == match[1] for o in objects))
    if match := re.fullmatch(r"where is the (\w+)\?", text):
        (only,) = [o for o in objects if o.shape == match[1]]
        row, col = ("top", "", "bottom")[only.row], ("left", "", "right")[only.col]
        return f"{row} {col}".strip() or "center"
    if match := re.fullmatch(r"is the (\w+) (?:left or right of|above or below) the (\w+)\?", text):
        ((first,), (second,)) = ([o for o in objects if o.shape == shape] for shape in match.groups())
        if "left" in text:
            return "left" if first.col < second.col else "right"
        return "above" if first.row < second.row else "below"
    if match := re.fullmatch(rf"what size is the {NAME}\?", text):
        return named(*match.groups()).size
    match = re.fullmatch(rf"is the {NAME} (small|large)\?", text)
    assert match, text
    return "yes" if named(match[1], match[2]).size == match[3] else "no"


@pytest.fixture(scope="module")
def asked():
    rng = np.random.default_rng(0)
    return [(scene, ask(scene, rng, 8)) for scene in (generate_scene(0, "train", index) for index in range(1500))]


def test_every_answer_is_right(asked):
    for scene, questions in asked:
        for question in questions:
            assert oracle(scene, question.text) == question.answer, (scene, question)


def test_texts_are_distinct_and_as_many_as_asked_for(asked):
    for _, questions in asked:
        assert len({question.text for question in questions}) == len(questions) == 8


def test_shares(asked):
    counts = Counter(question.type for _, questions in asked for question in questions)
    assert set(counts) == set(SHARES)
    total = sum(counts.values())
    assert 0.015 < counts["rare"] / total < 0.025
    for name, share in SHARES.items():
        assert counts[name] / total == pytest.approx(share / sum(SHARES.values()), abs=0.06), name


def test_answers_are_balanced(asked):
    answers = defaultdict(Counter)
    for _, questions in asked:
        for question in questions:
            answers[question.type][question.answer] += 1
    for name in ("existence", "logical"):
        assert answers[name]["yes"] / answers[name].total() == pytest.approx(0.5, abs=0.05), name
    for name, count in (
        ("color", 6),
        ("shape", 5),
        ("multiple_choice", 4),
        ("choose", 6),
        ("count", 4),
        ("relation", 4),
        ("position", 9),
    ):
        assert len(answers[name]) == count
        assert max(answers[name].values()) / answers[name].total() < 1.5 / count, name


def test_about_half_of_the_negatives_are_hard(asked):
    hard = []
    for scene, questions in asked:
        for question in questions:
            if question.type == "existence" and question.answer == "no":
                words = re.split(r"\W", question.text)
                hard.append(
                    any(o.shape in words for o in scene.objects) and any(o.color in words for o in scene.objects)
                )
    assert 0.38 < np.mean(hard) < 0.7


def test_no_text_names_background_or_fill_and_size_stays_rare(asked):
    hidden = re.compile(r"solid|strip|dot|plain|lines|checks|slope|warm|cool|grey|backg|textur")
    for scene, questions in asked:
        assert not hidden.search(caption(scene)) and not re.search(r"small|large|size", caption(scene))
        for question in questions:
            assert not hidden.search(question.text + question.answer)
            if question.type != "rare":
                assert not re.search(r"small|large|size", question.text + question.answer)


def test_caption_is_in_reading_order():
    objects = (
        SceneObject("circle", "red", "large", 0, 2),
        SceneObject("square", "blue", "small", 1, 0),
        SceneObject("star", "teal", "small", 1, 1),
    )
    scene = Scene(objects, "plain-grey", "solid", 0, "test")
    assert caption(scene) == "a red circle, a blue square and a teal star"
    assert caption(Scene(objects[:1], "plain-grey", "solid", 0, "test")) == "a red circle"


def test_a_scene_of_one_object_still_has_questions():
    scene = Scene((SceneObject("circle", "red", "large", 0, 2),), "plain-grey", "solid", 0, "test")
    questions = ask(scene, np.random.default_rng(0), 8)
    assert len(questions) == 8
    assert all(oracle(scene, question.text) == question.answer for question in questions)


def test_the_vocabulary_is_closed():
    assert (len(SHAPES), len(COLORS)) == (5, 6)
