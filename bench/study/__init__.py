"""Does the decorrelation loss do in a miniature what the paper says? PLAN.md asks, README.md answers."""
