"""A slow stand-in for the server: mixes logits of transformers models, greedily or sampled.

``python -m zoo.reference`` prints the same table as :mod:`zoo.evaluate` without a server.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zoo.questions import FOLDER, read_questions
from zoo.table import ROWS, Reply, Row, markdown
from zoo.tokenizer import chat_prompt, plain_prompt
from zoo.world import Question

ROOT = Path(__file__).parent
STREAMS = {
    "base": "base-large",
    "chat": "chat-small",
    "plain": "base-small",
    "formal": "formal-small",
    "direct": "direct-small",
    "ceiling": "chat-large",
}
BATCH = 150


@dataclass(frozen=True)
class Stream:
    """One model with its coefficient and its own prompts (token ids, one list per row)."""

    model: LlamaForCausalLM
    weight: float
    prompts: list[list[int]]


def left_padded(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.inference_mode()
def generate(
    streams: list[Stream], stops: tuple[int, ...], pad: int, max_tokens: int, temperature: float
) -> list[list[int]]:
    """Reply token ids, the stop token included where one came.

    Each step sums ``weight * logits`` over the streams and appends the chosen token to all.
    """
    feeds = [left_padded(stream.prompts, pad) for stream in streams]
    caches: list[object] = [None] * len(streams)
    rows = len(streams[0].prompts)
    replies: list[list[int]] = [[] for _ in range(rows)]
    open_rows = set(range(rows))
    for _ in range(max_tokens):
        total = torch.zeros(())
        for i, (stream, (ids, mask)) in enumerate(zip(streams, feeds, strict=True)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = stream.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=caches[i],
                use_cache=True,
            )
            caches[i] = out.past_key_values
            total = total + stream.weight * out.logits[:, -1].float()
        tokens = _choose(total, temperature)
        for row in list(open_rows):
            replies[row].append(int(tokens[row]))
            if replies[row][-1] in stops:
                open_rows.remove(row)
        if not open_rows:
            break
        one = torch.ones(rows, 1, dtype=torch.int64)
        feeds = [(tokens[:, None], torch.cat([mask, one], 1)) for _, mask in feeds]
    return replies


def _choose(logits: Tensor, temperature: float) -> Tensor:
    """Next token ids, int64 [rows]; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]


class Reference:
    """All models of the zoo, loaded once; answers rows of the table."""

    def __init__(self, models: Path, dtype: torch.dtype, base_prompt: str) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(models / "base-large")
        self.base_prompt = base_prompt
        load = partial(LlamaForCausalLM.from_pretrained, dtype=dtype)
        self.models: dict[str, LlamaForCausalLM] = {
            stream: load(models / name)
            for stream, name in STREAMS.items()
            if (models / name / "model.safetensors").exists()
        }

    def answer(self, row: Row, questions: list[Question]) -> list[Reply]:
        """The replies of one row of the table."""
        torch.manual_seed(3)
        end = self.tokenizer.eos_token_id
        replies: list[Reply] = []
        for at in range(0, len(questions), BATCH):
            part = questions[at : at + BATCH]
            streams = [
                Stream(self.models[name], weight, [self._prompt(name, q.question) for q in part])
                for name, weight in row.weights.items()
                if weight != 0
            ]
            for ids in generate(streams, (end,), 0, row.max_tokens, row.temperature):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                replies.append(Reply(text, ended=ids[-1] == end))
        return replies

    def _prompt(self, stream: str, question: str) -> list[int]:
        plain = self.base_prompt == "plain" and stream in ("base", "plain")
        text = plain_prompt(question) if plain else chat_prompt(question)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def main() -> None:
    """Answer the questions of one split with every row of the table."""
    parser = argparse.ArgumentParser(prog="python -m zoo.reference", description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--base-prompt", choices=("chat", "plain"), default="chat")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only the first rows")
    parser.add_argument("--count", type=int, default=None, help="only the first questions")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--show", type=int, default=0, help="print so many replies per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = read_questions(FOLDER / f"{args.split}.jsonl")[: args.count]
    reference = Reference(args.models, getattr(torch, args.dtype), args.base_prompt)
    results = []
    for row in tqdm(ROWS[: args.rows], unit="row", disable=None):
        replies = reference.answer(row, questions)
        results.append((row, replies))
        for question, reply in list(zip(questions, replies, strict=True))[: args.show]:
            tqdm.write(f"[{row.label}] {question.question} | {reply.text} | {reply.ended}")
    print(markdown(results, questions))


if __name__ == "__main__":
    main()
