// One run: the base's answer and the steered one, side by side.

import { Refused, ask, events } from "./api.js";
import { byId, el, percent, show } from "./dom.js";
import { rendered } from "./report.js";
import { Request } from "./request.js";
import { Tokens } from "./tokens.js";

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
  const { path, base, steered } = request.read();
  clear(steered);
  byId("stop").disabled = false;
  say("Running.");
  const answers = await Promise.all([
    answer(byId("base-text"), byId("base-facts"), path, base, mine.signal),
    answer(byId("steered-text"), byId("steered-facts"), path, steered, mine.signal),
  ]);
  if (running !== mine) return;
  byId("stop").disabled = true;
  running = null;
  finish(...answers);
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

/** Streams one answer into `box`. What came: {chunks, report, error}. */
async function answer(box, facts, path, body, signal) {
  const outcome = { chunks: [], report: null, error: null };
  box.classList.add("writing");
  const began = performance.now();
  let first = null;
  try {
    for await (const event of events(path, body, signal)) {
      if (event.steering) outcome.report = event.steering;
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

function finish(base, steered) {
  const problem = base.error || steered.error;
  const { report } = steered;
  const detailed = report?.choices?.find((choice) => choice.token_details?.length);
  if (detailed) tokens.colour(steered.chunks, detailed.token_details);
  if (report) {
    byId("report").replaceChildren(...rendered(report));
    show(byId("report"), true);
  }
  say(problem ?? (report
    ? `Done: ${report.tokens} tokens, the base would have chosen another at ${percent(report.share_changed)} of them. The tokens can be walked through with the arrow keys.`
    : "Done."));
}
