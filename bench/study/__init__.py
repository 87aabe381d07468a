"""Does the decorrelation loss do in a miniature what the paper says? PLAN.md has the questions, README.md the answers."""
