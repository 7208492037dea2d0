// Controls for one number, one stream, a list of terms: what the forms are made of.
// A field is {element, value(), touched()}: `value` gives what the request says, undefined nothing.

import { el, freshId, labelled, select } from "./dom.js";

/** A slider with a number beside it; both say the same. `all` is the range of the number, where it
 *  is wider than what the slider shows. */
export function slider(name, { label, hint, low, high, step, value, whole = false, all = [low, high] }) {
  const range = el("input", { type: "range", min: low, max: high, step, value, id: freshId("range") });
  const number = el("input", {
    type: "number", min: all[0], max: all[1], step: whole ? 1 : "any", value, className: "number",
    "aria-label": `${label}, exact`,
  });
  let moved = false;
  const listeners = [];
  const changed = () => { moved = true; for (const listener of listeners) listener(); };
  range.addEventListener("input", () => { number.value = range.value; changed(); });
  number.addEventListener("input", () => { range.value = number.value; changed(); });
  const hintId = freshId("hint");
  if (hint) range.setAttribute("aria-describedby", hintId);
  range.dataset.field = number.dataset.field = name;
  const element = el("div", { className: "field slider" },
    el("label", { htmlFor: range.id }, label), el("div", { className: "pairing" }, range, number),
    hint ? el("p", { id: hintId, className: "hint" }, hint) : null);
  return {
    element,
    value: () => (number.value === "" ? undefined : Number(number.value)),
    touched: () => moved,
    onChange: (listener) => listeners.push(listener),
    set: (to) => { number.value = range.value = to; },
  };
}

/** A choice among names. */
export function chooser(name, { label, hint, options, value }) {
  const control = select(options, value);
  control.dataset.field = name;
  let moved = false;
  const listeners = [];
  control.addEventListener("change", () => { moved = true; for (const tell of listeners) tell(); });
  return {
    element: labelled(label, control, hint),
    value: () => control.value || undefined,
    touched: () => moved,
    onChange: (listener) => listeners.push(listener),
  };
}

/** A line of text; empty says nothing. */
export function line(name, { label, hint, value = "" }) {
  const control = el("input", { type: "text", value, autocomplete: "off" });
  control.dataset.field = name;
  let moved = false;
  control.addEventListener("input", () => { moved = true; });
  return {
    element: labelled(label, control, hint),
    value: () => control.value || undefined,
    touched: () => moved,
    onChange: (listener) => control.addEventListener("input", listener),
  };
}

/** Numbers by stream: a slider for each; those at nothing are left out of the request. */
export function weights(name, { label, hint, streams, range, all, values }) {
  const sliders = streams.map((stream) => [stream, slider(`${name}.${stream}`, {
    label: stream, low: range[0], high: range[1], all, step: 0.05, value: values?.[stream] ?? 0,
  })]);
  return group(label, hint, sliders.map(([, control]) => control), () => {
    const entries = sliders.map(([stream, control]) => [stream, control.value()]).filter(([, value]) => value);
    return Object.fromEntries(entries);
  });
}

/** A list of {stream, number} objects: a slider for each stream; those at 0 are left out. */
export function terms(name, { label, hint, streams, range, all, streamKey, numberKey, values }) {
  const before = new Map((values ?? []).map((term) => [term[streamKey], term[numberKey]]));
  const sliders = streams.map((stream) => [stream, slider(`${name}.${stream}`, {
    label: stream, low: range[0], high: range[1], all, step: 0.05, value: before.get(stream) ?? 0,
  })]);
  return group(label, hint, sliders.map(([, control]) => control), () => {
    const entries = sliders
      .filter(([, control]) => control.value())
      .map(([stream, control]) => ({ [streamKey]: stream, [numberKey]: control.value() }));
    return entries.length ? entries : undefined;
  });
}

function group(label, hint, sliders, value) {
  const hintId = freshId("hint");
  const element = el("fieldset", { className: "inner", "aria-describedby": hint ? hintId : null },
    el("legend", {}, label), hint ? el("p", { id: hintId, className: "hint" }, hint) : null,
    ...sliders.map((control) => control.element));
  return {
    element, value,
    touched: () => sliders.some((control) => control.touched()),
    onChange: (listener) => { for (const control of sliders) control.onChange(listener); },
  };
}
