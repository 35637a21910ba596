// The video generator's panel: starts, shows and controls one job at a time.

import { SseClient } from "./sseClient.js";

const byId = (id) => document.getElementById(id);
const { server } = await (await fetch("/config")).json();

let sseClient = null;
let job = null;

async function post(path, body) {
  const response = await fetch(server + path, {
    method: "POST",
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
  item.textContent = `${event.id} ${event.type} ${job.percent}`;
  byId("log").append(item);
  render();
}

function render() {
  byId("progress").value = job.percent;
  byId("status").textContent = job.status;
  byId("stage").textContent = job.stage ?? "";
  byId("phase").textContent = job.phase ? `(${job.phase})` : "";
  byId("message").textContent = job.message;
  byId("pause").textContent = job.status === "Paused" ? "Resume" : "Pause";
}

function startStreaming(id) {
  stopStreaming();
  sseClient = new SseClient(`${server}/api/jobs/${id}/events?replay=1`);
  for (const type of ["job-status", "step-status", "step-progress", "warning"]) sseClient.on(type, updateJobFromSse);
  for (const type of ["job-completed", "job-failed", "job-cancelled"]) {
    sseClient.on(type, (event) => {
      updateJobFromSse(event);
      byId("artifacts").replaceChildren(...(event.data.artifacts ?? []).map((artifact) => {
        const item = document.createElement("li");
        const link = document.createElement("a");
        link.textContent = artifact.name;
        if (artifact.path.startsWith("/api/")) link.href = server + artifact.path;
        item.append(link, ` ${artifact.type}, ${artifact.sizeBytes} bytes`);
        return item;
      }));
      stopStreaming();
    });
  }
  sseClient.on("error", (event) => {
    byId("error").textContent = event.data.error ?? event.data.message;
  });
  sseClient.on("reconnecting", ({ attempt, delay }) => {
    byId("message").textContent = `Connection lost. Reconnecting in ${delay} ms (attempt ${attempt})`;
  });
  byId("pause").disabled = byId("cancel").disabled = false;
  sseClient.connect();
}

function stopStreaming() {
  sseClient?.close();
  sseClient = null;
  byId("pause").disabled = byId("cancel").disabled = true;
}

async function generate(path, body) {
  byId("error").textContent = "";
  byId("log").replaceChildren();
  byId("artifacts").replaceChildren();
  try {
    job = await post(path, body);
    render();
    startStreaming(job.jobId);
  } catch (error) {
    byId("error").textContent = error.message;
  }
}

byId("generate").onclick = () => generate("/api/jobs", { brief: "A boat leaves. It is a bright morning. Nobody waves." });
byId("demo").onclick = () => generate("/api/quick/demo");
byId("pause").onclick = () => post(`/api/jobs/${job.jobId}/${job.status === "Paused" ? "resume" : "pause"}`);
byId("cancel").onclick = () => post(`/api/jobs/${job.jobId}/cancel`);
