"""Apply what ``sseserve doctor`` says to the configuration of a proxy, as its user would."""

from __future__ import annotations

import re

from reverse_proxies import Configuration

from sseserve.client.doctor.proxies import Change

__all__ = ["apply_changes"]

# Where each place begins. A place that there is not is added at the end.
BEGINNINGS = {
    "location": "    location / {\n",
    "server": "server {\n",
    "defaults": "    mode http\n",
    "reverse_proxy": "reverse_proxy 127.0.0.1:8000 {\n",
    "site": ":80 {\n",
    "VirtualHost": "<VirtualHost *:80>\n",
    "backend": "backend sseserve {\n",
    "vcl_recv": "sub vcl_recv {\n",
    "vcl_pipe": "sub vcl_pipe {\n",
    "vcl_backend_response": "sub vcl_backend_response {\n",
}
# Directives of which two words say what they set.
TWO_WORDS = {"option", "proxy_set_header", "set", "SetEnv", "timeout"}


def apply_changes(configuration: Configuration, changes: list[Change]) -> Configuration:
    """Return a configuration with the changes."""
    text, options = configuration.text, configuration.options
    for change in changes:
        for beginning in change.remove:
            text = _without(text, beginning)
        for line in change.lines:
            if change.place == "varnishd":
                options += tuple(line.split())  # the last one counts
            elif change.place == "ProxyPass":
                name = line.partition("=")[0]
                text = re.sub(rf"( *ProxyPass .*?)(?: {name}=\S+)?$", rf"\1 {line}", text, flags=re.MULTILINE)
            else:
                text = _insert(_without(text, _directive(line)), change.place, line)
    return configuration._replace(text=text, options=options)


def _directive(line: str) -> str:
    """Return how lines begin that this one replaces."""
    words = line.split()
    if words[0] == "if":
        return line
    return " ".join(words[: 2 if words[0] in TWO_WORDS else 1])


def _without(text: str, beginning: str) -> str:
    end = r"(?![\w-])" if beginning[-1].isalnum() else ""
    pattern = re.compile(rf"\s*{re.escape(beginning)}{end}")
    return "".join(line for line in text.splitlines(keepends=True) if not pattern.match(line))


def _insert(text: str, place: str, line: str) -> str:
    beginning = BEGINNINGS[place]
    if beginning not in text:
        assert place.startswith("vcl_"), place
        return f"{text}\n{beginning}{line}\n}}\n"
    return text.replace(beginning, f"{beginning}{line}\n", 1)
