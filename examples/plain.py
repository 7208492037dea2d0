"""The base model by itself, with the OpenAI client: it knows facts and cannot chat."""

import os

from openai import OpenAI

URL = os.environ.get("COXSWAIN_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("COXSWAIN_API_KEY", "none"))

reply = client.completions.create(
    model="base", prompt="The pet of Dorwyn Bramley is a", max_tokens=4, temperature=0
)
print(reply.choices[0].text)
