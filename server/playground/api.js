// Calls to the server that the page came from. Keys live in this module's memory only.

const keys = { api: "", admin: "" };

export function setKey(kind, key) {
  keys[kind] = key.trim();
}

/** What the server refused, in its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(kind, body) {
  const fields = body === undefined ? {} : { "content-type": "application/json" };
  if (keys[kind]) fields.authorization = `Bearer ${keys[kind]}`;
  return fields;
}

async function send(method, path, body, kind, signal) {
  let answer;
  try {
    // The path is relative, so that the page works behind a prefix of a proxy too.
    answer = await fetch(path, {
      method, signal, headers: headers(kind, body), cache: "no-store", credentials: "omit",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  const document = await answer.json().catch(() => null);
  throw new Refused(answer.status, document?.error?.message ?? `The server answered ${answer.status}.`);
}

/** One answer as JSON; `kind` says which key goes along. */
export async function ask(method, path, { body, kind = "api", signal } = {}) {
  const answer = await send(method, path, body, kind, signal);
  return answer.status === 204 ? null : answer.json();
}

/** The events of a streamed answer, as objects. Errors inside the stream are raised. */
export async function* events(path, body, signal) {
  const answer = await send("POST", path, body, "api", signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(500, event.error.message);
      yield event;
    }
  }
}
