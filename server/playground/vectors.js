// What steering vectors changed at each token: the reply is read once more without them.

import { ask } from "./api.js";

/** Kinds of adapters that change the residual stream behind decoder layers. */
export const VECTORS = ["vector", "loreft"];

/** Gives each detail `without`, {logprob, choice}: what the base without vectors says of the drawn
 *  token, and what it finds most likely, {token, token_id, logprob}. One prefill tells both, as the reply is known.
 *  `prompt` are the prompt's ids; `bare` is {model, adapters}, what is asked. */
export async function readWithout(prompt, details, bare, signal) {
  const ids = details.map((detail) => detail.token_id);
  const body = { ...bare, prompt: [...prompt, ...ids], max_tokens: 1, temperature: 0, prompt_logprobs: 1 };
  const answer = await ask("POST", "v1/completions", { body, signal });
  const rows = answer.choices[0].prompt_logprobs.slice(prompt.length);
  details.forEach((detail, i) => {
    const [id, best] = Object.entries(rows[i]).find(([, entry]) => entry.rank === 1);
    detail.without = {
      logprob: rows[i][detail.token_id].logprob,
      choice: { token: best.decoded_token, token_id: Number(id), logprob: best.logprob },
    };
    // What the report calls changed compares with the base that the vectors have changed already.
    detail.changed = (detail.changed ? detail.token_id : detail.base_choice_id) !== detail.without.choice.token_id;
  });
}

/** How far the vectors moved a token in the base, in nats; null where that is not known. */
export function movedByVectors(detail) {
  if (!detail.without || detail.base_logprob === null) return null;
  return detail.base_logprob - detail.without.logprob;
}

/** The mean of that over the tokens; null without any. */
export function meanByVectors(details) {
  const moves = details.map(movedByVectors).filter((move) => move !== null);
  return moves.length ? moves.reduce((sum, move) => sum + move, 0) / moves.length : null;
}
