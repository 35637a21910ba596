// Print what AsyncAPI's own parser finds wrong with the document on standard input, as JSON.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
const channels = document ? document.channels().all().map((channel) => channel.id()) : [];
console.log(JSON.stringify({ channels, diagnostics }));
