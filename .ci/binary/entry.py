"""What the one-file binary runs."""

from sseserve.cli import main

main(prog_name="sseserve")
