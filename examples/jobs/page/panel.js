// The studio's generation panel: its two buttons, and the job that they began.

import { SseClient } from "./sseClient.js";

const at = (id) => document.getElementById(id);
const { server } = await (await fetch("/config")).json();

let sseClient = null;
let job = null;

async function ask(path, body) {
  const answer = await fetch(server + path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Correlation-ID": crypto.randomUUID() },
    body: body && JSON.stringify(body),
  });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error.message);
  return said;
}

function updateJobFromSse(event) {
  job = { ...job, ...event.data };
  const item = document.createElement("li");
  item.textContent = `${event.id} ${event.type} ${job.percent}`;
  at("log").append(item);
  draw();
}

function draw() {
  at("progress").value = job.percent;
  at("status").textContent = job.status;
  at("stage").textContent = job.stage ?? "";
  at("phase").textContent = job.phase ? `(${job.phase})` : "";
  at("message").textContent = job.message;
  at("pause").textContent = job.status === "Paused" ? "Resume" : "Pause";
}

function startStreaming(id) {
  stopStreaming();
  sseClient = new SseClient(`${server}/api/jobs/${id}/events?replay=1`);
  for (const type of ["job-status", "step-status", "step-progress", "warning"]) sseClient.on(type, updateJobFromSse);
  for (const type of ["job-completed", "job-failed", "job-cancelled"]) {
    sseClient.on(type, (event) => {
      updateJobFromSse(event);
      at("artifacts").replaceChildren(...(event.data.artifacts ?? []).map((artifact) => {
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
    at("error").textContent = event.data.error ?? event.data.message;
  });
  sseClient.on("reconnecting", ({ attempt, delay }) => {
    at("message").textContent = `Reconnecting (${attempt}) in ${delay} ms`;
  });
  at("pause").disabled = at("cancel").disabled = false;
  sseClient.connect();
}

function stopStreaming() {
  sseClient?.close();
  sseClient = null;
  at("pause").disabled = at("cancel").disabled = true;
}

async function generate(path, body) {
  at("error").textContent = "";
  at("log").replaceChildren();
  at("artifacts").replaceChildren();
  try {
    job = await ask(path, body);
    draw();
    startStreaming(job.jobId);
  } catch (error) {
    at("error").textContent = error.message;
  }
}

at("generate").onclick = () => generate("/api/jobs", { brief: "A boat leaves. It is a bright morning. Nobody waves." });
at("demo").onclick = () => generate("/api/quick/demo");
at("pause").onclick = () => ask(`/api/jobs/${job.jobId}/${job.status === "Paused" ? "resume" : "pause"}`);
at("cancel").onclick = () => ask(`/api/jobs/${job.jobId}/cancel`);
