"""Tokens as they come, and at the end what steering did to them."""

import os

from openai import OpenAI

URL = os.environ.get("COXSWAIN_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("COXSWAIN_API_KEY", "none"))

stream = client.chat.completions.create(
    model="base",
    messages=[{"role": "user", "content": "What is the pet of Dorwyn Bramley?"}],
    max_tokens=24,
    temperature=0,
    stream=True,
    extra_body={
        "steering": {
            "method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "report": True,
        }
    },
)  # fmt: skip
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    # The last chunk has no choice and the report.
    if report := (chunk.model_extra or {}).get("steering"):
        print("\n\nreport:", report)
