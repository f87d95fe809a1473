"""Token ids in, text out. Knows nothing of HTTP, JSON bodies or model ids."""
