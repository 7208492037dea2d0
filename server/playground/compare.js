// One run: the base's answer and the steered one, side by side.

import { Refused, ask, events } from "./api.js";
import { byId, el, percent, show } from "./dom.js";
import { rendered } from "./report.js";
import { Request } from "./request.js";
import { Tokens } from "./tokens.js";
import { meanByVectors, readWithout } from "./vectors.js";

let request = null;
let running = null;
let tokens = null;

/** Asks what the server offers to the key, and builds the form. */
export async function offer() {
  const offers = await ask("GET", "v1/playground");
  request = new Request(offers);
  byId("base-name").textContent = offers.base;
  byId("run").disabled = false;
}

export function start() {
  tokens = new Tokens(byId("steered-text"), byId("token"));
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("compare").hidden) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
}

const say = (text) => { byId("said").textContent = text; };

async function run() {
  if (!request) return;
  running?.abort();
  const mine = running = new AbortController();
  const { path, base, steered, bare } = request.read();
  clear(steered);
  byId("stop").disabled = false;
  say("Running.");
  const answers = await Promise.all([
    answer(byId("base-text"), byId("base-facts"), path, base, mine.signal),
    answer(byId("steered-text"), byId("steered-facts"), path, steered, mine.signal),
  ]);
  const { prompt, report } = answers[1];
  const details = report?.choices?.find((choice) => choice.token_details?.length)?.token_details;
  if (running !== mine) return;
  const problem = bare && details && prompt ? await unread(prompt, details, bare, mine.signal) : null;
  if (running !== mine) return;
  byId("stop").disabled = true;
  running = null;
  finish(...answers, details, problem);
}

/** Why the reply could not be read without the vectors; null: it has been. */
async function unread(prompt, details, bare, signal) {
  try {
    await readWithout(prompt, details, bare, signal);
    return null;
  } catch (error) {
    if (!(error instanceof Refused) && error.name !== "AbortError") console.error(error);
    return `What the vectors changed is not known: ${error.message}`;
  }
}

function clear(steered) {
  tokens.clear();
  byId("base-text").replaceChildren();
  for (const side of ["base", "steered"]) byId(`${side}-facts`).textContent = "";
  byId("steered-name").textContent = steered.model === request.offers.base ? steered.steering.method ?? "" : steered.model;
  show(byId("report"), false);
  show(byId("request-fold"), true);
  byId("request").textContent = JSON.stringify(steered, null, 2);
}

/** Streams one answer into `box`. What came: {chunks, prompt, report, error}. */
async function answer(box, facts, path, body, signal) {
  const outcome = { chunks: [], prompt: null, report: null, error: null };
  box.classList.add("writing");
  const began = performance.now();
  let first = null;
  try {
    for await (const event of events(path, body, signal)) {
      if (event.steering) outcome.report = event.steering;
      outcome.prompt ??= event.prompt_token_ids ?? event.choices[0]?.prompt_token_ids ?? null;
      for (const choice of event.choices) {
        const text = choice.delta?.content ?? choice.text ?? "";
        const ids = choice.token_ids ?? [];
        if (!text && !ids.length) continue;
        first ??= performance.now();
        outcome.chunks.push({ text, ids });
        if (text) box.append(text);
      }
    }
    const seconds = (performance.now() - began) / 1000;
    if (first !== null) facts.textContent = `first token after ${((first - began) / 1000).toFixed(2)} s, all after ${seconds.toFixed(2)} s`;
    if (!outcome.chunks.length) box.append(el("span", { className: "soft" }, "(an empty answer)"));
  } catch (error) {
    outcome.error = error.name === "AbortError" ? "Stopped." : error.message;
    if (!(error instanceof Refused) && error.name !== "AbortError") console.error(error);
    box.append(el("p", { className: "error" }, outcome.error));
  } finally {
    box.classList.remove("writing");
  }
  return outcome;
}

function finish(base, steered, details, unknown) {
  const problem = base.error || steered.error || unknown;
  const { report } = steered;
  if (details) tokens.colour(steered.chunks, details);
  if (report) {
    byId("report").replaceChildren(...rendered(report, meanByVectors(details ?? [])));
    show(byId("report"), true);
  }
  say(problem ?? (report
    ? `Done: ${report.tokens} tokens, the base would have chosen another at ${percent(changed(report, details))} of them. The tokens can be walked through with the arrow keys.`
    : "Done."));
}

/** The share of the tokens where the base would have chosen another. */
function changed(report, details) {
  if (!details?.[0]?.without) return report.share_changed;
  return details.filter((detail) => detail.changed).length / details.length;
}
