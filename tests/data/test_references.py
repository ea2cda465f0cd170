import pytest

from prebench.data.questions import LETTERS, Question, options_text
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
    assert PRIOR.blind_scores(documents) == [0, 0]  # the first alone would be right


def choice(options: list[str], answer: str) -> Question:
    text = f"what color is the circle? {options_text(options)}"
    return Question("multiple_choice", text, LETTERS[options.index(answer)])


def test_a_blind_guesser_prefers_an_option_not_a_letter():
    options = ["blue", "green", "red", "teal"]
    prior = TextPrior([choice(options, "red")] * 2 + [choice(options[::-1], "blue")])
    rotations = [options[shift:] + options[:shift] for shift in range(4)]
    guesses = [prior.guess(choice(rotated, "blue")) for rotated in rotations]
    assert guesses == [LETTERS[rotated.index("red")] for rotated in rotations]
    documents = [
        Document(question, {question.answer: 1.0}, group=right)
        for right in ("red", "blue")
        for question in (choice(rotated, right) for rotated in rotations)
    ]
    assert prior.references(documents)["blind"] == 0.5
    assert prior.blind_scores(documents) == [1] * 4 + [0] * 4
    assert prior.references(documents)["majority"] == 0  # one letter is never right in all rotations


def test_options_without_a_prior_are_still_guessed_alike_in_all_rotations():
    for options in (["teal", "red"], ["red", "teal"]):
        assert PRIOR.guess(choice(options, "red")) == LETTERS[options.index("red")]
