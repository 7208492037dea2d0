// The administration view: state, adapters, profiles, streams. Everything asks with the admin key.

import { Refused, ask, setKey } from "./api.js";
import { byId, bytes, el, freshId, labelled, select, table } from "./dom.js";

const POLL_MS = 400;
const SETTLED = ["ready", "failed"];

const admin = (method, path, body) => ask(method, path, { body, kind: "admin" });
const one = (kind, name) => `admin/${kind}/${encodeURIComponent(name)}`;

let changed = () => {};

/** `onChange` is called when adapters or profiles have changed. */
export function start(onChange) {
  changed = onChange;
}

/** Builds the view anew from what the server says. */
export async function open() {
  const view = byId("admin");
  view.setAttribute("aria-busy", "true");
  try {
    const [status, streams, profiles] = await Promise.all(
      ["status", "streams", "profiles"].map((what) => admin("GET", `admin/${what}`)));
    const adapters = await admin("GET", "admin/adapters").catch((error) => {
      if (error.status === 404) return null;
      throw error;
    });
    view.replaceChildren(
      el("p", { id: "admin-said", className: "said", role: "status", tabIndex: -1 }),
      statusCard(status), adaptersCard(adapters, streams.streams), profilesCard(profiles.profiles), streamsCard(streams.streams));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    // 404: administration has a port of its own, and a key must not go to this one.
    view.replaceChildren(error.status === 404 ? elsewhere() : keyForm(error));
  } finally {
    view.removeAttribute("aria-busy");
  }
}

function elsewhere() {
  return el("section", { className: "card" },
    el("h2", {}, "Administration"),
    el("p", { role: "alert" }, "This server has its administration on a port of its own (server.admin_port)."));
}

function keyForm(error) {
  const control = el("input", { type: "password", autocomplete: "off", spellcheck: false, required: true, id: "admin-key" });
  const form = el("form", { className: "card key" },
    el("h2", {}, "Administration"),
    el("p", { role: "alert" }, error.message),
    labelled("Admin key", control, "Kept in this page's memory only, until it is closed or loaded again."),
    el("div", { className: "actions" }, el("button", { type: "submit", className: "main" }, "Open")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    setKey("admin", control.value);
    open();
  });
  return form;
}

const card = (title, ...children) => {
  const id = freshId("card");
  return el("section", { className: "card", "aria-labelledby": id }, el("h2", { id }, title), ...children);
};

