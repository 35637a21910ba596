// Two watchers of one task, each of which begins on another server.

import { Watcher } from "./watcher.js";

const { session_id: sessionId, servers } = await (await fetch("/begin", { method: "POST" })).json();
const STATES = { completed: "succeeded", failed: "failed", retrying: "paused", processing: "running" };

function show(index) {
  const card = document.getElementById("watcher").content.firstElementChild.cloneNode(true);
  const find = (selector) => card.querySelector(selector);
  find(".title").textContent = `Watcher ${index + 1}`;
  document.getElementById("watchers").append(card);

  const log = (text) => {
    const item = document.createElement("li");
    item.textContent = text;
    find(".log").append(item);
    find(".log").scrollTop = find(".log").scrollHeight;
  };

  const showStatus = ({ status, progress, message, attempt, text }) => {
    find(".state").textContent = attempt > 1 && status === "processing" ? `${status}, attempt ${attempt}` : status;
    find(".state").dataset.state = find("progress").dataset.state = STATES[status] ?? "queued";
    find("progress").value = progress;
    find(".percent").textContent = `${Math.round(progress)} %`;
    if (message) find(".message").textContent = message;
    if (text) document.getElementById("text").textContent = text;
    log(`${Math.round(progress)} % ${message || status}`);
  };

  const showConnection = (connection) => {
    const where = `server ${watcher.index + 1}`;
    find(".connection").textContent = {
      connecting: `Connecting to ${where}`,
      connected: `Connected to ${where}`,
      disconnected: `Disconnected from ${where}`,
      ended: `Ended on ${where}`,
    }[connection];
    find(".move").textContent = `Continue on server ${watcher.next + 1}`;
    find(".move").disabled = connection === "ended";
    if (connection === "connected") log(`connected to ${where}`);
  };

  const showProblem = (problem) => {
    const where = `server ${watcher.index + 1}`;
    find(".connection").textContent = `Connected to ${where}${problem && ` (degraded: ${problem})`}`;
    log(problem ? `degraded: ${problem}` : "restored");
  };

  const watcher = new Watcher(servers, index, sessionId, ({ status, resumed, connection, problem }) => {
    if (status) showStatus(status);
    if (resumed) log(`resumed: ${resumed.status}, ${resumed.missed} missed`);
    if (connection) showConnection(connection);
    if (problem !== undefined) showProblem(problem);
  });
  find(".move").addEventListener("click", () => watcher.move());
  watcher.connect();
}

document.getElementById("starting").remove();
servers.forEach((_, index) => show(index));
