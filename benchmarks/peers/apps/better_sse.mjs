// A small application with better-sse: better_sse.mjs MODULE PORT. POST /CHANNEL is sent to all who GET /CHANNEL.

import { createServer } from "node:http";
import process from "node:process";

const [, , path, port] = process.argv;
const { createChannel, createSession } = await import(path);
const channels = new Map();

function channelOf(url) {
  if (!channels.has(url)) channels.set(url, createChannel());
  return channels.get(url);
}

const server = createServer(async (request, response) => {
  if (request.method === "GET") {
    channelOf(request.url).register(await createSession(request, response));
    return;
  }
  let body = "";
  for await (const part of request) body += part;
  channelOf(request.url).broadcast(JSON.parse(body));
  response.writeHead(204).end();
});
server.listen(Number(port), "127.0.0.1", 4096);