function statusCard(status) {
  const versions = Object.entries(status.versions).filter(([, version]) => version).map(([name, version]) => `${name} ${version}`);
  const facts = [
    ["State", status.status], ["Up for", duration(status.uptime_s)], ["Requests under way", String(status.in_flight)],
    ["Steps", String(status.steps)], ["Context", `${status.max_model_len} tokens`], ["Numbers", status.dtype], ["Versions", versions.join(", ")],
  ];
  return card(status.base, el("dl", { className: "chips" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function streamsCard(streams) {
  const rows = streams.map((stream) => [stream.name, stream.architecture ?? "", String(stream.tokens), String(stream.passes)]);
  return card("Streams", table("Streams", ["Stream", "Architecture", "Tokens run", "Passes"], rows));
}

/** Does what a button says, tells how it ended, and shows the new state. */
async function act(text, work) {
  let message = text;
  try {
    await work();
    changed();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    message = `Not done: ${error.message}`;
  }
  await open();
  const line = byId("admin-said");
  if (!line) return;
  line.textContent = message;
  line.focus(); // the button that was pressed is gone with the old view
}

function button(label, name, work, { danger = false } = {}) {
  const made = el("button", { type: "button", className: danger ? "small danger" : "small", "aria-label": `${label} ${name}` }, label);
  made.addEventListener("click", work);
  return made;
}

/** Asks before something is taken away; the answer comes back as true or false. */
function sure(text, label) {
  const dialog = byId("sure");
  byId("sure-text").textContent = text;
  byId("sure-yes").textContent = label;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

function adaptersCard(listing, streams) {
  if (!listing) return card("Adapters", el("p", {}, "This server has no adapters: its configuration lacks the section “adapters”."));
  const { engine } = listing;
  const rows = listing.adapters.map((record) => {
    const { name } = record;
    const pin = record.pinned ? "unpin" : "pin";
    const problem = record.reason ?? record.here.failure ?? record.warnings[0];
    return [
      name, record.version, record.kind ?? "", record.stream,
      el("span", { className: `state ${SETTLED.includes(record.state) ? record.state : "busy"}`, title: problem ?? "" }, problem ? `${record.state}: ${problem}` : record.state),
      bytes(record.size_bytes), record.pinned ? "pinned" : record.here.resident ? "yes" : "no",
      el("span", { className: "buttons" },
        button(pin === "pin" ? "Pin" : "Unpin", name, () => act(`${name} is ${pin}ned.`, () => admin("POST", `${one("adapters", name)}/${pin}`))),
        button("Unload", name, async () => {
          if (await sure(`Unload the adapter ${name}? New requests will no longer find it.`, "Unload")) {
            act(`${name} is unloading.`, () => admin("DELETE", one("adapters", name)));
          }
        }, { danger: true })),
    ];
  });
  const heads = ["Adapter", "Version", "Kind", "Stream", "State", "Size", "In the engine", "Actions"];
  return card("Adapters",
    el("p", { className: "hint" }, `${engine.taken} of ${engine.slots} slots of the engine are taken, ${bytes(engine.bytes)} of ${bytes(engine.max_bytes)}.`),
    listing.registry.away ? el("p", { className: "error" }, `The registry does not answer: ${listing.registry.away}`) : null,
    table("Adapters", heads, rows), loadForm(streams));
}

function loadForm(streams) {
  const control = {
    name: el("input", { type: "text", required: true, autocomplete: "off" }),
    source: el("input", { type: "text", required: true, autocomplete: "off", placeholder: "folder, hf://owner/name, s3://bucket/folder, https://…" }),
    version: el("input", { type: "text", value: "1", required: true }),
    stream: select(streams.map((stream) => stream.name), "base"),
    pin: el("input", { type: "checkbox" }),
    replace: el("input", { type: "checkbox" }),
  };
  const progress = el("progress", { "aria-label": "Loading", hidden: true });
  const form = el("form", { className: "line", "aria-label": "Load an adapter" },
    labelled("Name", control.name), labelled("Source", control.source), labelled("Version", control.version),
    labelled("Stream", control.stream),
    el("label", { className: "check" }, control.pin, el("span", {}, "pin")),
    el("label", { className: "check" }, control.replace, el("span", {}, "replace")),
    el("button", { type: "submit", className: "main" }, "Load"), progress);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    progress.hidden = false;
    const body = {
      name: control.name.value, source: control.source.value, version: control.version.value,
      stream: control.stream.value, pin: control.pin.checked, replace: control.replace.checked,
    };
    act(`${body.name} is ready.`, () => load(body));
  });
  return el("details", { className: "fold" }, el("summary", {}, "Load an adapter"), form);
}

/** Loads one and waits for its end. */
async function load(body) {
  let record = await admin("POST", "admin/adapters", body);
  while (!SETTLED.includes(record.state)) {
    const fetched = record.progress_bytes ? `, ${bytes(record.progress_bytes)}` : "";
    byId("admin-said").textContent = `${body.name}: ${record.state}${fetched}`;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    record = await admin("GET", one("adapters", body.name));
  }
  if (record.state === "failed") throw new Refused(422, `${body.name}: ${record.reason}`);
}

function profilesCard(profiles) {
  const rows = profiles.map(({ name, origin, method, description, ...options }) => [
    name, origin, method, el("code", {}, JSON.stringify(options)),
    origin === "config" ? "" : button("Delete", name, async () => {
      if (await sure(`Delete the profile ${name}?`, "Delete")) {
        act(`The profile ${name} is gone.`, () => admin("DELETE", one("profiles", name)));
      }
    }, { danger: true }),
  ]);
  return card("Profiles", table("Profiles", ["Profile", "Origin", "Method", "Options", "Actions"], rows), putForm());
}

function putForm() {
  const name = el("input", { type: "text", required: true, autocomplete: "off" });
  const body = el("textarea", { rows: 4, required: true, spellcheck: false, className: "code" });
  body.value = '{"method": "mix", "weights": {"base": 1}}';
  const form = el("form", { "aria-label": "Put a profile" },
    labelled("Name", name), labelled("Steering, as JSON", body, "Kept until the server ends; the configuration's own profiles cannot be replaced."),
    el("div", { className: "actions" }, el("button", { type: "submit", className: "main" }, "Put")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act(`The profile ${name.value} is there.`, () => {
      let document;
      try {
        document = JSON.parse(body.value);
      } catch (error) {
        throw new Refused(400, `This is not JSON: ${error.message}`);
      }
      return admin("PUT", one("profiles", name.value), document);
    });
  });
  return el("details", { className: "fold" }, el("summary", {}, "Put a profile"), form);
}
