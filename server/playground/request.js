// The left side of the page: what the request says.

import { byId, el, freshId, labelled, show } from "./dom.js";
import { slider } from "./fields.js";
import { Options } from "./options.js";
import { VECTORS } from "./vectors.js";

/** Streams that these options name need a prompt of their own. */
const NEEDED = ["without", "negative"];

const KINDS = { meteora: "MeteoRA pack", vector: "steering vector", loreft: "LoReFT" };

/** An adapter as a request names it. */
const used = ({ adapter, fields }) => ({
  name: adapter.name,
  ...Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value()])),
});

export class Request {
  /** The form, for what the server offers. */
  constructor(offers) {
    this.offers = offers;
    this.ownPrompts = new Map();
    this.adapters = [];
    this.sampling = this.buildSampling();
    this.buildSteering();
    this.buildAdapters();
    byId("forms").querySelector(`[value=${offers.chat ? "chat" : "text"}]`).checked = true;
  }

  buildSampling() {
    const most = Math.min(512, this.offers.max_model_len - 1);
    const fields = {
      temperature: slider("temperature", { label: "Temperature", low: 0, high: 2, step: 0.05, value: 0, hint: "0: always the most likely token." }),
      max_tokens: slider("max_tokens", { label: "Tokens at most", low: 1, high: most, step: 1, value: Math.min(48, most), whole: true }),
      seed: slider("seed", { label: "Seed", low: 0, high: 100, step: 1, value: 1, whole: true }),
    };
    byId("sampling").replaceChildren(...Object.values(fields).map((field) => field.element));
    return fields;
  }

  buildSteering() {
    const { profiles, methods, own_methods: ownMethods, adapters } = this.offers;
    const control = byId("steering");
    const groups = [];
    const group = (label, kind, entries) => {
      if (entries.length) groups.push(el("optgroup", { label }, ...entries.map((entry) => el("option", { value: `${kind}:${entry.name}` }, entry.name))));
    };
    group("Profiles", "profile", profiles);
    if (ownMethods) group("Methods", "method", methods);
    if (adapters.length || !groups.length) group("Without", "none", [{ name: adapters.length ? "adapters only" : "nothing to steer with" }]);
    control.replaceChildren(...groups);
    control.onchange = () => this.chosen();
    this.chosen();
  }

  chosen() {
    const [kind, ...rest] = byId("steering").value.split(":");
    const list = kind === "profile" ? this.offers.profiles : this.offers.methods;
    const entry = list.find((item) => item.name === rest.join(":")) ?? { name: "" };
    this.options = new Options(this.offers, { kind, entry });
    byId("options").replaceChildren(this.options.element);
    // Several replies of which one is chosen must differ, and greedy ones do not.
    const { temperature } = this.sampling;
    if (this.options.fields.has("n") && !temperature.value()) temperature.set(0.7);
    const fixed = kind === "profile" && !this.offers.options;
    byId("about").textContent = (entry.description ?? "") + (fixed ? " Profiles are taken as they are here." : "");
    this.options.onChange(() => this.showOwnPrompts());
    this.showOwnPrompts();
  }

  /** A text for each stream that the method names. */
  showOwnPrompts() {
    const names = this.options.kind === "method" ? this.options.named() : [];
    const fold = byId("own-prompts");
    const before = [...byId("own").querySelectorAll("textarea")].map((area) => area.dataset.stream);
    show(fold, names.length > 0);
    if (names.join() === before.join() && names.length) return;
    byId("own").replaceChildren(...names.map((name) => {
      const area = el("textarea", { rows: 2, value: this.ownPrompts.get(name) ?? "" });
      area.dataset.stream = name;
      area.addEventListener("input", () => this.ownPrompts.set(name, area.value));
      return labelled(name, area);
    }));
    fold.open = NEEDED.some((field) => this.options.fields.has(field));
  }

  buildAdapters() {
    const { adapters, limits } = this.offers;
    show(byId("adapters-fold"), adapters.length > 0);
    this.adapters = adapters.map((adapter) => {
      const isVector = VECTORS.includes(adapter.kind);
      const box = el("input", { type: "checkbox", id: freshId("adapter") });
      box.dataset.adapter = adapter.name;
      const most = isVector ? 4 : 2;
      const fields = { weight: slider(`${adapter.name}.weight`, { label: `Weight of ${adapter.name}`, low: Math.max(-most, limits.weight[0]), high: Math.min(most, limits.weight[1]), step: 0.05, value: isVector ? 0 : 1, all: limits.weight }) };
      if (adapter.kind === "meteora") {
        fields.top_k = slider(`${adapter.name}.top_k`, { label: "Adapters for each token (top k)", low: 1, high: 8, step: 1, value: 2, whole: true });
        fields.temperature = slider(`${adapter.name}.temperature`, { label: "Temperature of its gates", low: 0.1, high: 30, step: 0.1, value: "", hint: "Empty: the pack's own." });
      }
      const inner = el("div", { className: "nested", hidden: !isVector }, ...Object.values(fields).map((field) => field.element));
      box.addEventListener("change", () => { show(inner, box.checked || isVector); this.countAdapters(); });
      // A vector's slider stands open, and at 0 the vector is left out.
      if (isVector) fields.weight.onChange(() => { box.checked = Boolean(fields.weight.value()); this.countAdapters(); });
      const kind = KINDS[adapter.kind] ?? "LoRA";
      const element = el("div", { className: "adapter" },
        el("label", { className: "check" }, box, el("span", {}, adapter.name), el("span", { className: "soft" }, ` ${kind} on ${adapter.stream}`)), inner);
      return { adapter, box, fields, element };
    });
    byId("adapters").replaceChildren(...this.adapters.map((control) => control.element));
    this.countAdapters();
  }

  countAdapters() {
    const count = this.adapters.filter((control) => control.box.checked).length;
    byId("adapters-count").textContent = count ? `${count} chosen` : "";
  }

  /** {path, base, steered, bare}: where to send, the two bodies, and what runs the base without the
   *  vectors that are chosen for it; null where none is. */
  read() {
    const chat = byId("forms").querySelector("[value=chat]").checked;
    const prompt = byId("prompt").value;
    const shared = {
      model: this.offers.base,
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      ...Object.fromEntries(Object.entries(this.sampling).map(([name, field]) => [name, field.value()])),
      stream: true,
    };
    const steered = { ...shared, return_token_ids: true, steering: { ...this.steering(), report: "tokens" } };
    if (this.options.kind === "profile") steered.model = this.options.entry.name;
    const chosen = this.adapters.filter((control) => control.box.checked);
    if (chosen.length) steered.adapters = chosen.map(used);
    return { path: chat ? "v1/chat/completions" : "v1/completions", base: shared, steered, bare: this.bare(chosen) };
  }

  bare(chosen) {
    const ofBase = chosen.filter(({ adapter }) => adapter.stream === "base");
    const others = ofBase.filter(({ adapter }) => !VECTORS.includes(adapter.kind));
    if (others.length === ofBase.length) return null;
    return { model: this.offers.base, ...(others.length ? { adapters: others.map(used) } : {}) };
  }

  steering() {
    const spec = this.options.spec();
    if (this.options.kind !== "method") return spec;
    const prompts = this.options.named()
      .filter((name) => this.ownPrompts.get(name))
      .map((name) => [name, { prompt: this.ownPrompts.get(name) }]);
    return prompts.length ? { ...spec, prompts: Object.fromEntries(prompts) } : spec;
  }
}
