// Elements from data. Text only ever becomes text: there is no way from here to markup.

/** An element. `props` are properties, or attributes where the name has a hyphen or is `role`. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role" || name === "list") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

export function show(element, visible) {
  element.hidden = !visible;
}

let used = 0;

/** An id that no other element has, for labels. */
export const freshId = (stem) => `${stem}-${++used}`;

/** Words of a field's name: `anti_expert` → `Anti expert`. */
export function words(name) {
  const text = name.replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export function percent(share, digits = 0) {
  if (share === null || share === undefined) return "–";
  return `${(100 * share).toFixed(digits)} %`;
}

/** A probability from its logarithm; a null one is an impossible token's. */
export function probability(logprob) {
  const share = logprob === null || logprob === undefined ? 0 : Math.exp(logprob);
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return percent(share, 1);
}

export function bytes(count) {
  if (count === null || count === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB"];
  let step = 0;
  while (count >= 1024 && step < units.length - 1) {
    count /= 1024;
    step += 1;
  }
  return `${Number(count.toPrecision(3))} ${units[step]}`;
}

/** A bar for the eye; the number stands beside it. `share` in [0, 1]. */
export function bar(share) {
  const fill = el("span", { className: "fill" });
  fill.style.inlineSize = `${100 * Math.min(1, Math.max(0, share || 0))}%`;
  return el("span", { className: "bar", "aria-hidden": "true" }, fill);
}

/** A table with a caption for those who do not see it; cells are text or elements. */
export function table(caption, heads, rows) {
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...rest]) =>
    el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((cell) => el("td", {}, cell ?? ""))));
  return el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", { className: "unseen" }, caption),
      el("thead", {}, head), el("tbody", {}, ...body)));
}

/** A labelled control under its label; `hint` is read with it. */
export function labelled(text, control, hint) {
  control.id ||= freshId("field");
  const parts = [el("label", { htmlFor: control.id }, text), control];
  if (hint) {
    const id = freshId("hint");
    control.setAttribute("aria-describedby", id);
    parts.push(el("p", { id, className: "hint" }, hint));
  }
  return el("div", { className: "field" }, ...parts);
}

/** A select with options from texts or [value, text]; `chosen` is its value. */
export function select(options, chosen) {
  const made = el("select", {}, ...options.map((option) => {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    return el("option", { value }, text);
  }));
  if (chosen !== undefined && chosen !== null) made.value = chosen;
  return made;
}
