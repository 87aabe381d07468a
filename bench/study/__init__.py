"""Does the decorrelation loss work in a miniature as the paper says? PLAN.md has the plan, README.md the answer."""
