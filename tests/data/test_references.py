import pytest

from prebench.data.questions import Question
from prebench.data.references import Document, TextPrior

PRIOR = TextPrior(
    [Question("color", "what color is the circle?", "red")] * 3
    + [Question("color", "what color is the square?", "blue")] * 2
    + [Question("count", "how many?", "4")] * 4
)


def test_blind_falls_back_from_text_to_type_to_all():
    assert PRIOR.guess(Question("color", "what color is the square?", "")) == "blue"
    assert PRIOR.guess(Question("color", "what color is the star?", "")) == "red"
    assert PRIOR.guess(Question("size", "what size?", "")) == "4"


def test_scores():
    documents = [
        Document(Question("color", "what color is the square?", "blue"), {"blue": 1.0}),
        Document(Question("count", "how many?", "4"), {"4": 0.6}),
    ]
    assert PRIOR.references(documents) == pytest.approx({"majority": 0.3, "blind": 0.8})


def test_a_group_counts_only_together():
    texts = ["what color is the square?", "what color is the circle?"]
    documents = [Document(Question("color", text, ""), {"blue": 1.0}, group="1") for text in texts]
    assert PRIOR.references(documents)["blind"] == 0
