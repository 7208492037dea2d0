"""One question three ways: the base, the base steered by a small chat model, and as a profile."""

import os
from typing import Any

from openai import OpenAI

URL = os.environ.get("COXSWAIN_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("COXSWAIN_API_KEY", "none"))


def ask(model: str, **more: Any) -> str:
    """The answer to one question."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the pet of Dorwyn Bramley?"}],
        max_tokens=24,
        temperature=0,
        extra_body=more,
    )
    return reply.choices[0].message.content or ""


# What tuning changed in the small model is added to the big one: base + 1.25 (chat − plain).
STEERING = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.25}

print("base:   ", ask("base"))
print("steered:", ask("base", steering=STEERING))
# A profile is steering under a model's name, for clients that know nothing of it.
print("profile:", ask("chat"))
