"""Asks a running Coxswain server the zoo's test questions and prints the score tables.

``python -m zoo.evaluate --url http://127.0.0.1:8000``; the server runs ``zoo/server.yaml``.
Every request names its own steering, or its adapters.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zoo import critical_table, prompted, routing_table, small_talk, trades, value_table
from zoo.asking import Server, measured_of, replies_of, reply_of, texts_of
from zoo.conversations import (
    LENGTHS,
    MAX_TOKENS,
    Asked,
    Conversation,
    hold,
    path_of,
    read_conversations,
)
from zoo.questions import FOLDER, read_questions
from zoo.routing_table import SETTINGS, Result, Setting
from zoo.table import ROWS, Reply, Row, markdown
from zoo.world import Question, World

MODEL = "base"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TABLES = ("trades", "steering", "adapters", "values", "critical", "prompts")


def body(row: Row, question: Question, seed: int) -> dict[str, Any]:
    """The chat-completions request for one question under one row's steering."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question.question}],
        "temperature": row.temperature,
        "seed": seed,
        "max_tokens": row.max_tokens,
        "steering": row.steering,
    }


def adapted_body(setting: Setting, asked: Asked) -> dict[str, Any]:
    """The chat-completions request for one turn of a conversation."""
    request = {
        "model": asked.task if setting.by_hand else MODEL,
        "messages": asked.messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    return {**request, "adapters": list(setting.adapters)} if setting.adapters else request


def measure(server: Server, questions: list[Question]) -> list[tuple[Row, list[Reply]]]:
    """The replies of every row of the steering table."""
    results = []
    with tqdm(total=len(ROWS) * len(questions), desc="steering", unit="request") as bar:
        for row in ROWS:
            requests = [body(row, question, seed) for seed, question in enumerate(questions)]
            results.append((row, server.ask(CHAT, requests, reply_of, bar)))
    return results


def converse(server: Server, conversations: Sequence[Conversation]) -> list[Result]:
    """The replies of every setting of the adapters' table."""
    results: list[Result] = []
    turns = sum(map(len, conversations))
    with tqdm(total=len(SETTINGS) * turns, desc="adapters", unit="request") as bar:
        for setting in SETTINGS:

            def answer(asked: Sequence[Asked], setting: Setting = setting) -> list[Reply]:
                return server.ask(CHAT, [adapted_body(setting, a) for a in asked], reply_of, bar)

            results.append((setting, hold(conversations, answer)))
    return results


def talk(server: Server, prompts: Sequence[str]) -> list[str]:
    """The two tables of value-augmented sampling, as lines."""
    draws, per_request = value_table.DRAWS, 32
    drawn: list[list[str]] = [[] for _ in prompts]
    tokens = 0
    fixed = {"model": MODEL, "max_tokens": value_table.MAX_TOKENS, "temperature": 1.0}
    settings = (*value_table.REWARD, value_table.chosen(), *value_table.BOTH)
    total = len(prompts) * (draws // per_request + len(settings))
    with tqdm(total=total, desc="values", unit="request") as bar:
        for start in range(0, draws, per_request):
            requests = [
                {**fixed, "prompt": prompt, "n": per_request, "seed": (draws * i + start) * 100}
                for i, prompt in enumerate(prompts)
            ]
            answers = server.ask(TEXT, requests, texts_of, bar)
            for row, (texts, count) in zip(drawn, answers, strict=True):
                row += texts
                tokens += count
        results = []
        for setting in settings:
            asked = {**fixed, "steering": setting.steering}
            requests = [{**asked, "prompt": p, "seed": i} for i, p in enumerate(prompts)]
            results.append((setting, server.ask(TEXT, requests, measured_of, bar)))
    count = len(value_table.BOTH)
    mean = tokens / len(prompts) / draws
    lines = value_table.reward_table(drawn, mean, results[:-count])
    return [*lines, "", *value_table.trade_table(results[-count:])]


def assist(server: Server, questions: Sequence[Question]) -> list[critical_table.Result]:
    """The replies of every setting of the table of critical tokens."""
    results: list[critical_table.Result] = []
    total = len(critical_table.SETTINGS) * len(questions)
    with tqdm(total=total, desc="critical", unit="request") as bar:
        for setting in critical_table.SETTINGS:
            asked = {
                "model": MODEL,
                "n": critical_table.DRAWS,
                "temperature": critical_table.TEMPERATURE,
                "max_tokens": critical_table.MAX_TOKENS,
                "steering": setting.steering,
                "adapters": setting.adapters,
            }
            requests = [
                {
                    **{key: value for key, value in asked.items() if value is not None},
                    "messages": [{"role": "user", "content": question.question}],
                    "seed": 100 * i,
                }
                for i, question in enumerate(questions)
            ]
            results.append((setting, server.ask(CHAT, requests, replies_of, bar)))
    return results


def prompt(
    server: Server,
    questions: Sequence[Question],
    conversations: Sequence[Conversation],
    talks: Sequence[str],
) -> list[str]:
    """What prompts alone get out of the base, a table for each of the others, as lines."""
    items = [turns[0] for turns in conversations if len(turns) == 1]
    critical = questions[:100]
    total = len(prompted.PROMPTS) * len(questions) + len(items) + len(talks)
    total += len(prompted.CRITICAL) * len(critical)
    with tqdm(total=total, desc="prompts", unit="request") as bar:

        def ask(
            prompts: Sequence[prompted.Prompt], about: Sequence[Question]
        ) -> list[tuple[prompted.Prompt, list[Reply]]]:
            found = []
            for one in prompts:
                requests = [{"model": MODEL, **prompted.body(one, q, MAX_TOKENS)} for q in about]
                replies = server.ask(TEXT, requests, reply_of, bar)
                pairs = zip(about, replies, strict=True)
                found.append((one, [prompted.whole(one, q, reply) for q, reply in pairs]))
            return found

        lines = prompted.questions_table(questions, ask(prompted.PROMPTS, questions))
        fixed = {"model": MODEL, "temperature": 0, "max_tokens": MAX_TOKENS}
        requests = [{**fixed, "prompt": prompted.task_text(item)} for item in items]
        replies = server.ask(TEXT, requests, reply_of, bar)
        lines += ["", *prompted.tasks_table(items, replies)]
        fixed = {"model": MODEL, "temperature": 1.0, "max_tokens": value_table.MAX_TOKENS}
        requests = [{**fixed, **prompted.sunny_body(one), "seed": i} for i, one in enumerate(talks)]
        lines += ["", *prompted.sunny_table(server.ask(TEXT, requests, measured_of, bar))]
        return [*lines, "", *prompted.critical_table(critical, ask(prompted.CRITICAL, critical))]


def rule(server: Server, questions: Sequence[trades.Asked]) -> list[str]:
    """The table of the trades: prompts, streams, steering, ceiling."""
    lines = trades.head(len(questions))
    fixed = {"model": MODEL, "temperature": 0, "max_tokens": trades.MAX_TOKENS}
    total = (len(trades.PROMPTS) + len(trades.SETTINGS) + 1) * len(questions)
    with tqdm(total=total, desc="trades", unit="request") as bar:
        for label, setting in trades.SETTINGS.items():
            requests = [
                {**fixed, **setting, "messages": [{"role": "user", "content": one.question}]}
                for one in questions
            ]
            lines.append(trades.line(label, questions, server.ask(CHAT, requests, reply_of, bar)))
        # That a prompt does not end a reply is not held against it.
        fixed |= {"stop": ["."], "include_stop_str_in_output": True}

        def ask(texts: Sequence[str]) -> list[Reply]:
            return server.ask(TEXT, [{**fixed, "prompt": one} for one in texts], reply_of, bar)

        for label, (text, begun) in trades.PROMPTS.items():
            replies = ask([text(one) for one in questions])
            pairs = zip(questions, replies, strict=True)
            whole = [Reply(f"{begun(q)} {r.text.strip()}", r.ended) for q, r in pairs]
            lines.append(trades.line(f"base alone, {label}", questions, whole))
        # The last prompt begins the sentence: its replies are the jobs.
        places = ask([trades.looked_up(one) for one in replies])
        whole = list(map(trades.joined, questions, replies, places))
        lines.append(trades.line(f"base alone, {trades.TWO_PROMPTS}", questions, whole))
    return lines


def main() -> None:
    """Parse the arguments, ask, print."""
    parser = argparse.ArgumentParser(prog="python -m zoo.evaluate", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key, if the server wants one")
    parser.add_argument("--questions", type=Path, default=FOLDER / "test.jsonl")
    parser.add_argument("--conversations", type=Path, default=path_of("test"))
    parser.add_argument(
        "--count", type=int, help="only the first so many questions, and conversations of a length"
    )
    parser.add_argument(
        "--only", choices=TABLES, nargs="+", default=TABLES, help="these tables, not all"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test",
                        help="of the prompts of small talk, and of the trades")  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    server = Server(args.url, args.key, args.concurrency)
    questions = read_questions(args.questions)[: args.count]
    if "trades" in args.only:
        print("\n".join(rule(server, trades.asked(World(), args.split)[: args.count])) + "\n")
    if "steering" in args.only:
        print(markdown(measure(server, questions), questions) + "\n")
    if "adapters" in args.only:
        conversations = first(read_conversations(args.conversations), args.count)
        results = converse(server, conversations)
        print(routing_table.markdown(conversations, results) + "\n")
    if "values" in args.only:
        print("\n".join(talk(server, small_talk.prompts(args.split)[: args.count])) + "\n")
    if "critical" in args.only:
        print(critical_table.markdown(questions, assist(server, questions)) + "\n")
    if "prompts" in args.only:
        conversations = first(read_conversations(args.conversations), args.count)
        talks = small_talk.prompts(args.split)[: args.count or 100]
        print("\n".join(prompt(server, questions, conversations, talks)))


def first(conversations: Sequence[Conversation], count: int | None) -> list[Conversation]:
    """The first so many conversations of every length; all of them without a count."""
    return [
        items
        for length in LENGTHS
        for items in [c for c in conversations if len(c) == length][:count]
    ]


if __name__ == "__main__":
    main()
