// The form of a profile or a method, from what the server says its options are.

import { el, words } from "./dom.js";
import { chooser, line, slider, terms, weights } from "./fields.js";

const SKIPPED = ["method", "prompts", "report", "phases"];
const KIND = "x-kind";

/** Which heads a stream may have in a field; others take language models. */
const HEADS = { classifier: ["classifier"], value: ["value", "classifier"], values: ["value", "q"] };

/** Roles that want the same kind of stream: a profile that fills one tells about the others. */
const LIKE = {
  expert: ["expert", "tuned"], tuned: ["tuned", "expert"],
  anti_expert: ["anti_expert", "reference", "amateur"], reference: ["reference", "anti_expert"], amateur: ["amateur", "anti_expert", "reference"],
};

/** Roles of another copy of the base. */
const TWINS = ["without", "negative", "pretrained"];

/** Sliders of strengths reach this far at first sight; the number beside takes all of the range. */
const USUAL = { strength: [0, 4], weight: [-2, 2] };

/** A field's schema without its references and without the `null` of optional ones. */
function plain(schema, defs) {
  if (schema.$ref) return plain(defs[schema.$ref.split("/").pop()], defs);
  if (!schema.anyOf) return { ...schema, optional: false };
  const real = schema.anyOf.find((variant) => variant.type !== "null");
  const optional = schema.anyOf.length > 1;
  return { ...plain(real, defs), description: schema.description, default: schema.default, optional };
}

export class Options {
  /** The controls of one profile or method.
   *  `offers` is the server's; `chosen` is {kind: "profile" | "method" | "none", entry}. */
  constructor(offers, { kind, entry }) {
    this.offers = offers;
    this.kind = kind;
    this.entry = entry;
    this.preset = kind === "profile" ? entry.options : {};
    this.limits = { ...offers.limits, ...(kind === "profile" ? entry.limits : {}) };
    this.fields = new Map();
    if (kind !== "none" && (kind === "method" || offers.options)) this.build();
  }

  build() {
    const name = this.kind === "profile" ? this.preset.method : this.entry.name;
    const method = this.offers.methods.find((entry) => entry.name === name);
    if (!method) return;
    const schema = method.options;
    const taken = [];
    for (const [field, raw] of Object.entries(schema.properties)) {
      if (SKIPPED.includes(field)) continue;
      const fieldSchema = plain(raw, schema.$defs ?? {});
      const made = this.field(field, fieldSchema, schema, taken);
      if (made) this.fields.set(field, { ...made, schema: fieldSchema });
    }
  }

  field(name, schema, whole, taken) {
    const common = { label: words(name), hint: schema.description };
    const preset = this.preset[name] ?? schema.default ?? undefined;
    if (schema[KIND] === "stream") return this.stream(name, schema, preset, taken, common, whole);
    if (schema.enum) return chooser(name, { ...common, options: schema.enum, value: preset });
    if (schema.type === "number" || schema.type === "integer") return this.number(name, schema, preset, common);
    if (schema.type === "object" && schema.propertyNames?.[KIND] === "stream") {
      const range = this.shown("weight");
      const values = this.preset[name] ?? { base: 1 };
      return weights(name, { ...common, streams: this.streams(name, values), range, all: this.limits.weight, values });
    }
    if (schema.type === "array") return this.list(name, schema, whole, common);
    if (schema.type === "string") return line(name, { ...common, value: preset });
    return null; // an option of a kind that this page does not know keeps its default
  }

  /** Names for a field of streams; without rights to choose, only those of the profile. */
  streams(field, preset) {
    const heads = HEADS[field] ?? ["lm"];
    const names = this.offers.streams.filter((stream) => heads.includes(stream.head)).map((stream) => stream.name);
    return names.length ? names : Object.keys(preset ?? {});
  }

  stream(name, schema, preset, taken, common, whole) {
    const names = this.streams(name);
    if (!names.length) return null;
    const required = whole.required?.includes(name) || name === "tuned";
    const value = preset ?? (required ? this.likely(name, names, taken) : "");
    if (value && value !== "base") taken.push(value);
    const options = required || preset ? names : [["", "(none)"], ...names];
    return chooser(name, { ...common, options, value });
  }

