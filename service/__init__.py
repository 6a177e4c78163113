"""The runtime half of evalmode: admits bundles and serves them. Never imports torch, never imports `export`."""
