"""A LoRA adapter is loaded while the server serves, used by one request, and unloaded."""

import os
import time
from pathlib import Path

import httpx

URL = os.environ.get("COXSWAIN_URL", "http://127.0.0.1:8000")
ADMIN = os.environ.get("COXSWAIN_ADMIN_URL", URL)  # where /admin is, if it has a port of its own
FOLDER = Path(__file__).resolve().parents[1] / "zoo" / "adapters" / "brief"

keys = {"authorization": f"Bearer {os.environ.get('COXSWAIN_API_KEY', 'none')}"}
boss = {"authorization": f"Bearer {os.environ.get('COXSWAIN_ADMIN_KEY', 'none')}"}


def ask(model: str) -> str:
    """The answer of the base, or of the base with an adapter."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Briefly: What is the pet of Dorwyn Bramley?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = httpx.post(f"{URL}/v1/chat/completions", json=body, headers=keys, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


print("without:", ask("base"))

order = {"name": "in-a-word", "source": str(FOLDER)}
httpx.post(f"{ADMIN}/admin/adapters", json=order, headers=boss).raise_for_status()
try:
    while True:  # the files are copied, checked, and loaded into the engine
        record = httpx.get(f"{ADMIN}/admin/adapters/in-a-word", headers=boss).json()
        if record["state"] == "ready":
            break
        if record["state"] == "failed":
            raise SystemExit(f"the adapter cannot be served: {record['reason']}")
        time.sleep(0.1)
    print("with:   ", ask("in-a-word"))
finally:
    httpx.delete(f"{ADMIN}/admin/adapters/in-a-word", headers=boss).raise_for_status()
