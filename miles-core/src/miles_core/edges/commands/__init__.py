"""What the ``miles`` command can do beside running: a module a command, imported when it is typed."""
