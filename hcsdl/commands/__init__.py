"""`hcsdl <command>`: the only place that wires stages together. One module per command, each with `run(config) -> exit code`."""
