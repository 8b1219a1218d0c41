"""The systems outside: one package each, every one a built-in plugin that imports no other."""
