// The page's frame: views, theme, the API key.

import { open, start as startAdmin } from "./admin.js";
import { Refused, setKey } from "./api.js";
import { offer, start as startCompare } from "./compare.js";
import { byId, show } from "./dom.js";

/** Shows what keeps the page from working, or that nothing does. */
function trouble(text) {
  byId("trouble").textContent = text;
  show(byId("trouble"), Boolean(text));
}

async function refresh() {
  try {
    await offer();
    trouble("");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    trouble(error.status === 401 ? "This server wants an API key: give one at the top right." : error.message);
    if (error.status === 401) byId("key").focus();
  }
}

function view(name) {
  for (const tab of ["compare", "admin"]) {
    show(byId(tab), tab === name);
    if (tab === name) byId(`to-${tab}`).setAttribute("aria-current", "page");
    else byId(`to-${tab}`).removeAttribute("aria-current");
  }
  if (name === "admin") open();
}

function theme() {
  const control = byId("theme");
  control.value = localStorage.getItem("theme") ?? "auto";
  const apply = () => { document.documentElement.dataset.theme = control.value; };
  control.addEventListener("change", () => {
    localStorage.setItem("theme", control.value);
    apply();
  });
  apply();
}

theme();
startCompare();
startAdmin(refresh);
byId("to-compare").addEventListener("click", () => view("compare"));
byId("to-admin").addEventListener("click", () => view("admin"));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey("api", byId("key").value);
  refresh();
});
refresh();
