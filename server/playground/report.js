// What the report says of a whole answer: how much changed, what it cost, where adapters routed.

import { bar, el, percent, words } from "./dom.js";

const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** The elements of the report's card. `report` is the response's `steering` object; `byVectors` the
 *  mean of what vectors moved a token by, in nats, or null. */
export function rendered(report, byVectors = null) {
  const facts = [
    ["Tokens", String(report.tokens)],
    ["Changed", percent(report.share_changed)],
    ["Mean KL", `${number(report.mean_kl)} nats`],
  ];
  if (byVectors !== null) facts.push(["By vectors", `${byVectors < 0 ? "−" : "+"}${number(Math.abs(byVectors))} nats per token`]);
  if (report.share_critical !== undefined) facts.push(["Critical", percent(report.share_critical)]);
  if (report.guided_search) {
    const found = report.guided_search;
    facts.push(["Search", `${found.beams} × ${found.k}, ${found.generated_tokens} tokens in all`]);
    if ("accepted" in found) {
      facts.push(["Accepted", `${found.accepted} of ${found.accepted + found.rejected} blocks`]);
    }
  }
  if (report.best_of_n) {
    facts.push(["Best of", `${report.best_of_n.n}, ${report.best_of_n.generated_tokens} tokens in all`]);
  }
  if (report.speculation) {
    facts.push(["Drafts accepted", percent(report.speculation.accepted / report.speculation.drafted)]);
  }
  const adapted = report.adapters?.length > 0;
  return [
    el("h3", {}, report.method === "base" && adapted ? "Base with adapters" : words(report.method), report.profile ? el("span", { className: "soft" }, ` by profile ${report.profile}`) : null),
    el("dl", { className: "chips" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    adapted ? el("p", { className: "hint" }, `Adapters change a stream itself: the numbers above compare with the base as these adapters make it${byVectors === null ? ", and so do the colours" : "; the colours with the base without the vectors"}.`) : null,
    streams(report),
    ...(report.adapters ?? []).map(adapter),
  ].filter(Boolean);
}

/** Weights in the sum, and forward passes. */
function streams(report) {
  const passes = report.forward_passes_per_token;
  const strengths = { ...report.strengths, ...(report.values?.strengths ?? {}) };
  const rows = Object.keys({ ...strengths, ...passes }).map((name) => el("tr", {},
    el("th", { scope: "row" }, name),
    el("td", {}, strengths[name] === undefined ? "–" : String(Number(strengths[name].toFixed(3))).replace("-", "−")),
    el("td", {}, number(passes[name]))));
  return el("table", { className: "streams" },
    el("caption", { className: "unseen" }, "Streams of the sum"),
    el("thead", {}, el("tr", {}, ...["Stream", "Weight", "Passes per token"].map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows));
}

/** One adapter; of a pack, the share of tokens that went to each member. */
function adapter(entry) {
  const head = el("h4", {}, `${entry.name}@${entry.version}`,
    el("span", { className: "soft" }, ` on ${entry.stream}, weight ${entry.weight}`));
  if (!entry.routed) return el("div", { className: "adapter" }, head);
  const shares = Object.entries(entry.routed).sort((a, b) => (b[1] ?? 0) - (a[1] ?? 0));
  return el("div", { className: "adapter" }, head,
    el("table", { className: "routes" },
      el("caption", {}, `Where its gates sent the tokens, over all layers (top ${entry.top_k})`),
      el("tbody", {}, ...shares.map(([member, share]) => el("tr", {},
        el("th", { scope: "row" }, member),
        el("td", { className: "share" }, bar(share), el("span", {}, percent(share, 1))))))));
}
