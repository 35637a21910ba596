"""The load generator: publishers and watchers, each in a process of its own."""
