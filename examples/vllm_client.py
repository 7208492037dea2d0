"""What a client of `vllm serve` sends works as it is: sampling parameters, choices, LoRA routes."""

import os
from pathlib import Path

import httpx
from openai import OpenAI

URL = os.environ.get("COXSWAIN_URL", "http://127.0.0.1:8000")
ADMIN = os.environ.get("COXSWAIN_ADMIN_URL", URL)
FOLDER = Path(__file__).resolve().parents[1] / "zoo" / "adapters" / "brief"
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("COXSWAIN_API_KEY", "none"))
boss = {"authorization": f"Bearer {os.environ.get('COXSWAIN_ADMIN_KEY', 'none')}"}

print("models:", sorted(model.id for model in client.models.list()))

reply = client.completions.create(
    model="base",
    prompt="The pet of Dorwyn Bramley is a",
    max_tokens=4,
    seed=1,
    logprobs=2,
    extra_body={"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True},
)
print("sampled:", reply.choices[0].text)

answer = client.completions.create(
    model="base",
    prompt="The pet of Dorwyn Bramley is a",
    max_tokens=8,
    temperature=0,
    extra_body={"structured_outputs": {"choice": [" crow", " cat", " frog"]}},
)
print("structured:", answer.choices[0].text)

# vLLM's own routes for adapters; here they want the admin key.
order = {"lora_name": "by-vllms-route", "lora_path": str(FOLDER)}
httpx.post(f"{ADMIN}/v1/load_lora_adapter", json=order, headers=boss, timeout=60).raise_for_status()
try:
    with_adapter = client.chat.completions.create(
        model="by-vllms-route",
        messages=[{"role": "user", "content": "Briefly: What is the pet of Dorwyn Bramley?"}],
        max_tokens=8,
        temperature=0,
    )
    print("adapter:", with_adapter.choices[0].message.content)
finally:
    httpx.post(
        f"{ADMIN}/v1/unload_lora_adapter", json={"lora_name": "by-vllms-route"}, headers=boss
    ).raise_for_status()
