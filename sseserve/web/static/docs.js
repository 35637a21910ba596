// The page of the API: what /openapi.json and /asyncapi.json say, operation by operation.

import { byId, createElement, setHidden, setText } from "./dom.js";
import { capitalize } from "./format.js";

const FAMILIES = {
  sessions: "Sessions",
  control: "Sessions",
  interaction: "Interaction",
  jobs: "Jobs",
  jobs_v1: "Jobs, version 1",
  transcription: "Transcription",
  server: "Server",
};

const nameOf = (schema) => schema.$ref.slice(schema.$ref.lastIndexOf("/") + 1);

/** Describe the type of a schema; a type with a name is a link to it. */
function typeOf(schema = {}) {
  if (schema.$ref) return [createElement("a", { text: nameOf(schema), href: `#type-${nameOf(schema)}` })];
  if (schema.anyOf) return schema.anyOf.flatMap((part, index) => [...(index ? [" or "] : []), ...typeOf(part)]);
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(", ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.prefixItems) return ["(", ...schema.prefixItems.flatMap((part, index) => [...(index ? [", "] : []), ...typeOf(part)]), ")"];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  const limits = [
    ["minimum", "from"],
    ["exclusiveMinimum", "above"],
    ["maximum", "to"],
    ["maxLength", "at most this many characters:"],
  ].flatMap(([key, word]) => (key in schema ? [`${word} ${schema[key]}`] : []));
  const type = [schema.type ?? "any"].flat().join(" or ");
  return [limits.length ? `${type}, ${limits.join(" ")}` : type];
}

const code = (text) => createElement("code", { text });

function table(headings, rows) {
  const head = createElement("tr", {}, ...headings.map((text) => createElement("th", { text, scope: "col" })));
  const body = rows.map((cells) => {
    const items = cells.map((cell) => createElement("span", {}, ...[cell].flat()));
    return createElement("tr", {}, ...items.map((item, index) => createElement("td", { "data-label": headings[index] }, item)));
  });
  const element = createElement("table", {}, createElement("thead", {}, head), createElement("tbody", {}, ...body));
  return createElement("div", { class: "table-scroll", tabindex: "0" }, element);
}

const titled = (text, ...children) => [createElement("h4", { text }), ...children];

/** Return the simplest body: the members that are required, or else the first number or text. */
function exampleOf(schema, schemas) {
  const { properties = {}, required = [] } = schema?.$ref ? schemas[nameOf(schema)] : {};
  const simple = Object.entries(properties).flatMap(([name, type]) => {
    const types = (type.anyOf ?? [type]).map((part) => part.type);
    if (types.includes("number")) return [[name, 40]];
    return types.includes("string") ? [[name, "text"]] : [];
  });
  const needed = simple.filter(([name]) => required.includes(name));
  const numbers = simple.filter(([, value]) => value === 40);
  return JSON.stringify(Object.fromEntries(needed.length ? needed : [...numbers, ...simple].slice(0, 1)));
}

function curl(method, path, operation, schemas) {
  const isStream = Boolean(operation.messages);
  const parts = ["curl", isStream ? "-N" : "", method === "GET" ? "" : `-X ${method}`].filter(Boolean);
  const content = operation.requestBody?.content["application/json"];
  const body = content ? ` -H 'Content-Type: application/json' -d '${exampleOf(content.schema, schemas)}'` : "";
  return `${parts.join(" ")} '${location.origin}${path}'${body}`;
}

function describe(method, path, operation, schemas) {
  const parts = [];
  if (operation.parameters?.length) {
    const rows = operation.parameters.map((parameter) => [
      [code(parameter.name), parameter.required ? "" : " (optional)"],
      typeOf(parameter.schema),
      parameter.description ?? "The session’s ID",
    ]);
    parts.push(...titled("Parameters", table(["Name", "Type", "Meaning"], rows)));
  }
  for (const [media, content] of Object.entries(operation.requestBody?.content ?? {})) {
    parts.push(...titled(`Body, ${media}`, createElement("p", {}, ...typeOf(content.schema))));
  }
  if (operation.messages) {
    const rows = operation.messages.map(({ name, summary, payload }) => [
      name === "message" ? "without a name" : name === "*" ? "any other" : code(name),
      typeOf(payload.properties?.data ?? payload),
      summary,
    ]);
    parts.push(...titled("Messages", table(["Event", "Data", "Meaning"], rows)));
  }
  const responses = Object.entries(operation.responses).map(([status, response]) => [
    status,
    Object.entries(response.content ?? {}).flatMap(([media, { schema }]) => (schema?.$ref ? typeOf(schema) : [media])),
    response.description.replaceAll("`", ""),
  ]);
  parts.push(...titled("Responses", table(["Status", "Content", "Meaning"], responses)));
  if (operation.kind !== "WebSocket") parts.push(...titled("Example", createElement("pre", {}, code(curl(method, path, operation, schemas)))));
  return parts;
}

