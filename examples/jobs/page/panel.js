// The video generator's panel: starts, shows and controls one job at a time.
//
// The job is in the page's URL, so that a reload shows it again. How it was created is in the history's entry, for Retry.

import { SseClient } from "./sseClient.js";

const byId = (id) => document.getElementById(id);
const { server } = await (await fetch("/config")).json();

// Colors of the states, see style.css.
const STATES = {
  Paused: "paused", Succeeded: "succeeded", Done: "succeeded", Skipped: "succeeded", Failed: "failed",
  Cancelled: "cancelled", Canceled: "cancelled",
};

let sseClient = null; // while the job is streamed
let job = null;
let connectionFailed = false;

async function request(method, path, body) {
  const response = await fetch(server + path, {
    method,
    headers: { "Content-Type": "application/json", "X-Correlation-ID": crypto.randomUUID() },
    body: body && JSON.stringify(body),
  });
  const result = await response.json();
  if (!response.ok) throw new Error(result.error.message);
  return result;
}

function updateJobFromSse(event) {
  job = { ...job, ...event.data };
  const item = document.createElement("li");
  item.textContent = `${event.id} ${event.type} ${job.percent} ${event.data.message ?? ""}`;
  byId("log").append(item);
  byId("log").scrollTop = byId("log").scrollHeight;
  render();
}

function render() {
  const state = STATES[job.status] ?? "running";
  for (const id of ["status", "progress"]) byId(id).dataset.state = state;
  byId("progress").value = job.percent;
  byId("status").textContent = job.status;
  byId("stage").textContent = job.stage ?? "";
  byId("phase").textContent = job.phase ? `(${job.phase})` : "";
  byId("message").textContent = state === "failed" ? "" : job.message; // #error has it
  byId("pause").textContent = job.status === "Paused" ? "Resume" : "Pause";
  byId("pause").disabled = byId("cancel").disabled = sseClient === null;
  byId("recovery").hidden = state !== "failed" && !connectionFailed;
  byId("correlation").textContent = job.correlationId ?? "";
  byId("artifacts").replaceChildren(...(job.artifacts ?? []).map((artifact) => {
    const item = document.createElement("li");
    const name = document.createElement(artifact.path?.startsWith("/api/") ? "a" : "span");
    name.textContent = artifact.name;
    if (name.localName === "a") name.href = server + artifact.path;
    item.append(name, ` ${artifact.type}, ${artifact.sizeBytes} bytes`);
    return item;
  }));
}

function startStreaming() {
  stopStreaming();
  connectionFailed = false;
  byId("error").textContent = "";
  byId("log").replaceChildren();
  const path = `${server}/api/jobs/${encodeURIComponent(job.jobId)}`;
  sseClient = new SseClient(`${path}/events?replay=1`, `${path.replace(/^http/, "ws")}/ws?replay=1`);
  for (const type of ["job-status", "step-status", "step-progress", "warning"]) sseClient.on(type, updateJobFromSse);
  for (const type of ["job-completed", "job-failed", "job-cancelled"]) {
    sseClient.on(type, (event) => {
      stopStreaming();
      updateJobFromSse(event);
    });
  }
  sseClient.on("error", (event) => {
    connectionFailed = event.id === undefined;
    byId("error").textContent = event.data.message;
    if (connectionFailed) stopStreaming();
    else updateJobFromSse(event);
    render();
  });
  sseClient.on("reconnecting", ({ attempt, delay }) => {
    byId("message").textContent = `Connection lost. Reconnecting in ${delay} ms (attempt ${attempt})`;
  });
  sseClient.on("open", ({ transport }) => (byId("transport").textContent = transport));
  sseClient.connect();
  render();
}

function stopStreaming() {
  sseClient?.close();
  sseClient = null;
}

async function generate(path, body) {
  byId("error").textContent = "";
  try {
    job = await request("POST", path, body);
    history.replaceState({ path, body }, "", `#${encodeURIComponent(job.jobId)}`);
    startStreaming();
  } catch (error) {
    byId("error").textContent = error.message;
  }
}

/** Show the job of the page's URL again, from its first event on. */
async function resume() {
  try {
    job = await request("GET", `/api/jobs/${location.hash.slice(1)}`);
    startStreaming();
  } catch (error) {
    byId("error").textContent = error.message;
  }
}

/** Reconnect to a job that may still run; create one that has failed again, with the same request. */
function retry() {
  if (connectionFailed) return resume();
  const { path, body } = history.state ?? { path: "/api/jobs", body: job.request };
  return generate(path, body);
}

const control = (action) =>
  request("POST", `/api/jobs/${encodeURIComponent(job.jobId)}/${action}`).catch((error) => {
    byId("error").textContent = error.message;
  });

byId("generate").onclick = () => generate("/api/jobs", { brief: byId("brief").value });
byId("demo").onclick = () => generate("/api/quick/demo");
byId("pause").onclick = () => control(job.status === "Paused" ? "resume" : "pause");
byId("cancel").onclick = () => control("cancel");
byId("retry").onclick = retry;
byId("view-logs").onclick = () => {
  byId("logs").open = true;
  byId("logs").scrollIntoView();
};

// A page in the back/forward cache must not keep its connection.
addEventListener("pagehide", stopStreaming);
addEventListener("pageshow", (event) => event.persisted && location.hash && resume());
if (location.hash) await resume();
