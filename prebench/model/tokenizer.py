"""The embedded preset's tokenizer: byte-level BPE on the generated texts, with its own chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE_TOKEN = "<image>"  # noqa: S105  (a token of text, not of access)
PAD_TOKEN = "<pad>"  # noqa: S105
BOS_TOKEN = "<s>"  # noqa: S105
EOS_TOKEN = "</s>"  # noqa: S105
USER_TOKEN = "<|user|>"  # noqa: S105
SPECIAL_TOKENS = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN, USER_TOKEN]

# Images come first in a turn and text follows without a separator, so that nothing stands between the picture and the
# question. The answer follows without a mark of its own: the fewer tokens stand between key word and answer, the sooner
# a small model finds it (docs/experiments.md). Plain-string content (as lmms-eval's simple models send it) passes
# unchanged.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 640, phrases: Sequence[str] = ()) -> Any:
    """Train the tokenizer and return it as a transformers fast tokenizer.

    Byte-level, so that any text of any script has an encoding and decodes to itself.

    Args:
        texts: representative texts; a word seen often enough becomes one token.
        vocab_size: 256 bytes + special tokens + merges.
        phrases: fixed prompts that become one token each, so that they neither lengthen every sequence nor stand as a
            dozen tokens between a question's key word and its answer (docs/experiments.md).
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN, USER_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