function createOperation(method, path, operation, schemas) {
  const label = operation.kind ?? method;
  const summary = createElement(
    "summary",
    {},
    createElement("span", { text: label, class: "method", "data-method": label }),
    createElement("code", { text: path, class: "path" }),
    createElement("span", { text: operation.summary, class: "meaning" }),
  );
  const details = createElement("details", { id: operation.operationId, class: "card operation" }, summary);
  // Most are never opened.
  details.addEventListener("toggle", () => details.append(...describe(method, path, operation, schemas)), { once: true });
  const words = [label, path, operation.summary, ...(operation.messages ?? []).map((message) => message.name)];
  details.searchText = words.join(" ").toLowerCase();
  return details;
}

/** Add to the operations of streams which messages they send. */
function addMessages(openapi, asyncapi) {
  const operations = Object.values(openapi.paths).flatMap((methods) => Object.values(methods));
  for (const operation of operations) {
    const channel = asyncapi.channels[operation.operationId];
    if (!channel) continue;
    operation.kind = channel.bindings?.ws ? "WebSocket" : "SSE";
    operation.messages = Object.values(channel.messages).map((message) => asyncapi.components.messages[nameOf(message)]);
  }
}

function showOperations(openapi) {
  const families = new Map();
  for (const [path, methods] of Object.entries(openapi.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const family = FAMILIES[operation.tags[0]] ?? capitalize(operation.tags[0]);
      if (!families.has(family)) families.set(family, []);
      families.get(family).push(createOperation(method.toUpperCase(), path, operation, openapi.components.schemas));
    }
  }
  for (const [family, operations] of families) {
    const title = createElement("h2", { text: family, id: `family-${family.replaceAll(/\W+/g, "-")}` });
    byId("operations").append(createElement("section", { "aria-labelledby": title.id }, title, ...operations));
  }
}

function showTypes(schemas) {
  for (const [name, schema] of Object.entries(schemas).sort(([a], [b]) => a.localeCompare(b))) {
    const rows = Object.entries(schema.properties ?? {}).map(([member, type]) => [
      [code(member), schema.required?.includes(member) ? "" : " (optional)"],
      typeOf(type),
    ]);
    const text = (schema.description ?? "").replaceAll("``", "").replaceAll(/(\S)\n(?=\S)/g, "$1 ");
    byId("type-list").append(
      createElement(
        "section",
        { id: `type-${name}`, class: "card" },
        createElement("h3", { text: name }),
        ...(text ? [createElement("p", { text, class: "description" })] : []),
        rows.length ? table(["Member", "Type"], rows) : createElement("p", {}, ...typeOf(schema)),
      ),
    );
  }
  setHidden(byId("types"), false);
}

function search() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const section of byId("operations").children) {
    const operations = [...section.querySelectorAll(".operation")];
    for (const operation of operations) setHidden(operation, !words.every((word) => operation.searchText.includes(word)));
    const found = operations.filter((operation) => !operation.hidden).length;
    setHidden(section, found === 0);
    count += found;
  }
  setText(byId("count"), words.length ? `${count} found` : "");
  setHidden(byId("none"), count > 0);
}

/** Open the operation that the address names. */
function openAddressed() {
  const element = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!element) return;
  if (element.matches("details")) element.open = true;
  element.scrollIntoView();
}

async function load(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } }).catch(() => {
    throw new Error("The server cannot be reached.");
  });
  if (!response.ok) throw new Error(`The server responded to ${path} with status ${response.status}.`);
  return response.json();
}

try {
  const [openapi, asyncapi] = await Promise.all([load("/openapi.json"), load("/asyncapi.json")]);
  addMessages(openapi, asyncapi);
  showOperations(openapi);
  showTypes({ ...openapi.components.schemas, ...asyncapi.components.schemas });
  byId("operations").append(createElement("p", { id: "none", text: "Nothing was found.", hidden: "" }));
  byId("search").addEventListener("input", search);
  addEventListener("hashchange", openAddressed);
  openAddressed();
} catch (error) {
  setText(byId("error"), error.message);
  setHidden(byId("error"), false);
}
