"""Serving engines: loading KV into their caches and saving it from there."""
