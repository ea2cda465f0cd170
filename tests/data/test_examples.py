import numpy as np
import pytest

from prebench.data import easy_vqa
from prebench.data.examples import TrainingData, corpus
from prebench.data.questions import LETTER_SUFFIX, SHARES, SHORT_SUFFIX
from prebench.schema import DataConfig

CONFIG = {
    "scenes": {"num_images": 40, "questions_per_image": 5},
    "easy_vqa": {"num_images": 30, "questions_per_image": 3},
}


def training_data(**changes):
    return TrainingData(DataConfig.model_validate(CONFIG | changes))


def texts(example, role):
    return [m["content"][-1]["text"] for m in example.messages if m["role"] == role]


def test_image_ids_and_pictures():
    data = training_data()
    assert len(data.image_ids) == len(set(data.image_ids)) == 70
    assert data.image_ids[0] == "scene-0"
    assert data.image_ids[40] == "easy-vqa-0"
    for image_id, side in ((data.image_ids[3], 96), (data.image_ids[44], 64)):
        assert data.image(image_id).size == (side, side)
        assert data.image(image_id).mode == "RGB"


@pytest.mark.parametrize(("image_id", "turns"), [("scene-7", 5), ("easy-vqa-7", 3)])
def test_a_conversation_has_one_picture_and_alternating_turns(image_id, turns):
    example = training_data().conversation(image_id, np.random.default_rng(0))
    assert example.image_id == image_id
    assert example.kind == "questions"
    assert [m["role"] for m in example.messages] == ["user", "assistant"] * turns
    parts = [[part["type"] for part in m["content"]] for m in example.messages]
    assert parts[0] == ["image", "text"]
    assert all(part == ["text"] for part in parts[1:])


def test_captions_say_what_a_picture_shows():
    data = training_data()
    for image_id in ("scene-3", "easy-vqa-3"):
        example = data.caption(image_id)
        assert texts(example, "user") == ["describe the image."]
        assert texts(example, "assistant")[0].startswith("a ")
    answers = {answer for _, answer in easy_vqa.load("train").questions[3]}
    assert set(texts(data.caption("easy-vqa-3"), "assistant")[0].split()[1:]) <= answers


def test_validation_questions_are_held_out_and_of_every_type():
    data = training_data()
    found = data.validation(20)
    assert {q.type for q in found} == set(SHARES) | {
        f"easy-vqa-{t}" for t in ("color", "shape", "existence", "negation")
    }
    assert all(q.text.endswith((SHORT_SUFFIX, LETTER_SUFFIX)) for q in found)
    trained = {data.image(i).tobytes() for i in data.image_ids}
    assert not trained & {q.image.tobytes() for q in found}
    assert [q.text for q in found] == [q.text for q in data.validation(20)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_suffix_share(share):
    data = training_data(suffix_share=share)
    rng = np.random.default_rng(0)
    asked = [t for i in data.image_ids * 4 for t in texts(data.conversation(i, rng), "user")]
    carries = [text.endswith((SHORT_SUFFIX, LETTER_SUFFIX)) for text in asked]
    assert np.mean(carries) == pytest.approx(share, abs=0.05 if share == 0.5 else 0)
    assert all(t.endswith(LETTER_SUFFIX) for t in asked if "options" in t and t.count("\n") > 4)


def test_the_generator_alone_decides_what_is_asked():
    data = training_data()
    same = [data.conversation("scene-1", np.random.default_rng(5)) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != data.conversation("scene-1", np.random.default_rng(6))


def test_easy_vqa_stays_in_its_training_split():
    data = training_data(easy_vqa={"num_images": 3600, "questions_per_image": 2})
    numbers = {int(i.rpartition("-")[2]) for i in data.image_ids if i.startswith("easy-vqa")}
    assert numbers == set(easy_vqa.load("train").image_paths)
    example = data.conversation("easy-vqa-11", np.random.default_rng(0))
    pairs = zip(texts(example, "user"), texts(example, "assistant"), strict=True)
    assert {(q.removesuffix(SHORT_SUFFIX), a) for q, a in pairs} <= set(easy_vqa.load("train").questions[11])


def test_fingerprint_follows_the_content():
    assert training_data().fingerprint() == training_data().fingerprint()
    assert training_data().fingerprint() != training_data(seed=1).fingerprint()
    assert training_data().fingerprint() != training_data(suffix_share=0.4).fingerprint()


def test_the_corpus_has_every_word_of_training():
    known = set(" ".join(corpus(150)).split())
    data = training_data()
    rng = np.random.default_rng(1)
    for image_id in data.image_ids:
        for role in ("user", "assistant"):
            for text in texts(data.conversation(image_id, rng), role):
                assert set(text.split()) <= known
