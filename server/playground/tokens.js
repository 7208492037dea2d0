// The steered answer as tokens: coloured by how far steering moved each, and looked into one by one.

import { bar, el, probability, show } from "./dom.js";
import { movedByVectors } from "./vectors.js";

/** A move of this many nats has the full colour. */
const FULL_NATS = 3;
/** Moves below this many nats are rounding. */
const LEAST_NATS = 0.02;

/** Text pieces of the tokens: what each chunk of the stream said, split where it has several.
 *  `chunks` are {text, ids}; `details` the report's, one per token. */
export function pieces(chunks, details) {
  if (!chunks.some(({ ids }) => ids.length)) return details.map((detail) => detail.token);
  const texts = [];
  for (const { text, ids } of chunks) {
    let rest = text;
    for (let i = 0; i < ids.length; i += 1) {
      const last = i === ids.length - 1;
      const token = details[texts.length]?.token ?? "";
      const taken = last ? rest : rest.startsWith(token) ? token : rest.startsWith(` ${token}`) ? ` ${token}` : "";
      texts.push(taken);
      rest = rest.slice(taken.length);
    }
    if (!ids.length && rest && texts.length) texts[texts.length - 1] += rest;
  }
  return details.map((_, i) => texts[i] ?? "");
}

/** Of the drawn token by the base alone, without vectors where there are some. */
const alone = (detail) => (detail.without ?? { logprob: detail.base_logprob }).logprob;

/** How far steering moved a token, in nats; a token that the base rules out has moved all the way. */
export function moved(detail) {
  if (detail.steered_logprob === null) return alone(detail) === null ? 0 : -FULL_NATS;
  return alone(detail) === null ? FULL_NATS : detail.steered_logprob - alone(detail);
}

/** What a token looks like where its text alone would not be seen. */
function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";
}

export class Tokens {
  /** `box` shows the answer, `panel` what is known of the token that is looked at. */
  constructor(box, panel) {
    this.box = box;
    this.panel = panel;
    this.spans = [];
    box.addEventListener("keydown", (event) => this.onKey(event));
  }

  clear() {
    this.spans = [];
    this.details = [];
    this.box.replaceChildren();
    this.box.removeAttribute("role");
    this.box.removeAttribute("aria-label");
    this.box.setAttribute("tabindex", "0");
    this.box.setAttribute("role", "group");
    this.box.setAttribute("aria-labelledby", "steered-title");
    show(this.panel, false);
  }

  /** Colours the answer once its report is there. */
  colour(chunks, details) {
    this.details = details;
    const texts = pieces(chunks, details);
    this.spans = details.map((detail, i) => this.span(detail, texts[i], i));
    this.box.replaceChildren(...this.spans);
    this.box.setAttribute("role", "listbox");
    this.box.setAttribute("aria-orientation", "horizontal");
    this.box.removeAttribute("aria-labelledby");
    this.box.setAttribute("aria-label", "Tokens of the steered answer");
    this.box.removeAttribute("tabindex");
    if (!this.spans.length) return;
    this.spans[0].tabIndex = 0;
    const first = details.findIndex((detail) => detail.changed);
    this.look(first < 0 ? 0 : first);
  }

  span(detail, text, i) {
    const move = moved(detail);
    const made = el("span", {
      className: "token", role: "option", tabIndex: -1, "aria-selected": "false",
      "aria-describedby": "token-line",
    }, text || detail.token || "∅");
    if (!text) made.classList.add("ghost");
    if (text.includes("\n")) made.classList.add("newline");
    if (detail.changed) made.classList.add("changed");
    if (detail.critical) made.classList.add("critical");
    if (Math.abs(move) >= LEAST_NATS) {
      made.classList.add(move > 0 ? "up" : "down");
      const share = Math.min(1, Math.abs(move) / FULL_NATS) ** 0.6;
      made.style.setProperty("--move", `${Math.round(10 + 90 * share)}%`);
    }
    made.addEventListener("pointerenter", () => this.look(i));
    made.addEventListener("focus", () => this.look(i));
    made.addEventListener("click", () => made.focus());
    return made;
  }

  onKey(event) {
    const now = this.spans.indexOf(document.activeElement);
    if (now < 0) return;
    const to = {
      ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: this.spans.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.spans[Math.min(this.spans.length - 1, Math.max(0, to))].focus();
  }

  /** Shows token i in the panel. */
  look(i) {
    this.spans.forEach((span, j) => {
      span.setAttribute("aria-selected", String(i === j));
      span.tabIndex = i === j ? 0 : -1;
    });
    const detail = this.details[i];
    this.panel.replaceChildren(
      el("h3", {}, el("q", { className: "chosen" }, visible(detail.token)),
        el("span", { className: "soft" }, ` token ${i + 1} of ${this.details.length}`)),
      el("p", { id: "token-line" }, sentence(detail)),
      choices(detail),
      ...more(detail));
    show(this.panel, true);
  }
}

function sentence(detail) {
  const [steered, base] = [probability(detail.steered_logprob), probability(alone(detail))];
  const nats = moved(detail);
  const factor = Math.exp(Math.abs(nats));
  const by = Math.abs(nats) < LEAST_NATS ? "as likely as before"
    : `${factor < 100 ? factor.toPrecision(2) : "over 100"} times ${nats > 0 ? "more" : "less"} likely`;
  const instead = detail.changed ? ` The base would have chosen ${quoted(detail.without?.choice.token ?? detail.base_choice)}.` : "";
  return `Steered ${steered}, base alone ${base}: ${by}.${instead}`;
}

const quoted = (text) => `“${visible(text)}”`;

/** What the base and each stream would have chosen by themselves. */
function choices(detail) {
  const byStream = detail.stream_choices ?? {
    base: { token: detail.base_choice, token_id: detail.base_choice_id, logprob: null },
  };
  const rows = Object.entries({
    ...(detail.without ? { "without vectors": detail.without.choice } : {}), ...byStream,
  }).map(([stream, choice]) => {
    const share = choice.logprob === null ? 0 : Math.exp(choice.logprob);
    const same = choice.token_id === detail.token_id;
    return el("tr", { className: same ? "same" : "" },
      el("th", { scope: "row" }, stream),
      el("td", {}, el("q", { className: "chosen" }, visible(choice.token)), same ? el("span", { className: "unseen" }, " (the token that was written)") : null),
      el("td", { className: "share" }, bar(share), el("span", {}, probability(choice.logprob))));
  });
  return el("table", { className: "choices" },
    el("caption", {}, "What each stream by itself finds most likely here"),
    el("thead", {}, el("tr", {}, ...["Stream", "Its choice", "How sure it is"].map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows));
}

function more(detail) {
  const lines = [];
  const byVectors = movedByVectors(detail);
  if (byVectors !== null) {
    lines.push(`In the base the vectors made it ${Math.exp(Math.abs(byVectors)).toPrecision(2)} times ${byVectors < 0 ? "less" : "more"} likely (${byVectors < 0 ? "−" : "+"}${Math.abs(byVectors).toFixed(3)} nats).`);
  }
  if (detail.kl !== null) lines.push(`KL from the base here: ${detail.kl.toFixed(3)} nats.`);
  if (detail.critical_probability !== undefined) {
    lines.push(`Critical with probability ${detail.critical_probability.toFixed(2)}${detail.chosen_by ? `, chosen by ${detail.chosen_by}` : ""}.`);
  }
  for (const [name, value] of Object.entries(detail.values ?? {})) {
    lines.push(`${name} values the text so far at ${value === null ? "–" : value.toFixed(3)}.`);
  }
  return lines.map((text) => el("p", { className: "hint" }, text));
}