  /** The stream that a role is most likely meant for. */
  likely(name, names, taken) {
    const others = names.filter((other) => other !== "base" && !taken.includes(other));
    const twin = this.offers.streams.find((stream) => stream.same_as === "base")?.name;
    if (TWINS.includes(name) && others.includes(twin)) return twin;
    for (const role of LIKE[name] ?? []) {
      for (const { options } of this.offers.profiles) {
        if (others.includes(options[role])) return options[role];
      }
    }
    return others[0] ?? names[0];
  }

  number(name, schema, preset, common) {
    const kind = schema[KIND];
    const whole = schema.type === "integer";
    let [low, high] = kind ? this.shown(kind, preset) : [schema.minimum ?? 0, schema.maximum ?? 1];
    if (whole) [low, high] = [schema.minimum ?? 1, schema.maximum ?? (name === "n" ? this.limits.best_of : this.limits.top_k)];
    if (schema.exclusiveMinimum !== undefined) low = 0.01;
    const value = preset ?? (schema.optional ? "" : low);
    const all = kind ? this.limits[kind] : [low, high];
    return slider(name, { ...common, low, high, all, step: whole ? 1 : kind ? 0.05 : 0.01, value, whole });
  }

  /** Lists of {stream, number}: the values of value-augmented sampling, the rewards of a mix. */
  list(name, schema, whole, common) {
    const item = plain(schema.items, whole.$defs ?? {});
    const properties = Object.entries(item.properties ?? {});
    const streamKey = properties.find(([, property]) => property[KIND] === "stream")?.[0];
    const numberKey = properties.find(([, property]) => ["strength", "weight"].includes(property[KIND]))?.[0];
    if (!streamKey || !numberKey) return null;
    const kind = item.properties[numberKey][KIND];
    let values = this.preset[name];
    const names = this.streams(name, Object.fromEntries((values ?? []).map((t) => [t[streamKey], 0])))
      .filter((stream) => stream !== "base");
    if (!values && whole.required?.includes(name)) values = [{ [streamKey]: names[0], [numberKey]: 2 }];
    return terms(name, { ...common, streams: names, range: this.shown(kind), all: this.limits[kind], streamKey, numberKey, values });
  }

  /** A slider's range: the usual one, inside what the server allows. */
  shown(kind, value = 0) {
    const [low, high] = this.limits[kind];
    const [usualLow, usualHigh] = USUAL[kind];
    return [Math.max(low, Math.min(usualLow, value)), Math.min(high, Math.max(usualHigh, value))];
  }

  get element() {
    return el("div", {}, ...[...this.fields.values()].map((field) => field.element));
  }

  onChange(listener) {
    for (const field of this.fields.values()) field.onChange(listener);
  }

  /** Streams beside the base that the options name now. */
  named() {
    const streams = new Set();
    const lm = new Set(this.offers.streams.filter((stream) => stream.head === "lm").map((stream) => stream.name));
    for (const [, field] of this.fields) {
      const value = field.value();
      if (typeof value === "string" && lm.has(value)) streams.add(value);
      else if (value && typeof value === "object") {
        const names = Array.isArray(value) ? value.flatMap((term) => Object.values(term)) : Object.keys(value);
        for (const name of names) if (lm.has(name)) streams.add(name);
      }
    }
    streams.delete("base");
    return [...streams];
  }

  /** The `steering` object; of a profile only what was changed. */
  spec() {
    const spec = this.kind === "method" ? { method: this.entry.name } : {};
    const replaced = this.fields.get("rewards")?.value() ? ["tuned", "strength", "delta_top_p"] : [];
    for (const [name, field] of this.fields) {
      const value = field.value();
      if (value === undefined || replaced.includes(name)) continue;
      if (this.kind === "profile" && !field.touched()) continue;
      if (field.schema.optional && !field.touched() && name !== "tuned") continue;
      spec[name] = value;
    }
    return spec;
  }
}
