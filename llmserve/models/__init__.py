"""Where weights come from: fetched, verified, adapted and opened as engines."""
