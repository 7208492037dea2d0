"""The one vocabulary that every model of the zoo shares: byte-level BPE with chat tokens."""

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from zoo.world import Question, World, answer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIALS = [PAD, BOS, EOS, USER, ASSISTANT]
TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(world: World, size: int = 1536, seed: int = 1) -> PreTrainedTokenizerFast:
    """A tokenizer trained on two passes of the world's text, chat answers included.

    A space is put before the first word of every stretch of text, so a name has the same token
    ids wherever it stands; decoding takes it off again.
    """
    rng = random.Random(seed)
    texts = [text for _ in range(2) for text in world.pretraining_texts(rng)]
    asked = world.questions("tuning", rng, demands=True)
    texts += [f"{q.question} {answer(q, 'formal')}" for q in asked]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            # Changes no token, since no space is left. It tells vLLM that Ġ is a space, which
            # decoding one token strips: so tokens with log-probabilities keep theirs.
            pre_tokenizers.Metaspace("Ġ", prepend_scheme="never", split=False),
        ]
    )
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )


def with_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer as a tuned model saves it, with the chat template."""
    tokenizer.chat_template = TEMPLATE_PATH.read_text()
    return tokenizer


def chat_prompt(question: str) -> str:
    """The chat template applied to one user message (a test of the template keeps them equal)."""
    return f"{BOS}{USER}{question}{ASSISTANT}"


def plain_prompt(question: str) -> str:
    """The prompt of a model that knows no chat: the pre-training text's quiz."""
    return f"{BOS}Quiz: {question} Answer:"


def chat_text(question: Question, reply: str) -> tuple[str, str]:
    """Prompt and completion of one tuning example."""
    return chat_prompt(question.question), f"{reply}{EOS}"
